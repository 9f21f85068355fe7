"""The adapter's state: what a checkpoint holds, and the audit that stands before every load."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.fingerprint import Packed, fingerprint
from lightning_lora.initialization import restore_rounds
from lightning_lora.injection import Injection, persistent_buffers, require_injection
from lightning_lora.model_record import model_record
from lightning_lora.names import clean_name, listed, modules_by_name
from lightning_lora.plan import Target
from lightning_lora.quantization import (
    is_pending,
    quantization_of,
    quantized_layers,
    scales,
    scales_of,
)
from lightning_lora.sharded import reshard, write
from lightning_lora.start import keeps_start
from lightning_lora.tokens import CHILD, rows_of, without_rows

FORMAT_VERSION = 1
METADATA_KEY = "lightning_lora"
# Settings that shape the state; the others (dropout, init) may change between save and load.
_SHAPING = (
    "use_dora",
    "bias",
    "train_layer_norms",
    "train_embeddings",
    "trainable_token_indices",
)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The trained state alone: factors, trained base parameters, and the buffers that go with them.

    Buffers count if their module trains (a BatchNorm in ``modules_to_save``) or if they changed
    since the injection. A merged model gives the same state as before the merge.

    Args:
        model: The module that LoRA was injected into.

    Returns:
        Detached tensors by name, sharing memory with the model; shards (`DTensor`) where the model
        is sharded.

    Raises:
        ConfigError: The model has no LoRA.
    """
    record = require_injection(model)
    reshard(model)
    state = {name: parameter.detach() for name, parameter in _trained(model, record).items()}
    required = _required_buffers(model, record)
    for name, buffer in persistent_buffers(model).items():
        before = record.buffers.get(name)
        if name in required or before is None or not _same(before, buffer):
            state[name] = buffer.detach()
    return state


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], source: str = "the adapter"
) -> None:
    """Load what `adapter_state_dict` gave, all of it or nothing.

    Args:
        model: The module that LoRA was injected into, with the same settings.
        state: Whole tensors by name, also for a sharded model.
        source: What to call the state in errors, for instance its path.

    Raises:
        CheckpointError: A missing, unexpected or wrongly shaped key. Nothing has been loaded then.
        ConfigError: The model has no LoRA, or is merged.
    """
    record = require_injection(model)
    if record.merged:
        raise ConfigError(
            "The model is merged. Call unmerge_lora(model) before loading, or use swap_adapter."
        )
    audit_state(model, state, source)
    reshard(model)
    restore_rounds(model, record.plan, record.originals, state, source)
    buffers = persistent_buffers(model)
    for name, tensor in {**_trained(model, record), **buffers}.items():
        if name in state:
            write(tensor, state[name])
        elif name in record.buffers:
            write(tensor, record.buffers[name])


