from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import inject_lora, merge_lora, remove_lora, unmerge_lora
from tests.models import AttentionNet, shake

SETTINGS: dict[str, Any] = {"r": 4, "alpha": 12, "target_modules": "all-linear"}
# The fast path sums in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def transformer(**settings: Any) -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 32, 0.0, batch_first=True, **settings).eval()


def sequences() -> Tensor:
    return torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))


def padding(kind: str) -> Tensor | None:
    if kind == "no mask":
        return None
    if kind == "in between":
        return torch.tensor([[False] * 6, [False, True] * 3, [False] * 6])
    return torch.arange(6) >= torch.tensor([[6], [4], [2]])


@torch.no_grad()
def output(model: nn.Module, mask: Tensor | None) -> Tensor:
    x = sequences()
    if isinstance(model, nn.Transformer):
        return model(x, x, src_key_padding_mask=mask)  # type: ignore[no-any-return]
    return model(x, src_key_padding_mask=mask)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["no mask", "at the end", "in between"])
@pytest.mark.parametrize("whole", [True, False], ids=["transformer", "encoder"])
def test_padded_positions_are_those_of_the_base(kind: str, whole: bool) -> None:
    model = transformer() if whole else transformer().encoder
    mask = padding(kind)
    base = output(model, mask)
    inject_lora(model, **SETTINGS)
    torch.testing.assert_close(output(model, mask), base, **CLOSE)
    shake(model)
    assert not torch.allclose(output(model, mask), base, atol=1e-2)


def test_an_encoder_without_a_norm_of_its_own_has_zeros_at_padded_positions() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mask = padding("at the end")
    assert mask is not None
    assert not output(model, mask)[mask].any()
    inject_lora(model, **SETTINGS)
    shake(model)
    out = output(model, mask)
    assert not out[mask].any() and out[~mask].all()


@pytest.mark.parametrize("circumstance", ["gradients", "switched off", "training"])
def test_padded_positions_where_the_base_takes_the_slow_path(circumstance: str) -> None:
    model = transformer().encoder.train(circumstance == "training")
    mask = padding("at the end")
    assert mask is not None
    adapted = copy.deepcopy(model)
    inject_lora(adapted, **SETTINGS)
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(circumstance != "switched off")
        with torch.set_grad_enabled(circumstance == "gradients"):
            base = model(sequences(), src_key_padding_mask=mask)
            found = adapted(sequences(), src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    torch.testing.assert_close(found, base, **CLOSE)
    assert base[mask].std(0).sum() > 0.1  # no constant rows


def test_a_sequence_that_is_padding_alone_gives_zeros() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.arange(6) >= torch.tensor([[6], [0], [2]])
    base = output(model, mask)
    assert not base[1].any()
    inject_lora(model, **SETTINGS, layers_to_transform=[1])
    torch.testing.assert_close(output(model, mask), base, **CLOSE)


def test_an_encoder_without_layers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 0)
    model = nn.ModuleDict({"encoder": encoder, "fc": nn.Linear(8, 8)})
    inject_lora(model, **SETTINGS)
    merge_lora(model)
    remove_lora(model)


def test_a_merged_model_takes_the_fast_path_again() -> None:
    model = transformer()
    mask = padding("at the end")
    inject_lora(model, **SETTINGS)
    shake(model)
    adapted = output(model, mask)
    merge_lora(model)
    # PyTorch rounds some products by whether the weight requires gradients.
    plain = transformer().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(model, mask), output(plain, mask))
    torch.testing.assert_close(output(model, mask), adapted, **CLOSE)
    assert model.encoder.use_nested_tensor
    unmerge_lora(model)
    assert torch.equal(output(model, mask), adapted)
    assert not model.encoder.use_nested_tensor


def test_removal_brings_the_fast_path_back() -> None:
    model = transformer()
    base = output(model, padding("at the end"))
    inject_lora(model, **SETTINGS)
    remove_lora(model)
    assert torch.equal(output(model, padding("at the end")), base)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._forward_hooks_with_kwargs


@pytest.mark.parametrize("padded", [True, False])
def test_the_fast_path_of_the_encoder_does_not_bypass_the_factors(padded: bool) -> None:
    torch.manual_seed(0)
    model = AttentionNet().eval()
    x, mask = torch.randn(2, 5, 8), None
    if padded:
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    kept = ~mask if mask is not None else torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        base = model(x, mask)
    inject_lora(model, **SETTINGS, exclude_modules=["head"])
    shake(model)

    def encoded() -> Tensor:
        with torch.no_grad():
            return model.encoder(x, src_key_padding_mask=mask)  # type: ignore[no-any-return]

    evaluated = encoded()
    model.train()
    # Dropout is zero everywhere, so training mode computes the same function by the slow path.
    trained = encoded()
    model.eval()
    torch.testing.assert_close(evaluated[kept], trained[kept])
    with torch.no_grad():
        assert not torch.allclose(model(x, mask)[kept], base[kept], atol=1e-3)
    remove_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), base)


def test_an_encoder_without_adapted_layers_keeps_its_fast_path() -> None:
    model = AttentionNet()
    inject_lora(model, **{**SETTINGS, "target_modules": ["head"]})
    assert model.encoder.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in model.modules())
