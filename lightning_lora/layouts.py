"""Where W_q, W_k and W_v are in the fused projections of attention classes that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import nn

# Groups, and the rows of each part in one group, in the order of the weight.
Layout: TypeAlias = tuple[int, Mapping[str, int]]
LayoutOf: TypeAlias = Callable[[Any, int], Layout]


def thirds(attention: nn.Module, rows: int) -> Layout:
    """All rows of W_q, then of W_k, then of W_v, as many of each."""
    return 1, {"q": rows // 3, "k": rows // 3, "v": rows // 3}


def _halves(attention: nn.Module, rows: int) -> Layout:
    """All rows of W_k, then of W_v, as many of each."""
    return 1, {"k": rows // 2, "v": rows // 2}


def _by_head(heads: str, attention: nn.Module, rows: int) -> Layout:
    """For each head its rows of W_q, W_k and W_v."""
    groups = int(getattr(attention, heads))
    return groups, dict.fromkeys("qkv", rows // (3 * groups))


def _gpt2(attention: nn.Module, rows: int) -> Layout:
    if attention.is_cross_attention:
        return _halves(attention, rows)
    return thirds(attention, rows)


def _gpt_bigcode(attention: Any, rows: int) -> Layout:
    if attention.is_cross_attention:
        return _halves(attention, rows)
    if attention.multi_query:
        query, shared = attention.embed_dim, attention.kv_dim
        return 1, {"q": query, "k": shared, "v": shared}
    return _by_head("num_heads", attention, rows)


def _gpt_neox(attention: Any, rows: int) -> Layout:
    return rows // (3 * attention.head_size), dict.fromkeys("qkv", attention.head_size)


def _falcon(attention: Any, rows: int) -> Layout:
    size = attention.head_dim
    if attention.new_decoder_architecture:
        groups = attention.num_kv_heads
        return groups, {"q": attention.num_heads // groups * size, "k": size, "v": size}
    if attention.multi_query:
        return 1, {"q": attention.num_heads * size, "k": size, "v": size}
    return _by_head("num_heads", attention, rows)


def _phi3(attention: Any, rows: int) -> Layout:
    shared = attention.num_key_value_heads * attention.head_dim
    return 1, {"q": rows - 2 * shared, "k": shared, "v": shared}


def _codegen(attention: Any, rows: int) -> Layout:
    part = rows // 3 // attention.mp_num
    return attention.mp_num, {"q": part, "v": part, "k": part}


def _exaone_vision(attention: Any, rows: int) -> Layout:
    return 1, {"q": attention.q_dim, "k": attention.kv_dim, "v": attention.kv_dim}


_PICTURES = [
    "CohereCompass",
    "DeepseekOcr2Sam",
    "Dots3Note",
    "Ernie4_5_VLMoe",
    "Glm4v",
    "Glm4vMoe",
    "Glm5Next",
    "GlmImage",
    "GlmOcr",
    "GotOcr2",
    "PPFormulaNet",
    "Qwen2_5_VL",
    "Qwen3OmniMoe",
    "Qwen3VL",
    "Qwen3VLMoe",
    "Qwen3_5",
    "Qwen3_5Moe",
    "Qwen4Exp",
    "SLANeXt",
    "Sam",
    "SamHQ",
    "UnlimitedOcrSam",
]

# Classes of transformers 5 and of timm 1, by the package that they are in.
_KNOWN: dict[str, dict[str, LayoutOf]] = {
    "transformers.": {
        "BloomAttention": partial(_by_head, "num_heads"),
        "PersimmonAttention": partial(_by_head, "num_heads"),
        "DisentangledSelfAttention": partial(_by_head, "num_attention_heads"),
        "GPTNeoXJapaneseAttention": partial(_by_head, "num_attention_heads"),
        "MiniMaxLightningAttention": partial(_by_head, "num_attention_heads"),
        "GPTNeoXAttention": _gpt_neox,
        "CodeGenAttention": _codegen,
        "DecisionTransformerGPT2Attention": _gpt2,
        "GPT2Attention": _gpt2,
        "ImageGPTAttention": _gpt2,
        "GPTBigCodeAttention": _gpt_bigcode,
        "FalconAttention": _falcon,
        "DbrxAttention": _phi3,
        "Phi3Attention": _phi3,
        "Phi4MultimodalAttention": _phi3,
        "Exaone4_5_VisionAttention": _exaone_vision,
        "EvollaSequenceCompressorAttention": _halves,
        "GraniteSpeechConformerAttention": _halves,
        "GraniteSpeechPlusConformerAttention": _halves,
        "Blip2Attention": thirds,
        "BlipAttention": thirds,
        "Florence2VisionChannelAttention": thirds,
        "Florence2VisionWindowAttention": thirds,
        "HieraMaskUnitAttention": thirds,
        "InstructBlipAttention": thirds,
        "InstructBlipVideoAttention": thirds,
        "LayoutLMv2SelfAttention": thirds,
        "MgpstrAttention": thirds,
        "ModernBertAttention": thirds,
        "MptAttention": thirds,
        "PPOCRV5MobileRecAttention": thirds,
        "PPOCRV5ServerRecAttention": thirds,
        "PPOCRV6SmallRecAttention": thirds,
        "Sam2MultiScaleAttention": thirds,
        "SegGptAttention": thirds,
        "TimesformerSelfAttention": thirds,
        "VitDetAttention": thirds,
        **{f"{model}VisionAttention": thirds for model in _PICTURES},
    },
    "transformers.models.qwen2_vl.": {"VisionAttention": thirds},
    "transformers.models.openai.": {"Attention": thirds},
    "timm.layers.attention.": {"Attention": thirds, "AttentionRope": thirds},
    "timm.layers.attention_pool.": {"AttentionPoolLatent": _halves},
    "timm.models.pvt_v2.": {"Attention": _halves},
    "timm.models.twins.": {"GlobalSubSampleAttn": _halves, "LocallyGroupedAttn": thirds},
    "timm.models.beit.": {"Attention": thirds},
    "timm.models.eva.": {"EvaAttention": thirds},
    "timm.models.swin_transformer.": {"WindowAttention": thirds},
    "timm.models.swin_transformer_v2.": {"WindowAttention": thirds},
}


def known_layout(attention: type[nn.Module]) -> LayoutOf | None:
    """The layout of an attention class, by its name and package."""
    module = f"{attention.__module__}."
    for package, layouts in _KNOWN.items():
        if module.startswith(package) and attention.__name__ in layouts:
            return layouts[attention.__name__]
    return None
