"""Adapters of other formats to checkpoints of this one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base_on_disk import base_parameters, fingerprint_of_files
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, ConfigError, LightningLoRAError
from lightning_lora.export import only_renames
from lightning_lora.files import replacing_file
from lightning_lora.foreign import ForeignAdapter, common_rank, read_foreign
from lightning_lora.metadata import METADATA_KEY, checkpoint_metadata
from lightning_lora.names import corresponding, listed, modules_by_name
from lightning_lora.on_meta import model_on_meta
from lightning_lora.plan import Plan
from lightning_lora.skeleton import Skeleton, build_skeleton, class_and_config
from lightning_lora.start import starts
from lightning_lora.state import trained_shapes
from lightning_lora.stored import StoredAdapter, base_folder, read_stored_adapter
from lightning_lora.targeting import make_plan
from lightning_lora.trained import is_norm
from lightning_lora.weight_files import StoredTensors, weight_places
from lightning_lora.whole_merging import load_whole


@dataclass(frozen=True)
class Conversion:
    """A conversion that was prepared; nothing is written.

    Attributes:
        source: What is converted.
        form: What it is.
        checkpoint: What will be written.
        skeleton: The model without weights.
    """

    source: Path
    form: str
    checkpoint: Mapping[str, Any]
    skeleton: Skeleton


def prepare_conversion(
    source: str | Path,
    base: str | Path | None = None,
    *,
    part: str = "model",
    class_name: str | None = None,
    alpha: float | None = None,
    scaling: float | None = None,
    skip: Collection[str] = (),
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Conversion:
    """Read an adapter of another format, and make a checkpoint of it.

    The base's frozen weights are read once, one after the other, for their fingerprint; all
    together where the files join or split the parameters, as those of mixtures of experts do.

    Args:
        source: A folder in PEFT's format, or a file of factors beside plain tensors, see
            `read_foreign`.
        base: Folder or hub name of the base; by default the one that PEFT's folder names.
        part: Path of the Hugging Face model in the LightningModule that will load it.
        class_name: The model's class in `transformers`; by default what PEFT's task type or the
            base's config says.
        alpha: As for `read_foreign`.
        scaling: As for `read_foreign`.
        skip: As for `read_foreign`.
        progress: Called with how many weights are done, of how many, and the next one's name.

    Raises:
        CheckpointError: The adapter is missing or damaged, does not fit the base, or holds what has
            no counterpart here.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        adapter = read_stored_adapter(source)
        if not adapter.peft:
            raise CheckpointError(f"{source} is a checkpoint of LoRACallback already.")
        folder, form = base_folder(adapter, base), "PEFT folder"
        first = build_skeleton(adapter, folder, class_name)
        plan, config = first.injection.plan, adapter.config
        state = {**starts(first.adapter.state), **adapter.state}
    else:
        foreign = read_foreign(source, alpha, scaling, skip)
        if base is None:
            raise CheckpointError(f"{source} does not name its base. Give --base FOLDER_OR_NAME.")
        adapter = StoredAdapter(source, LoRAConfig(), foreign.plain, {}, {})
        folder, form = base_folder(adapter, base), "factors beside plain tensors"
        config, state, plan = _from_foreign(foreign, adapter, folder, class_name)
    prefix = f"{part}." if part else ""
    adapter = replace(
        adapter,
        config=_by_name(config, plan),
        state={prefix + name: tensor for name, tensor in state.items()},
    )
    skeleton = build_skeleton(adapter, folder, class_name)
    if not only_renames(skeleton.model):
        return Conversion(source, form, _checkpoint(_loaded(skeleton, folder)), skeleton)
    own = {name.removeprefix(prefix) for name in trained_shapes(skeleton.injection)}
    with ExitStack() as files:
        stored = StoredTensors(_places(skeleton.model, folder, own), files)
        _refuse_missing(skeleton, stored, own, folder)
        skeleton.injection.fingerprint = fingerprint_of_files(
            skeleton, stored.__getitem__, progress=progress
        )
    return Conversion(source, form, _checkpoint(skeleton), skeleton)


def write_conversion(conversion: Conversion, path: str | Path) -> None:
    """Write the checkpoint.

    Raises:
        CheckpointError: The file cannot be written; nothing is left.
    """
    try:
        with replacing_file(path) as fresh:
            torch.save(dict(conversion.checkpoint), fresh)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be written: {reason}.") from error


def _loaded(skeleton: Skeleton, folder: Path) -> Skeleton:
    """With the base's weights, for the fingerprint: its files join or split the parameters."""
    name = skeleton.config._name_or_path
    root = load_whole(skeleton.adapter, skeleton, folder, None)
    model: Any = root.get_submodule(skeleton.part)
    model.config._name_or_path = name
    return replace(skeleton, root=root, model=model)


def _checkpoint(skeleton: Skeleton) -> dict[str, Any]:
    import lightning

    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {
            name: tensor.contiguous() for name, tensor in skeleton.adapter.state.items()
        },
        "callbacks": {},
        "lr_schedulers": [],
        METADATA_KEY: checkpoint_metadata(skeleton.root),
    }


