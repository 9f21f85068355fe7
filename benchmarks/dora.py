"""The step time of DoRA, with PEFT's beside it, and LoRA's own.

    python -m benchmarks.dora
    python -m benchmarks.dora --layers 4 --tokens 1024 --rounds 15 --cases float32 bfloat16

A Llama of the shape of SmolLM2-135M (576 wide) with random weights, every linear layer adapted with
r = 8; forward, backward and a fused AdamW. Methods take turns step by step in one process, so that
whatever else the machine does falls on all of them; medians, and ratios to PEFT's DoRA.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_lora import inject_lora

R, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# dtype of the weights, autocast, dropout of the adapter's input
CASES: dict[str, tuple[torch.dtype, bool, float]] = {
    "float32": (torch.float32, False, 0.0),
    "float32, dropout": (torch.float32, False, 0.05),
    "bfloat16": (torch.bfloat16, False, 0.0),
    "autocast": (torch.float32, True, 0.0),
}


def base(layers: int, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).to(dtype)


def methods(model: Any, dropout: float) -> dict[str, nn.Module]:
    import peft

    found: dict[str, nn.Module] = {}
    for name, use_dora in (("dora", True), ("lora", False)):
        found[name] = copy.deepcopy(model)
        settings: dict[str, Any] = {"r": R, "alpha": ALPHA, "dropout": dropout}
        inject_lora(found[name], target_modules=TARGETS, use_dora=use_dora, **settings)
        config = peft.LoraConfig(
            r=R,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            target_modules=TARGETS,
            use_dora=use_dora,
        )
        found[f"peft {name}"] = peft.get_peft_model(copy.deepcopy(model), config)
    return {name: each.train() for name, each in found.items()}


def step_of(
    model: nn.Module, ids: torch.Tensor, autocast: bool
) -> Callable[[], tuple[float, float]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        forward = time.perf_counter()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return forward - start, time.perf_counter() - start

    return step


def kept(model: nn.Module, ids: torch.Tensor, autocast: bool) -> float:
    """MiB that autograd keeps for a backward pass, beside the model's own tensors."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def measure(case: str, layers: int, tokens: int, rounds: int) -> dict[str, Any]:
    dtype, autocast, dropout = CASES[case]
    ids = torch.randint(0, 4096, (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    models = methods(base(layers, dtype), dropout)
    steps = {name: step_of(model, ids, autocast) for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            taken = step()
            if number >= 2:
                times[name].append(taken)
    row: dict[str, Any] = {"case": case}
    for name, taken in times.items():
        for part, values in zip(("forward", "step"), zip(*taken, strict=True), strict=True):
            row[f"{name} {part} ms"] = round(1000 * statistics.median(values), 1)
    for name, model in models.items():
        row[f"{name} kept MiB"] = round(kept(model, ids, autocast), 1)
    for part in ("forward", "step"):
        ratios = [
            ours[part == "step"] / theirs[part == "step"]
            for ours, theirs in zip(times["dora"], times["peft dora"], strict=True)
        ]
        row[f"{part} dora / peft dora"] = round(statistics.median(ratios), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="a multiple of 256")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for case in options.cases:
        row = measure(case, options.layers, options.tokens, options.rounds)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
