"""LoRA on lookup tables: plain, padded, scaled, and tied to the head."""

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
    adapter_state_dict,
    inject_lora,
    load_adapter,
    load_adapter_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.errors import TargetError
from lightning_lora.layers import LoRAEmbedding, LoRALayer, adapted_class
from tests.models import TiedHead, assert_same, hugging_face, shake, snapshot

IDS = torch.tensor([[1, 2, 2, 0], [10, 3, 1, 2]])


class Scaled(nn.Embedding):
    """A user's subclass that computes around the lookup."""

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        return 4.0 * super().forward(input + offset)


class OfItsOwn(nn.Embedding):
    """A user's subclass that sometimes looks up by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training else F.embedding(input, self.weight)


class Centred(nn.Embedding):
    """A user's subclass that computes with the table beside the lookup."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - self.weight.mean(0)


class Cast(nn.Embedding):
    """As Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(2.0).to(self.weight.dtype)


def pair(
    kind: type[nn.Embedding] = nn.Embedding, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Embedding, Any]:
    """A plain table and its adapted copy, the factors as they are at first."""
    torch.manual_seed(0)
    plain = kind(11, 6, dtype=dtype, **options)
    holder = nn.Sequential(copy.deepcopy(plain))
    inject_lora(holder, r=4, alpha=10, target_modules=["0"])
    layer = holder[0]
    assert isinstance(layer, LoRAEmbedding)
    return plain, layer


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (8,), (2, 4), (2, 2, 2), (0,)])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}])
def test_at_first_the_output_is_that_of_the_base(
    kind: type[nn.Embedding], dtype: torch.dtype, shape: Any, options: Any
) -> None:
    plain, layer = pair(kind, dtype, **options)
    ids = IDS[0, 1] if shape == () else IDS.flatten()[: 0 if shape == (0,) else None].view(shape)
    expected, out = plain(ids), layer(ids)
    assert torch.equal(out, expected) and out.dtype == expected.dtype
    shake(layer)
    assert layer(ids).shape == (*shape, 6)
    assert ids.numel() == 0 or not torch.allclose(layer(ids), expected)


def test_the_factors_start_as_those_of_loralib_and_peft() -> None:
    holder = nn.Sequential(nn.Embedding(500, 400))
    inject_lora(holder, r=16, alpha=8, target_modules=["0"])
    lora: Any = holder[0].lora
    assert not lora.A.any() and abs(lora.B.std() - 1) < 0.05
    holder[0](torch.tensor([3, 7])).sum().backward()
    assert lora.A.grad.any(0).nonzero().flatten().tolist() == [3, 7]
    assert lora.A.grad[:, 3].abs().max() > 0


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_the_formula_and_its_gradients(options: dict[str, Any]) -> None:
    plain, layer = pair(dtype=torch.float64, **options)
    shake(layer)
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora.A, layer.lora.B))
    expected = plain(IDS) + 2.5 * F.embedding(IDS, A.T, **options) @ B.T
    torch.testing.assert_close(layer(IDS), expected)
    weights = torch.randn(2, 4, 6, dtype=torch.float64)
    (layer(IDS) * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(layer.lora.A.grad, A.grad)
    torch.testing.assert_close(layer.lora.B.grad, B.grad)
    assert layer.lora.A.grad[:, 2].any() == ("padding_idx" not in options)
    torch.testing.assert_close(layer.delta_weight(), 2.5 * (layer.lora.B @ layer.lora.A).T)


def test_a_sparse_table_has_dense_factors() -> None:
    _, layer = pair(sparse=True)
    shake(layer)
    layer(IDS).sum().backward()
    assert not layer.lora.A.grad.is_sparse and layer.weight.grad is None


def test_max_norm_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(11, 6, max_norm=1.0))
    with pytest.raises(TargetError, match="max_norm rescales rows of the base table in place"):
        inject_lora(model, target_modules=["0"])


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_from_injection_to_removal(kind: type[nn.Embedding], duplicate: Any) -> None:
    torch.manual_seed(0)
    original = kind(11, 6, padding_idx=0)
    model = nn.Sequential(original, nn.Linear(6, 3))
    base, before = model(IDS), snapshot(model)
    inject_lora(model, r=4, alpha=10, target_modules=["0"])
    shake(model)
    adapted = model(IDS)
    assert torch.equal(duplicate(model)(IDS), adapted)
    assert not torch.allclose(adapted, base, atol=1e-3)
    state = adapter_state_dict(model)
    again = nn.Sequential(copy.deepcopy(original), copy.deepcopy(model[1]))
    again[0].__class__ = kind
    del again[0].lora
    inject_lora(again, r=4, alpha=10, target_modules=["0"])
    load_adapter_state_dict(again, state)
    assert torch.equal(again(IDS), adapted)
    merge_lora(model)
    assert type(model[0]) is kind
    torch.testing.assert_close(model(IDS), adapted)
    unmerge_lora(model)
    assert torch.equal(model(IDS), adapted)
    remove_lora(model)
    assert model[0] is original and type(original) is kind
    assert_same(before, snapshot(model))


def test_a_forward_around_the_lookup_is_kept() -> None:
    plain, layer = pair(Scaled)
    shake(layer)
    W = plain.weight + layer.delta_weight()
    torch.testing.assert_close(layer(IDS - 1, offset=1), 4 * F.embedding(IDS, W))
    assert adapted_class(OfItsOwn) is None and adapted_class(Centred) is None
    assert adapted_class(Cast) is not None


def test_presets_leave_tables_alone_and_whole_training_wins() -> None:
    plan = inject_lora(TiedHead(), r=2, alpha=6)
    assert [t.name for t in plan.targets] == ["body", "head"]
    model = TiedHead()
    plan = inject_lora(
        model, r=2, alpha=6, target_modules=["embedding", "body"], train_embeddings=True
    )
    assert [t.name for t in plan.targets] == ["body"]
    assert model.embedding.weight.requires_grad


def test_a_table_tied_to_the_head_is_adapted_alone_and_untied_by_a_merge() -> None:
    torch.manual_seed(0)
    model = TiedHead()
    base_weight, before = model.embedding.weight.detach().clone(), snapshot(model)
    inject_lora(model, r=2, alpha=6, target_modules=["embedding"])
    shake(model)
    hidden = torch.tanh(model.body(model.embedding(IDS)))
    adapted = model(IDS)
    torch.testing.assert_close(adapted, F.linear(hidden, base_weight))
    merge_lora(model)
    torch.testing.assert_close(model(IDS), adapted)
    assert torch.equal(model.head.weight, base_weight)
    assert not torch.allclose(model.embedding.weight, base_weight)
    remove_lora(model)
    assert model.head.weight is model.embedding.weight
    assert_same(before, snapshot(model))


def test_a_table_and_its_tied_head_cannot_share_factors() -> None:
    with pytest.raises(TargetError, match="'head' and 'embedding' share one weight, but their"):
        inject_lora(TiedHead(), r=2, alpha=6, target_modules=["embedding", "head"])


def hidden_states(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_reads_what_is_saved_and_the_other_way_round(
    architecture: str, use_rslora: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    name = {"gpt2": "wte", "opt": "embed_tokens", "gemma3": "embed_tokens"}[architecture]
    model = hugging_face(architecture)
    base = hidden_states(model)
    inject_lora(model, r=4, alpha=12, target_modules=[name], use_rslora=use_rslora)
    assert torch.equal(hidden_states(model), base)
    shake(model)
    adapted = hidden_states(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(hugging_face(architecture), tmp_path / "ours").eval()
    torch.testing.assert_close(hidden_states(theirs), adapted, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = hugging_face(architecture)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(hidden_states(again), adapted, atol=1e-5, rtol=1e-5)
    merge_lora(again)
    torch.testing.assert_close(hidden_states(again), adapted, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, LoRALayer) for module in again.modules())


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3))
    inject_lora(model, r=2, alpha=6, target_modules=["0", "1"])
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))
