"""Layers whose weights are read and not called: left alone, because LoRA would do nothing there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    MambaConfig,
    MambaModel,
    MobileBertConfig,
    MobileBertForMaskedLM,
    WavLMConfig,
    WavLMModel,
)

from lightning_lora import inject_lora, merge_lora
from lightning_lora.errors import TargetError
from tests.models import shake

IDS = {"input_ids": torch.arange(3, 17).reshape(2, 7)}
SOUND = {"input_values": torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))}


def mamba() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    return MambaModel(MambaConfig(vocab_size=40, **sizes)), IDS


def mobile_bert() -> Any:
    config = MobileBertConfig(
        vocab_size=40,
        hidden_size=16,
        embedding_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        intra_bottleneck_size=8,
        max_position_embeddings=32,
    )
    return MobileBertForMaskedLM(config), IDS


def wavlm() -> Any:
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return WavLMModel(config), SOUND


def deberta(legacy: bool = True) -> Any:
    config = DebertaV2Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        relative_attention=True,
        pos_att_type="c2p|p2c",
        legacy=legacy,
    )
    return DebertaV2ForMaskedLM(config), IDS


def test_weights_that_deberta_reads() -> None:
    with pytest.raises(TargetError, match=r"rel_embeddings' .*DebertaV2Encoder reads its weight"):
        inject_lora(deberta()[0], r=2, target_modules=["rel_embeddings"])
    names: Any = ["word_embeddings"]
    assert inject_lora(deberta()[0], r=2, target_modules=names).targets
    with pytest.raises(TargetError, match=r"word_embeddings' .*the head reads its weight too"):
        inject_lora(deberta(legacy=False)[0], r=2, target_modules=names)
    with pytest.raises(TargetError, match="word_embeddings' has a weight that the head reads too"):
        inject_lora(deberta(legacy=False)[0], r=2, trainable_token_indices=[3])


@pytest.mark.parametrize("make", [mamba, mobile_bert, wavlm])
def test_every_layer_that_is_adapted_has_an_effect(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    plan = inject_lora(model, r=2, alpha=6)
    assert any("reads its weight" in why for _, why in plan.skipped)
    shake(model)
    out = model(**inputs)[0]
    out.square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    merge_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "wanted", "said"),
    [
        (wavlm, "qv", r"matched no layer.*v_proj' cannot.*WavLMAttention reads its weight"),
        (mamba, ["in_proj", "dt_proj"], r"'dt_proj' matched.*MambaMixer reads its weight"),
        (mobile_bert, ["predictions.transform.dense", "predictions.dense"], "MobileBertLMPred"),
    ],
)
def test_asking_for_them_is_an_error(make: Any, wanted: Any, said: str) -> None:
    model, _ = make()
    with pytest.raises(TargetError, match=f"(?s){said}"):
        inject_lora(model, r=2, target_modules=wanted)


def test_latent_attention_has_no_value_projection_of_its_own() -> None:
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.kv_a_proj = nn.Linear(8, 8), nn.Linear(8, 4)
            self.kv_b_proj = nn.Linear(4, 16)

    model = nn.ModuleDict({"attn": Latent(), "other": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match=r"'attn' keeps W_k and W_v together in 'attn.kv_b_proj'"):
        inject_lora(model, r=2, target_modules="qv")
    plan = inject_lora(model, r=2, target_modules=["q_proj", "kv_b_proj"])
    assert [target.name for target in plan.targets] == ["attn.q_proj", "attn.kv_b_proj"]
