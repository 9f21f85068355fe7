"""Exchanging the adapter of a merged model, and batches whose rows use different adapters.

    python -m benchmarks.adapters [--rounds 9] [--threads 1]

SmolLM2-135M-Instruct in float32, every linear layer of the blocks adapted with r = 8. Switches of a
merged model: `set_adapter` between adapters in memory, `swap_adapter` from folders, and PEFT's
``unmerge_adapter``, ``set_adapter``, ``merge_adapter``; each result is compared with a fresh merge.
Rows: four prompts of 64 tokens with three adapters and the base, `adapter_per_row` beside PEFT's
``adapter_names``, and one adapter for all rows. Methods take turns; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.weights import smollm2
from lightning_lora import (
    adapter_per_row,
    add_adapter,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    swap_adapter,
    unmerge_lora,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ("first", "second", "third")


def load() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


def write(folder: Path) -> None:
    for seed, name in enumerate(NAMES):
        model = load()
        inject_lora(model, r=8, alpha=16, target_modules=TARGETS, seed=seed)
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("lora.B"):
                torch.nn.init.normal_(parameter, std=0.02)
        save_adapter(model, folder / name)


def fresh_merge(folder: Path) -> dict[str, torch.Tensor]:
    model = load()
    load_adapter(model, folder)
    merge_lora(model)
    return dict(model.state_dict())


def differences(model: Any, expected: dict[str, torch.Tensor]) -> int:
    """How many elements of the weights differ from those of a fresh merge."""
    found = {name.replace("base_layer.", ""): t for name, t in model.state_dict().items()}
    return sum(int((found[name] != value).sum()) for name, value in expected.items())


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def switches(folder: Path, rounds: int) -> dict[str, Any]:
    import peft

    ours, swapped, theirs = load(), load(), load()
    for name in NAMES:
        add_adapter(ours, name, folder / name)
    load_adapter(swapped, folder / NAMES[0])
    theirs = peft.PeftModel.from_pretrained(theirs, folder / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        theirs.load_adapter(folder / name, adapter_name=name)
    merge_lora(ours)
    merge_lora(swapped)
    theirs.merge_adapter()

    def peft_switch(name: str) -> None:
        theirs.unmerge_adapter()
        theirs.set_adapter(name)
        theirs.merge_adapter()

    methods: dict[str, Callable[[str], object]] = {
        "set_adapter": lambda name: set_adapter(ours, name),
        "swap_adapter": lambda name: swap_adapter(swapped, folder / name),
        "peft": peft_switch,
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(1, rounds + 2):
        name = NAMES[number % len(NAMES)]
        for method, switch in methods.items():
            times[method].append(timed(lambda switch=switch, name=name: switch(name)))
    expected = fresh_merge(folder / name)
    return {
        "ms": {method: round(statistics.median(own[1:]), 1) for method, own in times.items()},
        "elements unlike a fresh merge": {
            "set_adapter": differences(ours, expected),
            "swap_adapter": differences(swapped, expected),
            "peft": differences(theirs.base_model.model, expected),
        },
        "of": sum(value.numel() for value in expected.values()),
    }


@torch.no_grad()
def rows(folder: Path, rounds: int) -> dict[str, Any]:
    import peft

    ours, theirs = load(), load()
    for name in NAMES:
        add_adapter(ours, name, folder / name)
    theirs = peft.PeftModel.from_pretrained(theirs, folder / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        theirs.load_adapter(folder / name, adapter_name=name)
    theirs.eval()
    unmerge_lora(ours)
    ids = torch.randint(0, 40_000, (4, 64), generator=torch.Generator().manual_seed(0))
    names = [*NAMES, "__base__"]
    times: dict[str, list[float]] = {"per row": [], "peft per row": [], "one adapter": []}
    context = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with adapter_per_row(ours, names):
            context.append(1000 * (time.perf_counter() - start))
            times["per row"].append(timed(lambda: ours(input_ids=ids)))
            found = ours(input_ids=ids).logits
        times["one adapter"].append(timed(lambda: ours(input_ids=ids)))
        times["peft per row"].append(timed(lambda: theirs(input_ids=ids, adapter_names=names)))
    expected = theirs(input_ids=ids, adapter_names=names).logits
    return {
        "ms": {method: round(statistics.median(own[1:]), 1) for method, own in times.items()},
        "entering the context, ms": round(statistics.median(context[1:]), 1),
        "largest difference of logits from PEFT's": float((found - expected).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        print(json.dumps({"switches": switches(Path(folder), options.rounds)}), flush=True)
        print(json.dumps({"rows": rows(Path(folder), options.rounds)}), flush=True)


if __name__ == "__main__":
    main()
