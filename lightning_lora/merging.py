"""Folding the factors into the base weights, and getting the exact base back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.fast_paths import leave_fast_paths, return_to_fast_paths
from lightning_lora.injection import Injection, require_injection, restore_class, swap_class
from lightning_lora.layers import LoRALayer
from lightning_lora.metadata import checkpoint_metadata
from lightning_lora.names import modules_by_name, unwrap
from lightning_lora.plan import Target
from lightning_lora.quantization import quantized_layers
from lightning_lora.quantized_merging import (
    MergeReport,
    merge_quantized,
    merging_into,
    unmerge_quantized,
)
from lightning_lora.sharded import is_sharded, local, part_of, reshard, whole, whole_factors
from lightning_lora.tokens import merge_tokens, unmerge_tokens


@torch.no_grad()
def merge_lora(model: nn.Module, base: str | None = None) -> MergeReport:
    """Merge in place, ``W = W0 + s B A`` (with DoRA ``m V / ||V||`` of that V), layer by layer;
    adapted layers become plain layers again.

    The exact base weights are kept (on the CPU for weights on an accelerator), so `unmerge_lora`
    gives them back bit for bit. The factors stay in the model but leave its state dict, so that
    ``save_pretrained`` writes a plain model. Merging a merged model does nothing. A weight that
    another module shares (a tied head) is untied first, so that only the adapted layer changes. A
    sharded model is merged on its shards, by all ranks together; a rank holds the update of one
    layer whole.

    A quantized base (bitsandbytes) becomes an ordinary one while it is merged: all its quantized
    layers are plain layers then, in the dtype of the rest of the model.

    Args:
        model: The module that LoRA was injected into.
        base: What a quantized base is replaced by: ``"dequantized"`` weights (the default), the
            ``"original"`` ones, read layer by layer from the safetensors files of a Hugging Face
            model, or ``"requantized"``, which stays packed and rounds the update.

    Returns:
        What merging into a quantized base costs; it prints as a table.

    Raises:
        ConfigError: The model has no LoRA, a factor is not finite, a weight was pruned or
            reparametrized since, a sharded weight is tied to another module's, or the original
            weights cannot be read.
    """
    record = require_injection(model)
    if record.merged:
        return MergeReport(base or record.merge_base)
    reshard(model)
    refuse_reparametrized(model, record)
    _refuse_non_finite(model, record)
    with merging_into(model, base or record.merge_base) as read:
        return _merge(model, record, base or record.merge_base, read)


def _merge(model: nn.Module, record: Injection, base: str, read: Any) -> MergeReport:
    quantized = quantized_layers(model)
    if quantized:
        checkpoint_metadata(model)  # which is not to be had while merged
    modules = modules_by_name(model)
    if any(is_sharded(weight) for _, _, weight in _adapted(modules, record)):
        refuse_ties(model)
    shared = shared_parameters(model, record)
    record.base_weights.update(merge_tokens(model, record.plan.tokens))
    for target in record.plan.targets:
        module = modules[target.name]
        assert isinstance(module, LoRALayer)
        if target.tied_to is None and target.name not in quantized:
            merge_layer(module, target, record, shared)
    # In a second pass: layers that share factors are merged through the first of them.
    for target in record.plan.targets:
        module = modules[target.name]
        if target.tied_to is not None and target.name not in quantized:
            for leaf in target.weights:
                module._parameters[leaf] = modules[target.tied_to]._parameters[leaf]
        unwrap(module.lora).hidden = True  # type: ignore[assignment, arg-type]
        restore_class(module)
    return_to_fast_paths(model)
    record.merged, record.merged_into = True, base
    return merge_quantized(model, record, base, read)


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: the base weights are bitwise those from before the merge. Without a merge,
    nothing.

    Args:
        model: The module that LoRA was injected into.

    Raises:
        ConfigError: The model has no LoRA, or a weight was pruned or reparametrized since.
    """
    record = require_injection(model)
    if not record.merged:
        return
    refuse_reparametrized(model, record)
    reshard(model)
    modules = modules_by_name(model)
    quantized = set(record.replaced)
    unmerge_quantized(model, record)
    for target in record.plan.targets:
        module = modules[target.name]
        for leaf in target.weights if target.name not in quantized else ():
            parameter, before = record.base_weights[f"{target.tied_to or target.name}.{leaf}"]
            merged = module._parameters[leaf]
            assert merged is not None
            if is_sharded(merged):
                local(merged).copy_(before)
            else:
                parameter.data = before.to(device=merged.device, dtype=merged.dtype)
                module._parameters[leaf] = parameter
        unwrap(module.lora).hidden = False  # type: ignore[assignment, arg-type]
        swap_class(module)
    unmerge_tokens(model, record.plan.tokens, record.base_weights)
    leave_fast_paths(model)
    record.base_weights.clear()
    record.merged = False


