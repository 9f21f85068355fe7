"""Biases of quantized layers that are not adapted: bitsandbytes rounds them in place.

Its forward casts the bias to the dtype of its input and keeps the cast, which takes from a bias
that trains what its steps are smaller than. Around the call a cast stands in the parameter's place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_KEPT = "_lightning_lora_bias"


def keep_biases(layers: Iterable[nn.Module]) -> None:
    """Let the biases of quantized layers keep their dtype; calling it again changes nothing."""
    for layer in layers:
        if layer.bias is not None and _lend_cast not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_lend_cast)
            layer.register_forward_hook(_take_back, always_call=True)


def _lend_cast(layer: Any, args: Any) -> None:
    bias = layer._parameters.get("bias")
    # Adapted layers leave theirs alone.
    if bias is None or "lora" in layer._modules or not args or bias.dtype == args[0].dtype:
        return
    layer.__dict__[_KEPT] = bias
    del layer._parameters["bias"]
    layer.__dict__["bias"] = bias.to(args[0].dtype)


def _take_back(layer: Any, args: Any, output: Any) -> None:
    bias = layer.__dict__.pop(_KEPT, None)
    if bias is not None:
        del layer.__dict__["bias"]
        layer._parameters["bias"] = bias
