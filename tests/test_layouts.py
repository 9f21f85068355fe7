"""Where W_q, W_k and W_v are in the fused projections of pictures, sounds and proteins.

Each attention class runs by itself: which rows of its projection are which is found out, not known.
"""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import inject_lora
from lightning_lora.layouts import known_layout
from tests.attention import adapted_rows, influence_of, roles

WIDTH = 16
CLASSES = {
    "blip": "BlipAttention",
    "blip_2": "Blip2Attention",
    "cohere_compass": "CohereCompassVisionAttention",
    "deepseek_ocr2": "DeepseekOcr2SamVisionAttention",
    "dots3_note": "Dots3NoteVisionAttention",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeVisionAttention",
    "exaone4_5": "Exaone4_5_VisionAttention",
    "glm4v": "Glm4vVisionAttention",
    "glm4v_moe": "Glm4vMoeVisionAttention",
    "glm5_next": "Glm5NextVisionAttention",
    "glm_image": "GlmImageVisionAttention",
    "glm_ocr": "GlmOcrVisionAttention",
    "got_ocr2": "GotOcr2VisionAttention",
    "hiera": "HieraMaskUnitAttention",
    "instructblip": "InstructBlipAttention",
    "instructblipvideo": "InstructBlipVideoAttention",
    "mgp_str": "MgpstrAttention",
    "openai": "Attention",
    "pp_formulanet": "PPFormulaNetVisionAttention",
    "pp_ocrv5_mobile_rec": "PPOCRV5MobileRecAttention",
    "pp_ocrv5_server_rec": "PPOCRV5ServerRecAttention",
    "pp_ocrv6_small_rec": "PPOCRV6SmallRecAttention",
    "qwen2_5_vl": "Qwen2_5_VLVisionAttention",
    "qwen2_vl": "VisionAttention",
    "qwen3_5": "Qwen3_5VisionAttention",
    "qwen3_5_moe": "Qwen3_5MoeVisionAttention",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionAttention",
    "qwen3_vl": "Qwen3VLVisionAttention",
    "qwen3_vl_moe": "Qwen3VLMoeVisionAttention",
    "qwen4_exp": "Qwen4ExpVisionAttention",
    "sam": "SamVisionAttention",
    "sam2": "Sam2MultiScaleAttention",
    "sam_hq": "SamHQVisionAttention",
    "seggpt": "SegGptAttention",
    "slanext": "SLANeXtVisionAttention",
    "timesformer": "TimesformerSelfAttention",
    "unlimited_ocr": "UnlimitedOcrSamVisionAttention",
    "vitdet": "VitDetAttention",
}
GRIDS = ("Sam", "GotOcr", "Formula", "SLANeXt", "SegGpt", "VitDet")


class Settings:
    """The settings of whatever attention: what one asks for by name is there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sizes = {"hidden_size": WIDTH, "embed_dim": WIDTH, "image_size": 8, "patch_size": 4}
        sizes |= {"num_heads": 2, "num_attention_heads": 2, "n_head": 2, "num_key_value_heads": 1}
        sizes |= {"pretrain_image_size": 8, "head_dim": 8, "_attn_implementation": "eager"}
        if name in sizes:
            return sizes[name]
        if "drop" in name:
            return 0.0
        return 1e-6 if name.endswith("eps") else name in ("qkv_bias", "attention_bias", "use_bias")


def build(folder: str) -> Any:
    """An attention layer with weights so large that influences stand out."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = getattr(module, CLASSES[folder])
    arguments: tuple[Any, ...] = (Settings(),)
    if folder == "hiera":
        arguments = (WIDTH, WIDTH, 2)
    elif folder == "sam2":
        arguments = (Settings(), WIDTH, WIDTH, 2)
    elif folder == "openai":
        arguments = (WIDTH, 8, Settings(), True)
    elif "window_size" in inspect.signature(kind).parameters:
        arguments = (Settings(), 0)
    torch.manual_seed(0)
    attention = kind(*arguments).double().eval()
    for parameter in attention.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.4)
    return attention


def run(attention: nn.Module, tokens: int) -> Tensor:
    """What is said of each token, shape (tokens, width)."""
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    name = type(attention).__name__
    if "cu_seqlens" in inspect.signature(attention.forward).parameters:
        rotation = torch.ones(tokens, 8).double(), torch.zeros(tokens, 8).double()
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        out = attention(x, cu_seqlens=ends, position_embeddings=rotation)
    elif any(part in name for part in GRIDS):
        out = attention(x[None, :, None])
    else:
        out = attention(x[None])
    while isinstance(out, (tuple, list)):
        out = out[0]
    return out.reshape(-1, WIDTH)


@pytest.mark.parametrize("folder", CLASSES)
def test_the_rows_are_those_of_the_queries_and_the_values(folder: str) -> None:
    attention = build(folder)
    leaf = "c_attn" if folder == "openai" else "qkv"
    over_one, over_several = (
        influence_of(attention.get_submodule(leaf), partial(run, attention, tokens))
        for tokens in (1, 4)
    )
    found = roles(over_one, over_several)
    assert len(found["k"]) == len(found["v"]) > 4
    plan = inject_lora(nn.ModuleDict({"attention": attention}), r=2, alpha=6, target_modules="qv")
    (target,) = plan.targets
    assert adapted_rows(target) == {"q": found["q"], "v": found["v"]}


def test_a_class_of_the_same_name_elsewhere_is_not_known() -> None:
    kind = type(build("openai"))
    assert known_layout(kind) is not None
    assert known_layout(type("Attention", (nn.Module,), {"__module__": "transformers.x"})) is None
    assert known_layout(type("GPT2Attention", (nn.Module,), {"__module__": "mine"})) is None
