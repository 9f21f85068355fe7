"""Linear layers that bitsandbytes has quantized: found, read, and kept fit for training.

bitsandbytes is imported only for models that bring its layers; every function here takes other
models too, and finds nothing in them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.names import modules_by_name, parameters_of

# Weights of bitsandbytes layers are read from attributes that `nn.Module` does not know.
_Layer = Any


def quantized_layers(model: nn.Module) -> dict[str, _Layer]:
    """The ``Linear4bit`` and ``Linear8bitLt`` modules of a model, by name."""
    if not (kinds := quantized_kinds()):
        return {}
    return {n: m for n, m in modules_by_name(model).items() if isinstance(m, kinds)}


def quantized_kinds() -> tuple[type[nn.Module], ...]:
    """``Linear4bit`` and ``Linear8bitLt``; none where bitsandbytes has not been imported."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return ()
    return bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt


def is_4bit(layer: _Layer) -> bool:
    """Whether a quantized layer is a ``Linear4bit``."""
    return hasattr(layer, "quant_storage")


def is_pending(layer: _Layer) -> bool:
    """Whether a layer has still to be moved to its device, which is when it is quantized."""
    if is_4bit(layer):
        return layer.quant_state is None and getattr(layer.weight, "quant_state", None) is None
    return not layer.state.has_fp16_weights and layer.weight.dtype != torch.int8


