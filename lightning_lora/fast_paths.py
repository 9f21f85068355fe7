"""PyTorch's fast paths through encoders, which read weights instead of calling layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.freezing import remove_hook
from lightning_lora.layers import LoRALayer
from lightning_lora.names import modules_by_name


def leave_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's encoders from computing around the adapted layers in evaluation.

    A hook anywhere in an encoder layer turns its fast path off. Padded positions come out of the
    last layer as zeros on that path, and so they do here.

    Args:
        model: A model whose layers are adapted.
    """
    for module in modules_by_name(model).values():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if not any(isinstance(child, LoRALayer) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_no_fast_path)
        elif module.use_nested_tensor and len(module.layers):
            module.use_nested_tensor = False
            module.layers[-1].register_forward_hook(_empty_padding, with_kwargs=True)


def return_to_fast_paths(model: nn.Module) -> None:
    """Undo `leave_fast_paths`.

    Args:
        model: A model none of whose layers is adapted any more.
    """
    for module in modules_by_name(model).values():
        if isinstance(module, nn.TransformerEncoderLayer):
            remove_hook(module, _no_fast_path)
        elif isinstance(module, nn.TransformerEncoder) and any(
            remove_hook(layer, _empty_padding) for layer in module.layers
        ):
            module.use_nested_tensor = True


def _no_fast_path(layer: nn.Module, args: Any) -> None:
    """Does nothing: its presence is what counts."""


def _empty_padding(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Put zeros at padded positions, where `torch.nn.TransformerEncoder` would leave them out.

    The conditions are those of its forward. The base's parameters require gradients, so that it
    takes the fast path under ``no_grad`` alone.
    """
    mask = kwargs.get("src_key_padding_mask")
    if (
        mask is None
        or kwargs.get("src_mask") is not None
        or output.dim() != 3
        or layer.training
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled()
        or torch.compiler.is_compiling()
        or not torch.backends.mha.get_fastpath_enabled()
    ):
        return output
    # The encoder has made it a mask of floats, with minus infinity at padded positions.
    kept = mask.logical_not()
    if not torch._nested_tensor_from_mask_left_aligned(output, kept):
        return output
    # Not by a product: a sequence that is padding alone has NaN.
    return output.masked_fill(~kept.unsqueeze(-1), 0)
