"""Memory and time of fine-tuning on full, 8-bit and 4-bit bases, ours and PEFT's.

    python -m benchmarks.qlora [--steps 5] [--tokens 256] [--methods NAME ...]

SmolLM2-135M-Instruct, one thread, one batch of random tokens; every method runs in a process of its
own, so that its peak memory is its own. Rank 8, alpha 16, all linear layers of the blocks, AdamW.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.weights import smollm2

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ["full"] + [
    f"{kind} {base}" for base in ("float32", "int8", "nf4") for kind in ("LoRA", "PEFT")
]


def load(base: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if base == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, **options)


def prepare(method: str) -> Any:
    if method == "full":
        return load("float32")
    kind, base = method.split()
    model = load(base)
    if kind == "LoRA":
        from lightning_lora import inject_lora

        inject_lora(model, r=8, alpha=16, target_modules=TARGETS)
        return model
    import peft

    return peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0)
    )


def megabytes(model: torch.nn.Module) -> float:
    """Parameters and buffers, and the scales of packed weights."""
    from lightning_lora.quantization import quantized_layers, scales

    tensors = [*model.parameters(), *model.buffers()]
    for layer in quantized_layers(model).values():
        tensors += scales(layer)
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(method: str, steps: int, tokens: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    model = prepare(method).train()
    loaded, weights = peak(), megabytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return {
        "weights": weights,
        "loaded": loaded,
        "peak": peak(),
        "step": statistics.median(times[1:]),
        "fastest": min(times[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.tokens)))
        return
    found: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for _ in range(options.rounds):
        for method in options.methods:
            command = [sys.executable, "-m", "benchmarks.qlora", "--one", method]
            command += ["--steps", str(options.steps), "--tokens", str(options.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[method].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(method, found[method][-1], file=sys.stderr, flush=True)
    print(
        "| method | weights MiB | peak RSS MiB, loaded | peak RSS MiB, trained | step s, median "
        "| fastest |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for method, values in found.items():
        middle = {key: statistics.median(value[key] for value in values) for key in values[0]}
        print(
            f"| {method} | {middle['weights']:.0f} | {middle['loaded']:.0f} | "
            f"{middle['peak']:.0f} | {middle['step']:.2f} | "
            f"{min(value['fastest'] for value in values):.2f} |"
        )


if __name__ == "__main__":
    main()
