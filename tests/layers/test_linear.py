from __future__ import annotations

import copy
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_lora import inject_lora
from lightning_lora.dropout import draw_dropped, zero_dropped
from lightning_lora.layers import LoRALinear
from tests.models import mlp, shake


def pair(
    dtype: torch.dtype = torch.float32, bias: bool = True, **settings: Any
) -> tuple[nn.Linear, LoRALinear]:
    """A plain layer and its adapted copy, the factors as they are at first."""
    torch.manual_seed(0)
    plain = nn.Linear(16, 12, bias=bias, dtype=dtype)
    holder = nn.Sequential(copy.deepcopy(plain))
    options = {"r": 4, "alpha": 10, "target_modules": ["0"], **settings}
    inject_lora(holder, **options)
    layer = holder[0]
    assert type(layer) is LoRALinear
    return plain, layer


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)


INPUTS = {
    "1-d": lambda x: x[0, 0],
    "2-d": lambda x: x[0],
    "3-d": lambda x: x,
    "4-d": lambda x: x[None],
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 1],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("arrange", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_at_first_the_output_is_bitwise_that_of_the_base(
    arrange: Any, dtype: torch.dtype, autocast: bool, bias: bool
) -> None:
    plain, layer = pair(dtype, bias)
    # torch's own linear rounds differently with a weight that trains; the base is frozen.
    plain.requires_grad_(False)
    x = arrange(torch.randn(3, 5, 16, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, out = plain(x), layer(x)
        with torch.no_grad():
            evaluated = layer(x)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(evaluated), bits(expected))
    shake(layer)
    assert x.numel() == 0 or not torch.equal(layer(x), expected)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 2.5), (True, 5.0)])
def test_the_formula(use_rslora: bool, scaling: float) -> None:
    plain, layer = pair(torch.float64, use_rslora=use_rslora)
    shake(layer)
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = plain(x) + scaling * x @ layer.lora.A.T @ layer.lora.B.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta_weight(), scaling * layer.lora.B @ layer.lora.A)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_trains_and_rests(p: float) -> None:
    plain, layer = pair(torch.float64, dropout=p)
    shake(layer)
    x = torch.randn(30, 16, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    kept = zero_dropped(x, draw_dropped(x, p)) / (1 - p)
    torch.testing.assert_close(first, plain(x) + 2.5 * kept @ layer.lora.A.T @ layer.lora.B.T)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    layer.eval()
    whole = plain(x) + 2.5 * x @ layer.lora.A.T @ layer.lora.B.T
    torch.testing.assert_close(layer(x), whole)
    assert torch.equal(layer(x), layer(x))


def test_dropout_keeps_the_mean() -> None:
    _, layer = pair(dropout=0.3)
    shake(layer)
    x = torch.randn(2, 16)
    torch.manual_seed(0)
    mean = layer(x.repeat(20_000, 1)).reshape(-1, 2, 12).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x), rtol=0.02, atol=0.05)


def test_the_base_trains_too_where_it_is_asked_to() -> None:
    plain, layer = pair()
    shake(layer)
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    x = torch.randn(5, 16)
    layer(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert layer.lora.A.grad is not None


def test_the_bias_alone() -> None:
    plain, layer = pair()
    layer.bias.requires_grad_()
    x = torch.randn(5, 16)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradient_checkpointing_of_a_model(use_reentrant: bool, autocast: bool) -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6, dropout=0.2)
    shake(model)
    x = torch.randn(4, 6, requires_grad=True)

    def grads(checkpointed: bool) -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run = partial(checkpoint, model, use_reentrant=use_reentrant) if checkpointed else model
            out = run(x)
        out.float().square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = [g.clone() for g in grads(False) if g is not None]
    actual = [g for g in grads(True) if g is not None]
    assert len(actual) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_compiled_model(dropout: float) -> None:
    torch._dynamo.reset()
    model = mlp()
    inject_lora(model, r=2, alpha=6, dropout=dropout)
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(grads) == 6
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    model.train().zero_grad()
    if not dropout:
        model(x).square().sum().backward()
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(grads, expected)


def test_hooks_and_changes_in_place() -> None:
    _, layer = pair()
    shake(layer)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    layer.register_forward_hook(lambda m, a, out: seen.append("forward") or out * 2)
    plain, x = nn.Linear(16, 12), torch.randn(3, 16, requires_grad=True)
    plain.weight.data = (layer.weight + layer.delta_weight()).detach()
    plain.bias.data = layer.bias.detach()
    out, expected = layer(x), 2 * plain(x)
    out += 1
    nn.functional.relu_(out)
    torch.testing.assert_close(out, (expected + 1).relu())
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer(x).sum().backward()
    assert seen == ["pre", "forward", "pre", "forward", "backward"]
    assert layer.lora.B.grad is not None


def test_parameters_keep_their_names() -> None:
    _, layer = pair()
    assert list(layer.state_dict()) == ["weight", "bias", "lora.A", "lora.B"]
    assert isinstance(layer, nn.Linear)


def _train(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2
    )
    model = mlp()
    inject_lora(model, r=2, alpha=6, seed=4)
    shake(model)
    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    wrapped = DistributedDataParallel(model)
    wrapped(data[4 * rank : 4 * rank + 4]).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save(grads, f"{path}/{rank}.pt")
    while not Path(f"{path}/{1 - rank}.pt").exists():
        time.sleep(0.02)
    # Once in a while gloo's threads abort a process that tears its group down.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_distributed_data_parallel_averages_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    model = mlp()
    inject_lora(model, r=2, alpha=6, seed=4)
    shake(model)
    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    model(data).square().mean().backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert list(expected) == list(ranks[0]) and len(expected) == 6
    for name, grad in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], grad)
