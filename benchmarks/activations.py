"""What a forward pass keeps for its backward pass, ours and PEFT's, beyond the frozen model.

    python -m benchmarks.activations [--tokens 1024] [--layers 4]

Storages that autograd saves, each once, parameters left aside. The floor is the frozen model with
gradients that flow to its input. Nothing is timed, so that the figures are the same everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

import torch

from benchmarks.peers import METHODS, PROJECTIONS, llama
from benchmarks.step_time import SETTINGS, Setting
from lightning_lora.freezing import cast_frozen

NAMES = ("fp32", "bf16", "autocast", "autocast, frozen_dtype", "fp32, dropout", "bf16, dropout")


def kept(method: str, setting: Setting, options: Any) -> float:
    """MiB that the second forward pass keeps."""
    model = llama(options.layers).to(setting.dtype)
    METHODS[method](model, targets=PROJECTIONS, r=setting.r, dropout=setting.dropout)
    if setting.frozen_dtype and method == "ours":
        cast_frozen(model, setting.frozen_dtype)
    model.train()
    ids = torch.randint(0, 1024, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    embedded = model.get_input_embeddings()(ids).detach()

    def loss() -> torch.Tensor:
        inputs = embedded.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            return model(inputs_embeds=inputs, labels=ids).loss

    loss().backward()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    total = sum(storages.values()) / 2**20
    del result
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    print(f"MiB kept: Llama 576 wide, {options.layers} layers, {options.tokens} tokens\n")
    methods = ("frozen", "ours", "PEFT", "PEFT, 16-bit factors", "full")
    print(f"| setting | {' | '.join(methods)} | added: ours | PEFT | ours / PEFT |")
    print("| --- |" + " --- |" * (len(methods) + 3))
    for name in NAMES:
        setting = SETTINGS[name]
        with contextlib.redirect_stdout(sys.stderr):
            found = {
                method: kept(method, setting, options)
                for method in methods
                if "16-bit" not in method or setting.dtype.itemsize == 2
            }
        cells = [f"{found[method]:.1f}" if method in found else "" for method in methods]
        added, theirs = found["ours"] - found["frozen"], found["PEFT"] - found["frozen"]
        print(
            f"| {name} | {' | '.join(cells)} | {added:.1f} | {theirs:.1f} | {added / theirs:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
