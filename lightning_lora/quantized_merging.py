"""Merging into a quantized base: what it is merged into, what that costs, and the way back.

A merge into packed weights would round the update away, so by default the merged model is an
ordinary one: every quantized layer becomes a plain layer with a weight in the model's own dtype,
dequantized or read from the files that the base was quantized from. Requantizing is an option that
says what it costs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.dora import direction_scale, weight_norm
from lightning_lora.errors import ConfigError
from lightning_lora.functional import delta_weight
from lightning_lora.injection import Injection, Replaced, require_injection
from lightning_lora.layers import LoRAFactors, Masters
from lightning_lora.names import listed, modules_by_name
from lightning_lora.quantization import (
    as_linear,
    dequantized,
    is_pending,
    quant_state,
    quantized_layers,
    requantized,
    weight_shape,
)
from lightning_lora.sharded import is_sharded, local, whole, whole_factors, write
from lightning_lora.tables import as_text
from lightning_lora.weight_files import stored_weights

if TYPE_CHECKING:
    from rich.table import Table

MERGE_BASES = ("dequantized", "original", "requantized")
# What makes transformers take a model for a quantized one.
_FLAGS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class MergeReport:
    """What a merge into a quantized base has changed beside adding the update.

    Attributes:
        base: What was merged into.
        errors: For each quantized layer ``||W_merged - (W_q + s B A)|| / ||W_q + s B A||`` in the
            Frobenius norm: the root mean square error of its output relative to the output it was
            trained with, for inputs without a preferred direction.
        update_errors: The same difference relative to the update, ``/ ||s B A||``, for the adapted
            layers; above 1 more is lost than was learnt.
    """

    base: str
    errors: dict[str, float] = field(default_factory=dict)
    update_errors: dict[str, float] = field(default_factory=dict)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"Merged into the {self.base} base", title_justify="left")
        for column in ("layers", "relative output error", "mean", "largest", "in"):
            table.add_column(column, overflow="fold")
        for label, errors in (
            ("of the output", self.errors),
            ("of the update", self.update_errors),
        ):
            if errors:
                worst = max(errors, key=lambda name: errors[name])
                mean = sum(errors.values()) / len(errors)
                table.add_row(str(len(errors)), label, f"{mean:.3g}", f"{errors[worst]:.3g}", worst)
        return table

    def __str__(self) -> str:
        return as_text(self)


def check_merge_base(base: str) -> str:
    """One of `MERGE_BASES`.

    Raises:
        ConfigError: Another name.
    """
    if base not in MERGE_BASES:
        known = ", ".join(map(repr, MERGE_BASES))
        raise ConfigError(f"merge_base must be one of {known}, got {base!r}")
    return base


@contextmanager
def merging_into(model: nn.Module, base: str) -> Iterator[_Read | None]:
    """What `merge_quantized` reads base weights with; checked before anything is changed.

    Args:
        model: The adapted model.
        base: One of `MERGE_BASES`.

    Raises:
        ConfigError: A weight that was quantized cannot be read from the base model's files, or the
            factors make up for its quantization (LoftQ), or the model is sharded, or was not
            quantized yet.
    """
    layers = quantized_layers(model)
    check_merge_base(base)
    for name, layer in layers.items():
        if is_sharded(layer.weight) and base != "requantized":
            raise ConfigError(
                f"{name!r} is quantized and sharded, and its shards have no room for merged "
                "weights in 16 bits. Merge the checkpoint in one process (merge_on_fit_end=False, "
                "then load_lightning_module), or into packed weights (merge_base='requantized')."
            )
        if is_pending(layer):
            raise ConfigError(f"{name!r} is to be quantized and was not yet: move the model first.")
    original = base == "original" and bool(layers)
    if original and require_injection(model).config.init == "loftq":
        raise ConfigError(
            "merge_base='original' does not go with init='loftq': the factors began as the error "
            "of the quantization, which the original weights do not have. Use "
            "merge_base='dequantized', which is exact."
        )
    with stored_weights(model) if original else nullcontext() as stored:
        if stored is not None:
            missing = [name for name in layers if f"{name}.weight" not in stored]
            if missing:
                raise ConfigError(
                    "merge_base='original': the files of the base model hold no weights for "
                    f"{listed(missing, limit=3)}. Use merge_base='dequantized'."
                )
        yield None if stored is None else stored.__getitem__


@torch.no_grad()
def merge_quantized(
    model: nn.Module, record: Injection, base: str, read: _Read | None
) -> MergeReport:
    """Merge the quantized layers, adapted or not, of a model whose other layers are merged.

    Args:
        model: The model, adapted layers in their own classes again.
        record: What was injected.
        base: One of `MERGE_BASES`.
        read: Gives the original weight by the parameter's name; from `merging_into`.
    """
    report = MergeReport(base)
    layers = quantized_layers(model)
    if not layers:
        return report
    dtype = _own_dtype(model, record, layers)
    done: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        factors = getattr(layer, "lora", None)
        if base == "requantized" and not isinstance(factors, LoRAFactors):
            continue
        before = layer.weight
        if id(before) not in done:
            weight = dequantized(layer, torch.float32, _gathered(before))
            trained = weight
            if isinstance(factors, LoRAFactors):
                with whole_factors(factors):
                    delta = delta_weight(*factors.pair(), factors.scaling).to(weight.device)
                    trained = weight + delta
                    if factors.magnitude is not None:
                        norm = weight_norm(weight, *factors.pair(), factors.scaling)
                        trained = trained * direction_scale(factors.magnitude, norm)[:, None]
                        delta = trained - weight
            if read is None:
                merged = trained
            else:
                merged = as_linear(layer, read(f"{name}.weight")).to(weight) + (trained - weight)
            if base == "requantized":
                after = requantized(layer, merged)
            else:
                after = nn.Parameter(merged.to(dtype), requires_grad=False)
            done[id(before)] = after
        else:
            trained = None
        replaced = Replaced(type(layer), before, layer.bias)
        record.replaced[name] = replaced
        if base == "requantized":
            _put_packed(layer, done[id(before)], replaced)
            result = None
            if trained is not None:
                result = dequantized(layer, torch.float32, _gathered(layer.weight))
        else:
            result = done[id(before)].float()
            _make_plain(layer, done[id(before)], replaced)
        if trained is not None and result is not None:
            difference = (result - trained).norm()
            report.errors[name] = float(difference / trained.norm())
            if isinstance(factors, LoRAFactors):
                size = delta.norm()
                report.update_errors[name] = float(difference / size) if size else 0.0
    if base != "requantized":
        _hide_flags(model, record)
    return report


@torch.no_grad()
def unmerge_quantized(model: nn.Module, record: Injection) -> None:
    """Give every layer its class, its quantized parameter and its bias back, the same objects."""
    modules = modules_by_name(model)
    for name, replaced in record.replaced.items():
        layer: Any = modules[name]
        device = layer.weight.device
        layer.__class__ = replaced.layer_class
        if replaced.shard is not None:
            local(layer.weight).copy_(replaced.shard)
            quant_state(layer).__dict__.update(replaced.attributes)
            continue
        layer._parameters["weight"] = replaced.weight
        layer._parameters["bias"] = replaced.bias
        layer.__dict__.update(replaced.attributes)
        if replaced.weight.device != device:
            layer.to(device)
    for owner, values in record.hidden_flags:
        owner.__dict__.update(values)
    record.replaced.clear()
    record.hidden_flags.clear()


def _make_plain(layer: Any, weight: nn.Parameter, replaced: Replaced) -> None:
    # Hooks that quantize what is loaded into the layer.
    for name in _HOOKS:
        replaced.attributes[name] = layer.__dict__[name]
        layer.__dict__[name] = OrderedDict()
    source = getattr(layer, "source_cls", nn.Linear)
    if source.__name__ == "Conv1D":
        # The layer of transformers that keeps its weight transposed, and was made a linear one.
        layer.__class__, (layer.nf, layer.nx) = source, weight_shape(layer)
        weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    else:
        layer.__class__ = nn.Linear
    layer._parameters["weight"] = weight
    if layer.bias is not None and layer.bias.dtype != weight.dtype:
        _copy_bias(layer, weight.dtype)


def _copy_bias(layer: Any, dtype: torch.dtype) -> None:
    """Put a copy in the place of a bias, which keeps its precision and may be a master that
    trains.
    """
    copy = layer.bias.detach().to(dtype, copy=True)
    layer._parameters["bias"] = nn.Parameter(copy, layer.bias.requires_grad)


def _put_packed(layer: Any, weight: nn.Parameter, replaced: Replaced) -> None:
    if is_sharded(layer.weight):
        # The shard's memory belongs to a larger buffer, which has to change with it; and the
        # gathered weight refers to this very state.
        replaced.shard = local(layer.weight.detach()).to("cpu", copy=True)
        state = quant_state(layer)
        replaced.attributes.update(state.__dict__)
        write(layer.weight, weight.data)
        state.__dict__.update(weight.quant_state.__dict__)  # type: ignore[attr-defined]
        return
    layer._parameters["weight"] = weight
    if layer.bias is not None:
        # bitsandbytes rounds what it is given in place.
        _copy_bias(layer, layer.bias.dtype)
    if hasattr(layer, "quant_state"):
        replaced.attributes["quant_state"] = layer.quant_state
        layer.quant_state = weight.quant_state  # type: ignore[attr-defined]
        return
    state = layer.state
    replaced.attributes["state"] = state
    layer.state = type(state)()
    layer.state.__dict__.update(state.__dict__)
    layer.state.CB = layer.state.SCB = None


def _gathered(weight: Tensor) -> Tensor | None:
    """The whole of a sharded weight; `None` for one that the layer holds whole."""
    return whole(weight) if is_sharded(weight) else None


def _own_dtype(model: nn.Module, record: Injection, layers: dict[str, Any]) -> torch.dtype:
    """The dtype that activations have: that of most matrices that are not quantized."""
    left_out = {id(layer.weight) for layer in layers.values()}
    for module in model.modules():
        if isinstance(module, Masters):
            left_out.update(map(id, module.parameters()))
    matrices: Counter[torch.dtype] = Counter()
    vectors: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if id(parameter) not in left_out and parameter.is_floating_point():
            counts = matrices if parameter.ndim > 1 else vectors
            counts[parameter.dtype] += parameter.numel()
    if not matrices and record.merge_dtype is not None:
        return record.merge_dtype
    common = (matrices or vectors).most_common(1)
    return common[0][0] if common else torch.float32


def _hide_flags(model: nn.Module, record: Injection) -> None:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        for owner, names in ((module, _FLAGS), (config, ("quantization_config",))):
            if owner is None or id(owner) in seen or not hasattr(owner, "__dict__"):
                continue
            seen.add(id(owner))
            found = {name: owner.__dict__.pop(name) for name in names if name in owner.__dict__}
            if "_weight_conversions" in found and len(found) == 1:
                owner.__dict__.update(found)  # an ordinary model among them
            elif found:
                record.hidden_flags.append((owner, found))