def is_unquantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer that is pending, and has a weight already."""
    weight = getattr(module, "weight", None)
    there = isinstance(weight, Tensor) and not weight.is_meta
    return there and "" in quantized_layers(module) and is_pending(module)


def quantization_name(layer: _Layer) -> str:
    """``"nf4"``, ``"fp4"`` (with ``" double"`` if the scales are quantized too) or ``"int8"``."""
    if not is_4bit(layer):
        return "int8"
    state = quant_state(layer)
    if state is None:
        kind, double = layer.weight.quant_type, layer.weight.compress_statistics
    else:
        kind, double = state.quant_type, state.nested
    return f"{kind} double" if double else str(kind)


def quantization_of(model: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """How a model is quantized, and the names of its quantized layers; ``None`` if it is not."""
    layers = quantized_layers(model)
    if not layers:
        return None
    kinds = sorted({quantization_name(layer) for layer in layers.values()})
    return " and ".join(kinds), tuple(layers)


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)``, which a packed weight no longer shows."""
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, those of packed weights as if they were not packed."""
    packed = {id(layer.weight): layer for layer in quantized_layers(model).values()}
    total = 0
    for parameter in parameters_of(modules_by_name(model)).values():
        layer = packed.get(id(parameter))
        shape = parameter.shape if layer is None else torch.Size(weight_shape(layer))
        total += shape.numel()
    return total


def dequantized(layer: _Layer, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
    """The weight that a quantized layer computes with, shape ``(out_features, in_features)``.

    Args:
        layer: A ``Linear4bit`` or ``Linear8bitLt``.
        dtype: Dtype of the result.
        packed: The whole packed weight, where the layer holds a shard of it.
    """
    from bitsandbytes.functional import dequantize_4bit

    if is_4bit(layer):
        # A copy of the state with another dtype: no second tensor in the dtype it was made from.
        state = copy.copy(quant_state(layer))
        state.dtype = dtype
        weight: Tensor = dequantize_4bit(layer.weight.data if packed is None else packed, state)
        return weight
    values, scales = _int8_parts(layer)
    if packed is not None:
        values = packed
    weight = values.to(dtype, copy=True)
    return weight.mul_(scales.unsqueeze(1).mul(1 / 127))


def as_linear(layer: _Layer, stored: Tensor) -> Tensor:
    """A weight as a file holds it, in shape ``(out_features, in_features)``.

    transformers makes linear layers of the ``Conv1D`` layers that keep their weights transposed.
    """
    return stored.t() if getattr(layer, "source_cls", nn.Linear).__name__ == "Conv1D" else stored


def scales(layer: _Layer) -> list[Tensor]:
    """What belongs to a quantized weight beside its packed values."""
    if is_pending(layer):
        return []
    if not is_4bit(layer):
        return [_int8_parts(layer)[1]]
    return scales_of(quant_state(layer))


def scales_of(state: Any) -> list[Tensor]:
    """The same of the ``QuantState`` of a weight in 4 bits."""
    return [state.absmax, state.offset, state.state2.absmax] if state.nested else [state.absmax]


def put_packed(layer: _Layer, weight: Any) -> None:
    """Give a ``Linear4bit`` another packed weight, with the state that belongs to it."""
    layer._parameters["weight"] = weight
    layer.quant_state = weight.quant_state


def requantized(layer: _Layer, weight: Tensor) -> nn.Parameter:
    """A weight quantized as the layer's own is.

    Args:
        layer: A quantized ``Linear4bit`` or ``Linear8bitLt``.
        weight: Shape ``(out_features, in_features)``, floating point.
    """
    from bitsandbytes.nn import Int8Params, Params4bit

    own = layer.weight
    if not is_4bit(layer):
        quantized = Int8Params(weight.to("cpu", torch.float16), requires_grad=False)
        return quantized.to(own.device)
    state = quant_state(layer)
    packed: nn.Parameter = Params4bit(
        weight.to(state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=own.dtype,
    ).to(own.device)
    return packed


def keep_trainable(model: nn.Module) -> tuple[str, ...]:
    """Keep the 4-bit layers in the layout that gradients can go through.

    On CPUs with AVX512-BF16 bitsandbytes repacks a weight in the first evaluation without
    gradients, for good: training through it then raises, or loses the input's gradient without a
    word. A weight that is repacked already is packed back; its scales have lost precision by then.

    Returns:
        Names of the layers whose fast layout was on, for `allow_repacking`.
    """
    changed = []
    for name, layer in quantized_layers(model).items():
        if not is_4bit(layer):
            continue
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            changed.append(name)
        if getattr(quant_state(layer), "packing_format_for_cpu", False):
            layer.state_dict()  # which has to pack it back
            layer.quant_state = layer.weight.quant_state
    return tuple(changed)


def store_as(model: nn.Module, dtype: torch.dtype) -> None:
    """View packed 4-bit weights in another dtype; the bytes stay where and what they are.

    Sharding takes floating-point parameters alone, which is what ``quant_storage`` is for.

    Raises:
        ConfigError: A layer has 8 bits, or its bytes make no whole number of elements.
    """
    for name, layer in quantized_layers(model).items():
        if not is_4bit(layer):
            raise ConfigError(
                f"{name!r} is quantized to int8, which FSDP2 cannot shard. Use 4 bits (nf4), or "
                "strategy='ddp'."
            )
        flat = layer.weight.data.reshape(-1).view(torch.uint8)
        if flat.numel() % dtype.itemsize:
            raise ConfigError(f"{name!r} has {flat.numel()} packed bytes, no multiple of 4.")
        layer.weight.data = flat.view(dtype).view(-1, 1)
        layer.weight.quant_storage = layer.quant_storage = dtype


def quantize_pending(model: nn.Module, device: torch.device) -> None:
    """Quantize the layers that wait for their device, which a Trainer moves a model to later.

    Until then they hold other values than those that the adapter is trained on.
    """
    for layer in quantized_layers(model).values():
        if is_pending(layer) and not layer.weight.is_meta:
            layer.to(device)


def allow_repacking(model: nn.Module, names: Iterable[str]) -> None:
    """Undo `keep_trainable`."""
    layers = quantized_layers(model)
    for name in names:
        layers[name].support_avx512bf16_for_cpu = True


def quant_state(layer: _Layer) -> Any:
    """What bitsandbytes knows about the packed weight of a ``Linear4bit``."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _int8_parts(layer: _Layer) -> tuple[Tensor, Tensor]:
    """The int8 values and the scale of each row, wherever the layer keeps them at the moment."""
    if layer.state.CB is not None:
        return layer.state.CB, layer.state.SCB
    return layer.weight.data, layer.weight.SCB
