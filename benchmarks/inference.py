"""Time of a forward pass without gradients: merged and unmerged, ours and PEFT's, over the base.

python -m benchmarks.inference [--rounds 25] [--tokens 256] [--dtype float32]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import PROJECTIONS, R, llama, machine, ours, peft
from benchmarks.step_time import measure, ratio
from lightning_lora import merge_lora


def base(model: Any) -> Any:
    return model


def unmerged(model: Any) -> Any:
    ours(model, targets=PROJECTIONS, r=R, dropout=0.0)
    return model


def merged(model: Any) -> Any:
    classes = [type(module) for module in model.modules()]
    unmerged(model)
    merge_lora(model)
    modules = [m for n, m in model.named_modules() if not n.endswith(".lora")]
    assert [type(module) for module in modules] == classes
    return model


def peft_unmerged(model: Any) -> Any:
    peft(model, targets=PROJECTIONS, r=R, dropout=0.0)
    return model


def peft_merged(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=R, target_modules=PROJECTIONS))
    return wrapped.merge_and_unload()


METHODS: dict[str, Callable[[Any], Any]] = {
    "base": base,
    "ours, merged": merged,
    "PEFT, merged and unloaded": peft_merged,
    "ours, unmerged": unmerged,
    "PEFT, unmerged": peft_unmerged,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(0, 1024, (1, options.tokens), device=options.device)

    def build(prepare: Callable[[Any], Any]) -> Callable[[], None]:
        model = llama(options.layers).to(options.device, getattr(torch, options.dtype))
        model = prepare(model).eval()

        @torch.no_grad()
        def step() -> None:
            model(input_ids=ids)

        return step

    steps = {name: build(prepare) for name, prepare in METHODS.items()}
    times = measure(steps, options.rounds, options.device)
    print(
        f"Llama 576 wide, {options.layers} layers, {options.tokens} tokens, {options.dtype}; "
        f"{machine(options.device)}\n"
    )
    print("| model | ms | over the base (quartiles) |")
    print("| --- | --- | --- |")
    for name, values in times.items():
        middle, lower, upper = ratio(values, times["base"])
        print(
            f"| {name} | {1000 * statistics.median(values):.1f} | "
            f"{middle:.3f} ({lower:.3f}-{upper:.3f}) |"
        )


if __name__ == "__main__":
    main()