def merge_layer(
    module: LoRALayer, target: Target, record: Injection, shared: Collection[int] = ()
) -> None:
    """Add the update of one layer to its weights; those from before go into the record.

    Args:
        module: The adapted layer.
        target: Its target.
        record: What was injected.
        shared: Ids of the parameters that another module uses too, which get a copy.
    """
    with whole_factors(module.lora):
        updates = module.delta_weights()
        scale = module.merge_scale(module.whole_weight()) if target.dora else None
    for leaf, update in updates.items():
        parameter = module._parameters[leaf]
        assert parameter is not None
        before, delta = local(parameter.detach()), part_of(update, parameter)
        # Summed in the wider dtype and rounded once; the old tensor is left as it is and becomes
        # the snapshot.
        after = before.to(delta.dtype) + delta.to(before.device)
        if scale is not None:
            after *= part_of(scale.expand(parameter.shape), parameter)
        after = after.to(before.dtype)
        if is_sharded(parameter):
            # The shard's memory belongs to a larger buffer, which has to change with it.
            before = before.to("cpu", copy=True)
            local(parameter.detach()).copy_(after)
        elif id(parameter) in shared:
            module._parameters[leaf] = nn.Parameter(after, requires_grad=parameter.requires_grad)
        else:
            parameter.data = after
        record.base_weights[f"{target.name}.{leaf}"] = (
            parameter,
            before if before.device.type == "cpu" else before.cpu(),
        )


def _adapted(
    modules: dict[str, nn.Module], record: Injection
) -> Iterator[tuple[Target, str, Tensor]]:
    """Each target with each of the parameters that it adapts."""
    for target in record.plan.targets:
        for leaf in target.weights:
            yield target, leaf, getattr(modules[target.name], leaf)


def shared_parameters(model: nn.Module, record: Injection) -> set[int]:
    """Ids of the weights of targets that a module outside the targets uses too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = modules_by_name(model)
    owned = {id(adapted[target.name]) for target in record.plan.targets}
    return {
        key
        for key, owners in names.items()
        if len(owners) > 1 and any(id(modules[o]) not in owned for o in owners)
    }


def refuse_ties(model: nn.Module) -> None:
    """A tied weight cannot be untied once it is a shard.

    Raises:
        ConfigError: Names the adapted layer that shares its weight, and says what to do.
    """
    record = require_injection(model)
    modules = modules_by_name(model)
    shared = shared_parameters(model, record)
    for target, _, weight in _adapted(modules, record):
        if id(weight) in shared:
            raise ConfigError(
                f"{target.name!r} shares its weight with a module that is not adapted (a tied "
                "head), and a sharded weight cannot be untied for a merge. Leave it out of "
                "target_modules, untie the weights before the fit, or set merge_on_fit_end=False "
                "and merge the checkpoint in one process."
            )


def refuse_reparametrized(model: nn.Module, record: Injection) -> None:
    """Refuse to work on weights that are computed anew in each call.

    Args:
        model: The adapted model.
        record: What was injected.

    Raises:
        ConfigError: Names the layer, and says what to do.
    """
    modules = modules_by_name(model)
    for target in record.plan.targets:
        if any(leaf not in modules[target.name]._parameters for leaf in target.weights):
            raise ConfigError(
                f"{target.name!r} was pruned or reparametrized after LoRA was injected, and its "
                "weight is computed anew in each call: nothing can be merged into it, or taken out "
                "of it. Make that permanent first (torch.nn.utils.prune.remove, "
                "torch.nn.utils.parametrize.remove_parametrizations)."
            )


def _refuse_non_finite(model: nn.Module, record: Injection) -> None:
    modules = modules_by_name(model)
    factors = {}
    for target in record.plan.targets:
        lora = modules[target.name].lora
        for factor in target.shapes():
            value = getattr(lora, factor)
            assert isinstance(value, Tensor)
            # The whole of it: every rank has to come to the same conclusion.
            factors[f"{target.name}.lora.{factor}"] = whole(value)
    factors_are_finite(record, factors)


def factors_are_finite(record: Injection, factors: Mapping[str, Tensor]) -> None:
    """Refuse to merge what would destroy the base.

    Args:
        record: What was injected.
        factors: The factors by name.

    Raises:
        ConfigError: A factor holds NaN or infinity.
    """
    for target in record.plan.targets:
        for factor in target.shapes() if target.tied_to is None else ():
            if not bool(torch.isfinite(factors[f"{target.name}.lora.{factor}"]).all()):
                raise ConfigError(
                    f"Not merged: {target.name}.lora.{factor} holds NaN or infinity, so training "
                    "diverged. Nothing was changed. Resume from an earlier checkpoint with a "
                    "lower learning rate."
                )
