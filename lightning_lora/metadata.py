"""What a checkpoint says about its adapter, and how that compares with a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import CheckpointError
from lightning_lora.fingerprint import Packed, fingerprint
from lightning_lora.injection import Injection, require_injection
from lightning_lora.model_record import model_record
from lightning_lora.names import listed, modules_by_name
from lightning_lora.plan import Target
from lightning_lora.quantization import (
    is_pending,
    quantization_of,
    quantized_layers,
    scales,
    scales_of,
)
from lightning_lora.start import keeps_start
from lightning_lora.state import trained_parameters, trained_shapes
from lightning_lora.tokens import rows_of, without_rows

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


def checkpoint_metadata(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about its adapter, in primitives."""
    record = require_injection(model)
    modules = modules_by_name(model)
    return {
        "version": FORMAT_VERSION,
        "config": record.config.to_dict(),
        "targets": {t.name: _described(t) for t in record.plan.targets},
        "base": {
            "fingerprint": base_fingerprint(model),
            "name_or_path": _name_or_path(modules),
            "parameters": record.plan.base_parameters,
            "quantization": _quantization(model, record),
            "model": model_record(modules, trained_shapes(record)),
        },
    }


def check_version(metadata: Mapping[str, Any], source: str) -> None:
    """A newer format may mean something else by the same names.

    Raises:
        CheckpointError: The checkpoint is of a newer format.
    """
    version = metadata.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} was written in format {version} by a newer lightning-lora; this version "
            f"reads up to {FORMAT_VERSION}. Upgrade lightning-lora."
        )


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


def audit_metadata(
    model: nn.Module, metadata: Mapping[str, Any], source: str = "the adapter"
) -> None:
    """Compare a checkpoint's settings, targets and base with the model's.

    Raises:
        CheckpointError: What differs, and what to do about it.
    """
    here = checkpoint_metadata(model)
    check_version(metadata, source)
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


def frozen_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The frozen base in the order of the model, as it is without a merge."""
    record = require_injection(model)
    modules = modules_by_name(model)
    trained = {id(parameter) for parameter in trained_parameters(modules, record).values()}
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


def _name_or_path(modules: Mapping[str, nn.Module]) -> str:
    for module in modules.values():
        # Its own attribute alone: to find that a module has none takes long where there are many.
        config = module.__dict__.get("config")
        if config is None:
            continue
        name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
        if isinstance(name, str) and name:
            return name
    return type(modules[""]).__name__


def _base(base: Mapping[str, Any]) -> str:
    digest = str(base["fingerprint"])
    size = f"{base['parameters']:,} parameters"
    if base.get("quantization"):
        size += f", {base['quantization']['kind']}"
    return f"{base['name_or_path']} ({size}, fingerprint {digest[:12]})"