def _by_name(config: LoRAConfig, plan: Plan) -> LoRAConfig:
    """The settings with each layer by its full name, a suffix of that in a LightningModule."""
    ranks = {re.escape(t.name): t.r for t in plan.targets if t.r != config.r}
    alphas = {re.escape(t.name): t.alpha for t in plan.targets if t.alpha != config.alpha}
    targets: str | list[str] = [target.name for target in plan.targets]
    return replace(
        config,
        target_modules="qv" if config.target_modules == "qv" else targets,
        exclude_modules=None,
        rank_pattern=ranks or None,
        alpha_pattern=alphas or None,
        modules_to_save=list(plan.saved_modules) or None,
    )


def _places(model: Any, folder: Path, own: Collection[str]) -> dict[str, tuple[Path, str]]:
    try:
        return weight_places(model, str(folder), without=own)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _refuse_missing(
    skeleton: Skeleton, stored: Mapping[str, Tensor], own: Collection[str], folder: Path
) -> None:
    names = (name for name, _ in base_parameters(skeleton))
    missing = [name for name in names if name not in stored and name not in own]
    if missing:
        raise CheckpointError(
            f"{folder} and the adapter hold no {listed(missing, limit=3)} of "
            f"{type(skeleton.model).__name__}. Give --base, or --class with the model that it is "
            "for."
        )


def _from_foreign(
    foreign: ForeignAdapter, adapter: StoredAdapter, folder: Path, class_name: str | None
) -> tuple[LoRAConfig, dict[str, Tensor], Plan]:
    """Settings, state and plan of a model that has what the file holds."""
    model_class, config = class_and_config(adapter, folder, class_name)
    model = model_on_meta(model_class, config)
    modules, shapes = modules_by_name(model), dict(model.named_parameters(remove_duplicate=False))
    layers = [f"{layer}.weight" for layer in foreign.B]
    names = corresponding([*layers, *foreign.plain], [*shapes, *dict(model.named_buffers())])
    unknown = [name for name in [*layers, *foreign.plain] if name not in names]
    if unknown:
        raise CheckpointError(
            f"{adapter.path} holds what {type(model).__name__} has no place for: "
            f"{listed(unknown, limit=3)}. Give --class with the model that it is for, or leave "
            "tensors out with --skip."
        )
    layer_of = {layer: names[f"{layer}.weight"].removesuffix(".weight") for layer in foreign.B}
    r = common_rank(foreign.r)
    scalings = {layer_of[layer]: s for layer, s in foreign.scaling.items()}
    ranks = {layer_of[layer]: rank for layer, rank in foreign.r.items()}
    alphas = {layer: scalings[layer] * ranks[layer] for layer in ranks}
    common = next(alphas[layer] for layer in ranks if ranks[layer] == r)
    plain = {names[name]: tensor for name, tensor in foreign.plain.items()}
    fused = all(foreign.A[layer].shape[0] == 2 * foreign.B[layer].shape[1] for layer in foreign.B)
    with ExitStack() as files:
        stored = StoredTensors(_places(model, folder, ()), files)
        changed = [
            name
            for name, tensor in plain.items()
            if name in shapes and (name not in stored or not _same(tensor, stored[name]))
        ]
        settings = LoRAConfig(
            r=r,
            alpha=common,
            target_modules="qv" if fused else list(layer_of.values()),
            rank_pattern={re.escape(n): k for n, k in ranks.items() if k != r} or None,
            alpha_pattern={re.escape(n): a for n, a in alphas.items() if a != common} or None,
            **_trained(changed, modules, set(ranks)),
        )
        try:
            plan = make_plan(model, settings)
        except LightningLoRAError as error:
            raise CheckpointError(f"{adapter.path} does not fit: {error}") from error
        state = {}
        for layer, name in layer_of.items():
            state[f"{name}.lora.A"], state[f"{name}.lora.B"] = foreign.A[layer], foreign.B[layer]
        for trained in plan.trained:
            # Biases that the training left as they were may be missing in the file.
            value = plain.get(trained.name)
            state[trained.name] = stored[trained.name].clone() if value is None else value
    return settings, state, plan


def _trained(
    changed: Iterable[str], modules: Mapping[str, nn.Module], adapted: set[str]
) -> dict[str, Any]:
    """The settings under which these parameters train in place."""
    split = [(name.rpartition(".")[0], name.rpartition(".")[-1]) for name in changed]
    weights = {owner for owner, leaf in split if leaf != "bias"}
    if weights & adapted:
        raise CheckpointError(
            f"The weight of {sorted(weights & adapted)[0]!r} differs from the base's, and it has "
            "factors too. Give --base with the weights that the adapter was trained on."
        )
    norms = any(is_norm(modules[owner]) for owner in weights)
    saved = [o for o, leaf in split if leaf != "bias" and not is_norm(modules[o])]
    biases = {
        owner
        for owner, leaf in split
        if leaf == "bias" and owner not in saved and not (norms and is_norm(modules[owner]))
    }
    return {
        "bias": "all" if biases - adapted else "lora_only" if biases else "none",
        "train_layer_norms": norms,
        "modules_to_save": list(dict.fromkeys(saved)) or None,
    }


def _same(tensor: Tensor, stored: Tensor) -> bool:
    return tensor.shape == stored.shape and torch.equal(tensor, stored.to(tensor.dtype))
