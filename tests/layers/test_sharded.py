"""Every layer kind under `fully_shard`, on two processes, against the same model in one."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import inject_lora, merge_lora, unmerge_lora
from lightning_lora.layers import LoRAFactors
from lightning_lora.sharded import whole
from tests.models import hugging_face, shake

TOKENS = torch.arange(3, 21).reshape(2, 9)


class Net(nn.Module):
    """A layer and a head."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            key, value = x[..., : self.layer.kdim], x[..., : self.layer.vdim]
            hidden = self.layer(x, key, value)[0]
        else:
            hidden = self.layer(x)
        out: Tensor = self.head(hidden.flatten(2).mean(-1) if hidden.ndim == 4 else hidden)
        return out


class Logits(nn.Module):
    """A language model of transformers that returns a tensor."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.model = hugging_face(architecture)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=x).logits
        return logits


def attention(**options: Any) -> nn.Module:
    return Net(nn.MultiheadAttention(8, 2, batch_first=True, **options), 8)


# A model, what it adapts, and the shape of its input, or tokens.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "convolution": (lambda: Net(nn.Conv2d(4, 8, 3, groups=2), 8), ["layer"], (2, 4, 6, 6)),
    "embedding": (lambda: Net(nn.Embedding(23, 6, padding_idx=3), 6), ["layer"], None),
    "attention": (attention, "attention", (2, 5, 8)),
    "query and value": (attention, "qv", (2, 5, 8)),
    "separate": (lambda: attention(kdim=5, vdim=6), "attention", (2, 5, 8)),
    "c_attn": (lambda: Logits("gpt2"), "qv", None),
    "query_key_value": (lambda: Logits("falcon, groups"), "qv", None),
    "experts": (lambda: Logits("mixtral"), ["experts"], None),
    "linear, dora": (lambda: Net(nn.Linear(8, 6), 6), ["layer"], (2, 5, 8)),
    "Conv1D, dora": (lambda: Logits("gpt2"), ["c_attn", "c_fc"], None),
    "convolution, dora": (lambda: Net(nn.Conv2d(4, 8, 3, groups=2), 8), ["layer"], (2, 4, 6, 6)),
    "embedding, dora": (lambda: Net(nn.Embedding(23, 6, padding_idx=3), 6), ["layer"], None),
}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def compare(case: str, mesh: Any) -> dict[str, float]:
    """The largest differences between a sharded model and a whole one, gradients in relation to
    their size.
    """
    from torch.distributed.fsdp import fully_shard

    make, targets, shape = CASES[case]
    torch.manual_seed(0)
    model, x = make(), TOKENS if shape is None else torch.randn(shape)
    inject_lora(model, r=3, alpha=7, target_modules=targets, use_dora=case.endswith("dora"))
    shake(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".magnitude"):
            parameter.data *= torch.linspace(0.7, 1.5, len(parameter))
    reference = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, LoRAFactors):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def difference() -> float:
        return float((model(x) - reference(x)).detach().abs().max())

    found = {"output": difference()}
    for each in (model, reference):
        each(x).square().sum().backward()
    found["gradient"] = 0.0
    ours, theirs = trained(model), trained(reference)
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert parameter.grad is not None and ours[name].grad is not None
        gap = (whole(ours[name].grad) - parameter.grad).abs().max() / parameter.grad.abs().max()
        found["gradient"] = max(found["gradient"], float(gap))
    with torch.no_grad():
        before = model(x)
        merge_lora(model)
        merge_lora(reference)
        found["merged"] = difference()
        found["merge"] = float((model(x) - before).abs().max())
        unmerge_lora(model)
        unmerge_lora(reference)
        found["unmerged"] = float((model(x) - before).abs().max())
    return found


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    torch.save({case: compare(case, mesh) for case in CASES}, f"{folder}/{rank}.pt")
    while not Path(f"{folder}/{1 - rank}.pt").exists():
        time.sleep(0.02)
    # Once in a while gloo's threads abort a process that tears its group down.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_every_layer_kind_computes_and_merges_the_same_when_it_is_sharded(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found) == list(CASES)
        for case, gaps in found.items():
            assert gaps["unmerged"] == 0, case
            assert max(gaps.values()) < 1e-4, (case, gaps)