def audit_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "the adapter") -> None:
    """Compare the keys and shapes of a state with what the model would save.

    Raises:
        CheckpointError: What is missing, unexpected or of another shape, and what to do about it.
    """
    record = require_injection(model)
    buffers = {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model).items()}
    shapes = trained_shapes(record)
    expected = {name: shapes[name] for name in _trained(model, record)}
    expected.update({name: buffers[name] for name in _required_buffers(model, record)})
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected and name not in buffers]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in {**buffers, **expected}.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if not (missing or unexpected or misshapen):
        return
    if unexpected and not any(".lora." in name for name in state):
        raise CheckpointError(
            f"{source} holds {len(state)} tensors and no LoRA factors: it is a full-model "
            "checkpoint, not an adapter. Load it into the model before LoRA is injected (for "
            "instance in the LightningModule's __init__), and give ckpt_path an adapter "
            "checkpoint."
        )
    lines = [
        f"\n  {label}: {listed(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
        )
        if names
    ]
    raise CheckpointError(
        f"{source} does not fit the model; nothing was loaded.{''.join(lines)}\n  Use the LoRA "
        "settings and the model that it was saved with."
    )


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of the frozen base, computed once and kept.

    Trained parameters are left out: they differ between a fresh model and a trained one. So are
    names, which differ between a model and the LightningModule around it.
    """
    record = require_injection(model)
    if record.fingerprint is None:
        record.fingerprint = fingerprint(_fingerprinted(model))
    return record.fingerprint


def _fingerprinted(model: nn.Module, without: Iterable[str] = ()) -> Iterator[Tensor | Packed]:
    """The frozen base, packed weights with their scales; without the weights of some layers."""
    modules = modules_by_name(model)
    left_out = {id(modules[name].weight) for name in without if name in modules}
    record = require_injection(model)
    # Rows that train are no part of the base: new ones differ each time embeddings are resized.
    tables = {}
    for target in record.plan.tokens:
        _, merged_away = record.base_weights.get(f"{target.name}.weight", (None, None))
        table = modules[target.name].weight if merged_away is None else merged_away
        tables[id(table)] = rows_of(modules, target)
    packed = {id(layer.weight): (name, layer) for name, layer in quantized_layers(model).items()}
    for parameter in frozen_parameters(model):
        name, layer = packed.get(id(parameter), ("", None))
        if id(parameter) in left_out:
            continue
        if id(parameter) in tables:
            yield without_rows(parameter, tables[id(parameter)])
        elif layer is None or is_pending(layer):
            yield parameter
        elif (original := record.originals.get(name)) is not None:
            yield Packed(original)
            yield from scales_of(original.quant_state)  # type: ignore[attr-defined]
        else:
            yield Packed(parameter)
            yield from scales(layer)


def _quantization(model: nn.Module, record: Injection) -> dict[str, Any] | None:
    """How the base is quantized, and a fingerprint of the rest of it, which other forms share."""
    if record.quantization is None and (found := quantization_of(model)) is not None:
        kind, layers = found
        record.quantization = {
            "kind": kind,
            "layers": list(layers),
            "rest": fingerprint(_fingerprinted(model, without=layers)),
        }
    return record.quantization


def checkpoint_metadata(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about its adapter, in primitives."""
    record = require_injection(model)
    return {
        "version": FORMAT_VERSION,
        "config": record.config.to_dict(),
        "targets": {t.name: _described(t) for t in record.plan.targets},
        "base": {
            "fingerprint": base_fingerprint(model),
            "name_or_path": _name_or_path(model),
            "parameters": record.plan.base_parameters,
            "quantization": _quantization(model, record),
            "model": model_record(model, trained_shapes(record)),
        },
    }


def _described(target: Target) -> dict[str, Any]:
    """What can be read off neither the factors nor the settings goes along with them."""
    described = {
        "r": target.r,
        "alpha": target.alpha,
        "scaling": target.scaling,
        "kind": target.kind,
    }
    if target.slices is not None:
        described["slices"] = asdict(target.slices)
    return described


def audit_metadata(
    model: nn.Module, metadata: Mapping[str, Any], source: str = "the adapter"
) -> None:
    """Compare a checkpoint's settings, targets and base with the model's.

    Raises:
        CheckpointError: What differs, and what to do about it.
    """
    here = checkpoint_metadata(model)
    if int(metadata.get("version", 0)) > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} was written in format {metadata['version']} by a newer lightning-lora; "
            f"this version reads up to {FORMAT_VERSION}. Upgrade lightning-lora."
        )
    theirs, ours = metadata["base"], here["base"]
    same_base = theirs["fingerprint"] == ours["fingerprint"]
    differences = list(_config_differences(metadata, here))
    if not same_base and not differences:
        # What trains whole is no part of the base, so another choice gives another fingerprint.
        differences += _setting_differences(metadata, here, ("modules_to_save",))
    if differences:
        raise CheckpointError(
            f"{source} was trained with other LoRA settings; nothing was loaded.\n  "
            + "\n  ".join(differences)
            + "\n  Set them as they were in the checkpoint, or start a new run without it."
        )
    if not same_base and not _another_form(model, theirs, ours, source):
        raise CheckpointError(
            f"{source} was trained on another base model; nothing was loaded.\n  checkpoint: "
            f"{_base(theirs)}\n  model:      {_base(ours)}\n  Give the model the base weights "
            "that the adapter was trained on."
        )


def _another_form(
    model: nn.Module, theirs: Mapping[str, Any], ours: Mapping[str, Any], source: str
) -> bool:
    """Whether a base is, as far as can be told, the same one quantized in another way or not at
    all; said in one line.
    """
    saved, here = theirs.get("quantization"), ours["quantization"]
    forms = [f"in {q['kind']}" if q else "without quantization" for q in (saved, here)]
    if forms[0] == forms[1] or theirs["parameters"] != ours["parameters"]:
        return False
    checked = "whether the base is the same could not be checked"
    if saved is not None and (here is None or here["layers"] == saved["layers"]):
        rest = here["rest"] if here else fingerprint(_fingerprinted(model, saved["layers"]))
        if rest != saved["rest"]:
            return False
        checked = "what is not quantized in it is the same"
    warnings.warn(
        f"{source} was trained on the base {forms[0]}, and the model's base is {forms[1]}: outputs "
        f"differ by the error of the quantization ({checked}).",
        stacklevel=3,
    )
    return True


