"""LoRA on convolutions of one, two and three dimensions."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_lora import (
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.dropout import draw_dropped, zero_dropped
from lightning_lora.errors import CheckpointError, TargetError
from lightning_lora.layers import LoRAConv1d, LoRAConv2d, LoRAConv3d
from tests.models import assert_same, shake, snapshot

KINDS = {1: (nn.Conv1d, LoRAConv1d), 2: (nn.Conv2d, LoRAConv2d), 3: (nn.Conv3d, LoRAConv3d)}
OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "groups": 2, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 2, "groups": 4, "padding_mode": "circular", "padding": 1},
]
both = pytest.mark.parametrize("dims", KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(dims: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """A plain layer and its adapted copy, the factors as they are at first."""
    torch.manual_seed(0)
    lora = {key: options.pop(key) for key in ("dropout", "use_rslora") if key in options}
    plain = KINDS[dims][0](4, 8, **options, dtype=dtype).requires_grad_(False)
    holder = nn.Sequential(copy.deepcopy(plain))
    inject_lora(holder, r=3, alpha=7, target_modules=["0"], **lora)
    assert type(holder[0]) is KINDS[dims][1]
    return plain, holder[0]


def image(dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, *(6, 5, 7)[:dims], dtype=dtype)


@both
@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_at_first_the_output_is_that_of_the_base(
    dims: int, options: dict[str, Any], dtype: torch.dtype, autocast: bool
) -> None:
    plain, layer = pair(dims, dtype, **options)
    x = image(dims, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, out = plain(x), layer(x)
        assert torch.equal(out, expected) and out.dtype == expected.dtype
        torch.testing.assert_close(layer(x[0]), plain(x[0]), rtol=1e-2, atol=1e-2)
    shake(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not torch.allclose(layer(x), expected, atol=1e-2)


@both
@every_option
def test_the_formula_and_its_gradients(dims: int, options: dict[str, Any]) -> None:
    plain, layer = pair(dims, torch.float64, **options)
    shake(layer)
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora.A, layer.lora.B))
    groups = options.get("groups", 1)
    # Group by group, the update of the weight is B times A.
    deltas = [
        (b.flatten(1) @ a.flatten(1)).reshape(-1, *a.shape[1:])
        for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)
    ]
    delta = 7 / 3 * torch.cat(deltas)
    x = image(dims, torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected = plain._conv_forward(y, plain.weight + delta, plain.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta_weight(), delta)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in ((x, y), (layer.lora.A, A), (layer.lora.B, B)):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_trains_and_rests(p: float) -> None:
    plain, layer = pair(2, torch.float64, kernel_size=3, dropout=p)
    shake(layer)
    x = image(2, torch.float64)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    kept = zero_dropped(x, draw_dropped(x, p)) / (1 - p)
    expected = plain(x) + 7 / 3 * F.conv2d(F.conv2d(kept, layer.lora.A), layer.lora.B)
    torch.testing.assert_close(out, expected)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(
        layer(x), F.conv2d(x, plain.weight + layer.delta_weight()) + (plain.bias[:, None, None])
    )


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, **options), nn.Flatten()
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_from_injection_to_removal(duplicate: Any) -> None:
    model, x = network(groups=2), image(2)
    base, before, layers = model(x), snapshot(model), list(model)
    inject_lora(model, r=3, alpha=7, target_modules=["0", "2"])
    shake(model)
    adapted = model(x)
    assert torch.equal(duplicate(model)(x), adapted)
    assert not torch.allclose(adapted, base, atol=1e-2)
    merge_lora(model)
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), adapted, atol=1e-4, rtol=1e-4)
    unmerge_lora(model)
    assert torch.equal(model(x), adapted)
    remove_lora(model)
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert_same(before, snapshot(model))


def test_presets_leave_convolutions_alone() -> None:
    model = nn.Sequential(network(), nn.Linear(96, 2))
    assert [t.name for t in inject_lora(model, r=2).targets] == ["1"]


class Net(nn.Module):
    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        self.conv = KINDS[dims][0](4, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def net(dims: int, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(dims, **options)


@torch.no_grad()
@both
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": 2, "groups": 4},
    ],
    ids=str,
)
def test_peft_computes_the_same_from_the_export(
    dims: int, use_rslora: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model, x = net(dims, **options), image(dims)
    base = model(x)
    inject_lora(model, r=3, alpha=7, target_modules=["conv"], use_rslora=use_rslora)
    shake(model)
    adapted = model(x)
    assert not torch.allclose(adapted, base, atol=1e-2)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(dims, **options), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), adapted, atol=1e-5, rtol=1e-5)
    again = net(dims, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    plan = load_adapter(again, tmp_path / "theirs")
    assert [target.r for target in plan.targets] == [3]
    torch.testing.assert_close(again(x), adapted, atol=1e-5, rtol=1e-5)
    merge_lora(again)
    torch.testing.assert_close(again(x), adapted, atol=1e-5, rtol=1e-5)


def test_a_grouped_convolution_of_peft_that_mixes_groups_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["conv"])
    peft.get_peft_model(net(2, kernel_size=3, groups=2), settings).save_pretrained(tmp_path)
    model = net(2, kernel_size=3, groups=2)
    with pytest.raises(CheckpointError, match="'conv', a convolution with 2 groups, use the chan"):
        load_adapter(model, tmp_path)
    assert type(model.conv) is nn.Conv2d


def test_other_layers_keep_their_ranks_beside_a_grouped_convolution(tmp_path: Path) -> None:
    def two() -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 6, 1))

    model, x = two(), torch.randn(2, 4, 9)
    inject_lora(
        model,
        r=3,
        alpha=7,
        target_modules=["0", "1"],
        rank_pattern={"0": 2},
        alpha_pattern={"1": 5},
    )
    shake(model)
    save_adapter(model, tmp_path)
    again = two()
    plan = load_adapter(again, tmp_path)
    assert [(t.r, t.scaling) for t in plan.targets] == [(2, 3.5), (3, 5 / 3)]
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_what_peft_would_compute_otherwise_is_not_exported(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = net(2, kernel_size=3, **options)
    inject_lora(model, r=3, alpha=7, target_modules=["conv"])
    with pytest.raises(CheckpointError, match="PEFT leaves dilation and padding_mode out"):
        save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_subclass_that_changes_what_its_forward_does_with_the_weight() -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    with pytest.raises(TargetError, match="Standardized is not a supported layer type"):
        inject_lora(nn.Sequential(Standardized(2, 2, 3)), r=2, target_modules=["0"])


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, x = network(), image(2)
    inject_lora(model, r=2, alpha=6, target_modules=["0", "2"])
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
