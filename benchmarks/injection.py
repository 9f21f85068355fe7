"""Time to adapt a model in the shape of Llama-70B on the meta device, ours and PEFT's.

python -m benchmarks.injection [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.peers import ALPHA, PROJECTIONS, R, machine


def llama_70b() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def ours(model: Any) -> None:
    from lightning_lora import inject_lora

    inject_lora(model, r=R, alpha=ALPHA, target_modules=PROJECTIONS)


def ours_by_preset(model: Any) -> None:
    from lightning_lora import inject_lora

    inject_lora(model, r=R, alpha=ALPHA)


def peft(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=PROJECTIONS))


METHODS = {"ours": ours, 'ours, "all-linear"': ours_by_preset, "PEFT": peft}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(options.rounds + 1):
        for name, adapt in METHODS.items():
            model = llama_70b()
            start = time.perf_counter()
            adapt(model)
            times[name].append(time.perf_counter() - start)
    print(f"560 linear layers of a Llama-70B on the meta device; {machine('cpu')}\n")
    print("| method | ms, median | fastest | PEFT / it |")
    print("| --- | --- | --- | --- |")
    # The first round imports.
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, middle in medians.items():
        print(
            f"| {name} | {1000 * middle:.0f} | {1000 * min(times[name]):.0f} | "
            f"{medians['PEFT'] / middle:.1f} |"
        )


if __name__ == "__main__":
    main()