def _config_differences(metadata: Mapping[str, Any], here: Mapping[str, Any]) -> Iterable[str]:
    theirs, ours = metadata["targets"], here["targets"]
    for key in ("r", "alpha", "scaling"):
        pairs = {
            (theirs[n][key], ours[n][key])
            for n in theirs
            if n in ours and theirs[n][key] != ours[n][key]
        }
        for old, new in sorted(pairs):
            yield f"{key}: {old} in the checkpoint, {new} now"
    if bool(theirs) != bool(ours):
        yield f"r: {metadata['config']['r']} in the checkpoint, {here['config']['r']} now"
    only_theirs = [name for name in theirs if name not in ours]
    only_ours = [name for name in ours if name not in theirs]
    if only_theirs:
        yield f"target_modules: adapted in the checkpoint alone: {listed(only_theirs)}"
    if only_ours:
        yield f"target_modules: adapted here alone: {listed(only_ours)}"
    inits = [str(each["config"].get("init")) for each in (metadata, here)]
    if keeps_start(inits[0]) != keeps_start(inits[1]):
        yield f"init: {inits[0]!r} in the checkpoint, {inits[1]!r} now"
    rounds = [each["config"].get("loftq_iter") or 1 for each in (metadata, here)]
    if (rounds[0] > 1) != (rounds[1] > 1):
        yield f"loftq_iter: {rounds[0]} in the checkpoint, {rounds[1]} now"
    yield from _setting_differences(metadata, here, _SHAPING)


def _setting_differences(
    metadata: Mapping[str, Any], here: Mapping[str, Any], settings: Iterable[str]
) -> Iterator[str]:
    for key in settings:
        old, new = metadata["config"].get(key), here["config"][key]
        if old != new:
            yield f"{key}: {old!r} in the checkpoint, {new!r} now"


def trained_shapes(record: Injection) -> dict[str, tuple[int, ...]]:
    """The parameters that train or go with them, and their shapes when they are not sharded."""
    shapes = {parameter.name: parameter.shape for parameter in record.plan.trained}
    for target in record.plan.targets:
        if target.tied_to is None:
            for leaf, shape in target.shapes().items():
                shapes[f"{target.name}.lora.{leaf}"] = shape
    for token_target in record.plan.tokens:
        shape = (len(token_target.indices), token_target.width)
        shapes[f"{token_target.name}.{CHILD}.rows"] = shape
    return shapes


def _trained(model: nn.Module, record: Injection) -> dict[str, nn.Parameter]:
    names = trained_shapes(record)
    cleaned = ((clean_name(name), parameter) for name, parameter in model.named_parameters())
    found = {name: parameter for name, parameter in cleaned if name in names}
    for name, layer in record.replaced.items():
        # A merge may have put a copy in another dtype in the place of a bias that trains.
        if layer.bias is not None and f"{name}.bias" in found:
            found[f"{name}.bias"] = layer.bias
    return found


def frozen_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The frozen base in the order of the model, as it is without a merge."""
    record = require_injection(model)
    trained = {id(parameter) for parameter in _trained(model, record).values()}
    modules = modules_by_name(model)
    # While merged, the weight of a layer may be a parameter of its own, untied from the original.
    originals = {
        id(getattr(modules[name.rpartition(".")[0]], name.rpartition(".")[-1])): original
        for name, original in record.base_weights.items()
    }
    seen = set(trained)
    for parameter in model.parameters():
        original, value = originals.get(id(parameter), (parameter, parameter))
        if id(original) not in seen and id(parameter) not in trained:
            seen.add(id(original))
            yield value


def _same(before: Tensor, now: Tensor) -> bool:
    # A conversion of the whole model (.to(bfloat16)) is no change of the buffer.
    return torch.equal(before.to(now.dtype), now.to(before.device))


def _required_buffers(model: nn.Module, record: Injection) -> set[str]:
    owners = {name.rpartition(".")[0] for name in (p.name for p in record.plan.trained)}
    return {name for name in persistent_buffers(model) if name.rpartition(".")[0] in owners}


def _name_or_path(model: nn.Module) -> str:
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
        if isinstance(name, str) and name:
            return name
    return type(model).__name__


def _base(base: Mapping[str, Any]) -> str:
    digest = str(base["fingerprint"])
    size = f"{base['parameters']:,} parameters"
    if base.get("quantization"):
        size += f", {base['quantization']['kind']}"
    return f"{base['name_or_path']} ({size}, fingerprint {digest[:12]})"
