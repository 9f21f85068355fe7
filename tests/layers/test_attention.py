"""LoRA on PyTorch's own attention, which reads weights instead of calling layers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    load_adapter,
    load_adapter_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.errors import CheckpointError, TargetError
from lightning_lora.layers import LoRAMultiheadAttention
from tests.models import AttentionNet, assert_same, shake, snapshot

# Options of the attention, and the widths of keys and values.
KINDS: dict[str, tuple[dict[str, Any], int, int]] = {
    "packed": ({}, 8, 8),
    "not batch first": ({"batch_first": False}, 8, 8),
    "without bias": ({"bias": False}, 8, 8),
    "extra keys": ({"add_bias_kv": True, "add_zero_attn": True}, 8, 8),
    "separate": ({"kdim": 5, "vdim": 6}, 5, 6),
    "separate, without bias": ({"kdim": 8, "vdim": 6, "bias": False}, 8, 6),
}
PRESETS = ["qv", "attention"]


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.widths = KINDS[kind][1:]
        self.attn = nn.MultiheadAttention(8, 2, **{"batch_first": True, **KINDS[kind][0]})
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: tuple[Tensor, ...], **options: Any) -> Tensor:
        out, weights = self.attn(*inputs, **options)
        extra: Tensor = 0.0 if weights is None else weights.sum() * 0.1
        return self.head(out) + extra  # type: ignore[no-any-return]


def network(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Net, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    net = Net(kind).to(dtype).eval().requires_grad_(False)
    nn.init.normal_(net.attn.out_proj.weight)
    key, value = (torch.randn(2, 5, width, dtype=dtype) for width in net.widths)
    query = torch.randn(2, 5, 8, dtype=dtype)
    # Self-attention where it can be: that is what has a fast path.
    return net, (
        (query, query, query) if kind != "packed" and net.widths == (8, 8) else (query, key, value)
    )


MASKS: list[dict[str, Any]] = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    {"attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": False, "is_causal": True},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_the_output_is_that_of_the_base(
    kind: str, preset: str, dtype: torch.dtype
) -> None:
    net, inputs = network(kind, dtype)
    masks = [m for m in MASKS if kind != "not batch first" or "key_padding_mask" not in m]
    with torch.no_grad():
        expected = [net(inputs, **mask) for mask in masks]
        inject_lora(net, r=2, alpha=5, target_modules=preset)
        assert type(net.attn) is LoRAMultiheadAttention
        for mask, out in zip(masks, expected, strict=True):
            assert torch.equal(net(inputs, **mask), out)
    if dtype == torch.float32:
        torch.testing.assert_close(net(inputs), expected[0])
    shake(net)
    assert not torch.allclose(net(inputs), expected[0], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_formula_and_its_gradients(kind: str, preset: str) -> None:
    net, inputs = network(kind, torch.float64)
    plain = copy.deepcopy(net.attn)
    inject_lora(net, r=2, alpha=5, target_modules=preset)
    shake(net)
    attention: Any = net.attn
    A, B = (f.detach().clone().requires_grad_() for f in attention.lora.parameters())
    # The update of each of W_q, W_k and W_v.
    parts = "qv" if preset == "qv" else "qkv"
    packed = plain.in_proj_weight is not None
    if packed and preset == "qv":
        pairs = zip(A.chunk(2), B.chunk(2), strict=True)
    elif packed:
        pairs = ((A, b) for b in B.chunk(3))  # type: ignore[assignment]
    else:
        widths = {"q": 8, "k": net.widths[0], "v": net.widths[1]}
        columns = A.split([widths[part] for part in parts], dim=1)
        pairs = zip(columns, B.split(8), strict=True)
    deltas = {part: 2.5 * b @ a for part, (a, b) in zip(parts, pairs, strict=True)}
    weights: dict[str, Tensor]
    if packed:
        whole = torch.cat([deltas.get(part, torch.zeros(8, 8).double()) for part in "qkv"])
        weights = {"in_proj_weight": plain.in_proj_weight + whole}
    else:
        base = {part: getattr(plain, f"{part}_proj_weight") for part in parts}
        weights = {f"{part}_proj_weight": base[part] + deltas[part] for part in parts}
    C = D = None
    if preset == "attention":
        C, D = (f.detach().clone().requires_grad_() for f in attention.out_proj.lora.parameters())
        weights["out_proj.weight"] = plain.out_proj.weight + 2.5 * D @ C
    theirs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    ours = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    expected = torch.func.functional_call(plain, weights, theirs)[0]
    out = attention(*ours)[0]
    torch.testing.assert_close(out, expected)
    seeds = torch.randn(out.shape, dtype=torch.float64)
    (out * seeds).sum().backward()
    (expected * seeds).sum().backward()
    mine = [attention.lora.A, attention.lora.B, *ours]
    yours = [A, B, *theirs]
    if C is not None and D is not None:
        mine, yours = [*mine, *attention.out_proj.lora.parameters()], [*yours, C, D]
    for left, right in zip(mine, yours, strict=True):
        torch.testing.assert_close(left.grad, right.grad)
    for name, delta in attention.delta_weights().items():
        torch.testing.assert_close(delta, weights[name] - getattr(plain, name))


def test_separate_projections_draw_with_their_own_widths() -> None:
    net = nn.Module()
    net.attn = nn.MultiheadAttention(64, 2, kdim=1024, vdim=256)
    inject_lora(net, r=32, alpha=8, target_modules=["attn"])
    parts = net.attn.lora.A.split([64, 1024, 256], dim=1)
    for part in parts:
        bound = part.shape[1] ** -0.5
        assert 0.98 * bound < part.abs().max() <= bound


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "separate", "without bias"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_from_injection_to_removal(kind: str, preset: str, duplicate: Any) -> None:
    net, inputs = network(kind)
    base, before, original = net(inputs), snapshot(net), net.attn
    inject_lora(net, r=2, alpha=5, target_modules=preset)
    shake(net)
    adapted = net(inputs)
    assert not torch.allclose(adapted, base, atol=1e-2)
    assert torch.equal(duplicate(net)(inputs), adapted)
    again, _ = network(kind)
    inject_lora(again, r=2, alpha=5, target_modules=preset)
    load_adapter_state_dict(again, adapter_state_dict(net))
    assert torch.equal(again(inputs), adapted)
    merge_lora(net)
    assert type(net.attn) is nn.MultiheadAttention
    assert type(net.attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    merged = net(inputs)
    torch.testing.assert_close(merged, adapted)
    assert torch.equal(duplicate(net)(inputs), merged)
    changed = {
        name
        for name, tensor in snapshot(net).items()
        if name in before and not (torch.equal(tensor, before[name]))
    }
    expected = (
        {"attn.in_proj_weight"}
        if net.widths == (8, 8)
        else {f"attn.{part}_proj_weight" for part in ("qv" if preset == "qv" else "qkv")}
    )
    assert changed == expected | ({"attn.out_proj.weight"} if preset == "attention" else set())
    unmerge_lora(net)
    assert torch.equal(net(inputs), adapted)
    remove_lora(net)
    assert net.attn is original
    assert_same(before, snapshot(net))
    assert torch.equal(net(inputs), base)


def test_half_precision_merges_to_what_it_computed() -> None:
    net, inputs = network("packed", torch.bfloat16)
    inject_lora(net, r=2, alpha=5, target_modules="attention")
    shake(net)
    with torch.no_grad():
        adapted = net(inputs)
        merge_lora(net)
        assert torch.equal(net(inputs), adapted)


def test_under_autocast_the_update_is_in_full_precision() -> None:
    net, inputs = network("packed")
    inject_lora(net, r=2, alpha=5, target_modules="attention")
    shake(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        adapted = net(inputs)
    merge_lora(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(inputs), adapted)


def test_an_encoder_trains_and_its_fast_path_sees_the_update() -> None:
    torch.manual_seed(0)
    model, x = AttentionNet(), torch.randn(2, 5, 8)
    inject_lora(model, r=2, alpha=5, target_modules="qv")
    shake(model)
    model(x).square().sum().backward()
    factors = [p for n, p in model.named_parameters() if "lora" in n]
    assert len(factors) == 6 and all(p.grad is not None and p.grad.any() for p in factors)
    with torch.no_grad():
        trained, evaluated = model(x), model.eval()(x)
    torch.testing.assert_close(evaluated, trained)
    merge_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), evaluated)


def test_dropout_is_refused() -> None:
    net, _ = network("packed")
    with pytest.raises(TargetError, match="no place for dropout"):
        inject_lora(net, r=2, dropout=0.1, target_modules=["attn"])


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    net, inputs = network("packed")
    inject_lora(net, r=2, alpha=5, target_modules="attention")
    shake(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), net(inputs))


def count_output_once(peft: Any, attention: Any) -> None:
    """Undo that PEFT adds the update of the output projection twice (huggingface/peft, pull request
    3774), in the versions that do.
    """
    probe = nn.Sequential()
    probe.add_module("attn", nn.MultiheadAttention(4, 1, bias=False))
    settings = peft.LoraConfig(r=1, target_modules=["attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(probe), settings)
    update = adapted.base_model.model.attn.base_layer.out_proj.get_delta_weight("default")
    merged = adapted.merge_and_unload().attn.out_proj.weight
    times = ((merged - probe.attn.out_proj.weight) / update).mean()
    attention.base_layer.out_proj.scaling["default"] /= round(float(times))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "without bias", "not batch first"])
@pytest.mark.parametrize("targets", ["qv", "attention", ["attn"]])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_reads_what_is_saved_and_the_other_way_round(
    kind: str, targets: Any, use_rslora: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    net, inputs = network(kind)
    base = net(inputs)
    inject_lora(net, r=2, alpha=5, target_modules=targets, use_rslora=use_rslora)
    shake(net)
    adapted = net(inputs)
    assert not torch.allclose(adapted, base, atol=1e-2)
    save_adapter(net, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(network(kind)[0], tmp_path / "ours").eval()
    count_output_once(peft, theirs.base_model.model.attn)
    torch.testing.assert_close(theirs(inputs), adapted, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        again, _ = network(kind)
        load_adapter(again, tmp_path / name)
        torch.testing.assert_close(again(inputs), adapted, atol=1e-5, rtol=1e-5)


def test_what_peft_cannot_express_is_not_exported(tmp_path: Path) -> None:
    net, _ = network("separate")
    inject_lora(net, r=2, alpha=5, target_modules="attention")
    with pytest.raises(CheckpointError, match="separate weights"):
        save_adapter(net, tmp_path / "adapter")
    net, _ = network("packed")
    inject_lora(net, r=2, alpha=5, target_modules="attention", rank_pattern={"out_proj": 3})
    with pytest.raises(CheckpointError, match="one rank and alpha for 'attn' and its output"):
        save_adapter(net, tmp_path / "adapter")
