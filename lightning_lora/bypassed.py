"""Layers whose weights another module reads instead of calling them.

Factors on such a layer would have no effect in training, and a merge would give them one. What does
so is found by the name of its class, in transformers 5, torchvision, torchaudio and timm, and in
copies of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

# Classes, and which of their children they read; some only where a fused kernel is installed.
_READERS = tuple(
    (re.compile(classes), frozenset(children.split()))
    for classes, children in (
        # torch.nn.functional.multi_head_attention_forward
        (r"WavLMAttention", "q_proj k_proj v_proj out_proj"),
        (r"WavLMSelfAttention", "attention"),
        (r"ShiftedWindowAttention(V2|3d)?", "qkv proj"),
        # Scans of state spaces, and the kernels that run what is around them too.
        (r"(Falcon)?MambaMixer", "conv1d x_proj dt_proj out_proj"),
        (r"JambaMambaMixer", "conv1d dt_proj"),
        (r"ZambaMambaMixer", "conv1d"),
        (r"(Mamba2|Bamba|FalconH1|NemotronHMamba2|Zamba2Mamba)Mixer", "conv1d out_proj"),
        (r"GraniteMoeHybridMambaLayer", "conv1d out_proj"),
        # Causal convolutions by a kernel.
        (r"\w*(GatedDeltaNet|DeltaAttention|LinearAttention)", "conv1d"),
        (r"\w*ShortConv(olution)?", "conv conv1d"),
        (r"RecurrentGemmaRecurrentBlock", "conv_1d"),
        # A weight that is put together with another, or run as a convolution.
        (r"MobileBertLMPredictionHead", "dense decoder"),
        (r"Deberta(V2)?Encoder", "rel_embeddings"),
        (r"\w*MHAttentionMap", "k_proj k_linear"),
        (r"TDNNLayer", "kernel"),
        # Tables and routers that are linear layers by name alone.
        (r"(LayoutLMv[23]|PPDocLayoutV2\w*)Encoder", "rel_pos_bias rel_pos_x_bias rel_pos_y_bias"),
        (r"LongcatFlashTopkRouter", "classifier"),
        (r"Gemma3nTextAltUp", "correction_coefs"),
        (r"NeoMME\w*", "unembedding_projection"),
        (r"LSHSelfAttention", "query_key value"),
    )
)


# Heads of a model that multiply with the embedding's weight, to which they hold no reference.
_HEADS = {"DebertaOnlyMLMHead", "DebertaV2OnlyMLMHead"}


def is_read_by_head(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a head reads the weight of this embedding without having it as its own.

    Args:
        name: The embedding's name.
        modules: The model's modules by name.
    """
    return name.endswith("word_embeddings") and any(
        type(module).__name__ in _HEADS for module in modules.values()
    )


def reads_weight(parent: nn.Module, child: str) -> bool:
    """Whether a module reads the weight of its child of this name.

    >>> class MambaMixer(nn.Module): ...
    >>> reads_weight(MambaMixer(), "dt_proj"), reads_weight(MambaMixer(), "in_proj")
    (True, False)
    """
    # timm's attention with biases for queries and values alone.
    if child == "qkv" and getattr(parent, "q_bias", None) is not None:
        return getattr(parent, "qkv_bias_separate", True) is False
    # A replay of how Megatron splits its products.
    if getattr(parent, "slow_but_exact", False) and getattr(parent, "pretraining_tp", 1) > 1:
        return child in ("dense", "dense_4h_to_h")
    names = [kind.__name__ for kind in type(parent).__mro__]
    return any(
        child in children and any(classes.fullmatch(name) for name in names)
        for classes, children in _READERS
    )
