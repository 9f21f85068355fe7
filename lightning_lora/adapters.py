"""Adapters read without a model: the factors of each layer, and what the file says about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.checkpoints import read_checkpoint
from lightning_lora.config import LoRAConfig
from lightning_lora.directories import is_directory
from lightning_lora.errors import CheckpointError
from lightning_lora.matching import value_for
from lightning_lora.metadata import METADATA_KEY
from lightning_lora.peft_format import from_peft_config, from_peft_tensors
from lightning_lora.peft_reading import read_peft_files
from lightning_lora.slices import Slices
from lightning_lora.start import keeps_start, without_starts

# Layers that keep their weight as (in, out).
_TRANSPOSED = ("Conv1D", "Embedding")


@dataclass(frozen=True)
class Factors:
    """A matrix W of the base that an adapter updates by ``s B A``; with DoRA that is the update of
    the direction, see `notes_of`.

    Attributes:
        A: Shape ``(r, in)``.
        B: Shape ``(out, r)``.
        scaling: The factor s.
        weight: Name of the parameter that holds W.
        transposed: Whether the parameter is kept as ``(in, out)``; ``None`` if unknown.
        part: Name of the part of a fused projection that W is, or ``None`` for all of it.
        slices: The parts of that projection.
    """

    A: Tensor
    B: Tensor
    scaling: float
    weight: str
    transposed: bool | None = False
    part: str | None = None
    slices: Slices | None = None

    def of_base(self, parameter: Tensor) -> Tensor | None:
        """W, shape ``(out, in)``, from the parameter; ``None`` if that has another shape."""
        wanted = (self.B.shape[0], self.A.shape[1])
        if self.slices is not None:
            wanted = (self.slices.out_rows, wanted[1])
        if parameter.ndim != 2:
            return None
        if self.transposed or (self.transposed is None and parameter.shape != wanted):
            parameter = parameter.t()
        if parameter.shape != wanted:
            return None
        return self._own_rows(parameter)

    def _own_rows(self, whole: Tensor) -> Tensor:
        if self.slices is None:
            return whole
        groups = whole.reshape(self.slices.groups, -1, whole.shape[1])
        sizes = [rows for _, rows in self.slices.parts]
        names = [name for name, _ in self.slices.parts]
        own = groups.split(sizes, dim=1)[names.index(str(self.part))]
        return own.reshape(-1, whole.shape[1])


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        path: Where it was read from.
        form: What it is there.
        config: Its settings.
        base: What is said about the base: ``name_or_path``, and of a checkpoint ``fingerprint`` and
            ``parameters``.
        position: ``epoch`` and ``global_step`` of a checkpoint.
        state: All trained tensors by name.
        factors: The matrices that it updates, by the name of the layer, with the part of a fused
            projection in brackets.
        left_out: The other adapted layers, and why: their update is no product of two matrices, or
            is not finite.
    """

    path: Path
    form: str
    config: LoRAConfig
    base: Mapping[str, Any]
    position: Mapping[str, int]
    state: Mapping[str, Tensor]
    factors: Mapping[str, Factors]
    left_out: Mapping[str, str]


def read_adapter(path: str | Path) -> Adapter:
    """Read a Lightning checkpoint (a file or a sharded folder) or a folder in PEFT format.

    Raises:
        CheckpointError: It is missing, damaged, or no adapter.
    """
    path = Path(path).expanduser()
    if path.is_dir() and not is_directory(path):
        return _from_peft(path)
    checkpoint = read_checkpoint(path)
    metadata, targets = checkpoint[METADATA_KEY], dict(checkpoint[METADATA_KEY]["targets"])
    sliced = {name: t["slices"] for name, t in targets.items() if t.get("slices")}
    parts = {name: len(slices["adapted"]) for name, slices in sliced.items()}
    state, doubled = without_starts(checkpoint["state_dict"], parts)
    targets |= {name: {**targets[name], "r": 2 * targets[name]["r"]} for name in doubled}
    _refuse_halves(state, targets, path)
    factors, left_out = _factors(state, targets)
    position: dict[str, int] = {
        key: checkpoint[key] for key in ("epoch", "global_step") if key in checkpoint
    }
    return Adapter(
        path,
        "sharded Lightning checkpoint" if path.is_dir() else "Lightning checkpoint",
        LoRAConfig.from_dict(metadata["config"]),
        metadata["base"],
        position,
        state,
        factors,
        left_out,
    )


def notes_of(adapter: Adapter) -> list[str]:
    """What a reader of the numbers of its updates has to know.

    What DoRA adds to a weight, ``m V / ||V|| - W0`` with ``V = W0 + s B A``, is no product of two
    matrices; of such an adapter s B A alone is analysed, and magnitudes are tensors like others. In
    PEFT's format factors that did not start from zero stand without their start.
    """
    notes = []
    if adapter.config.use_dora:
        notes.append(
            "DoRA: dW = s B A is the update of the direction alone, before each row is scaled to "
            "its magnitude; what is added to W in all is no product of two matrices."
        )
    init = adapter.config.init
    if keeps_start(init) and adapter.form == "PEFT folder":
        notes.append(
            f"{init}: PEFT does not save what the factors started from, so dW = s B A is the "
            "update together with the start. Convert the folder with lightning-lora convert to see "
            "the update alone."
        )
    return notes


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Short names of paths: as many of the last components as tell them apart.

    >>> labels_of([Path("a/x/best.ckpt"), Path("a/y/best.ckpt")])
    ['x/best', 'y/best']
    """
    whole = [path.resolve() for path in paths]
    whole = [path.with_suffix("") if path.suffix == ".ckpt" else path for path in whole]
    depth = 1
    while True:
        labels = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(labels)) == len(set(whole)) or depth > max(len(path.parts) for path in whole):
            return labels
        depth += 1


def _from_peft(path: Path) -> Adapter:
    values, tensors = read_peft_files(path)
    state = from_peft_tensors(tensors)
    config = from_peft_config(values, state, str(path))
    targets: dict[str, dict[str, Any]] = {}
    for name in (key.removesuffix(".lora.A") for key in state if key.endswith(".lora.A")):
        r = value_for(config.rank_pattern, name, config.r)
        alpha = value_for(config.alpha_pattern, name, config.alpha)
        targets[name] = {"r": r, "alpha": alpha, "scaling": config.scaling(r, alpha)}
        if values.get("fan_in_fan_out"):
            targets[name]["kind"] = "Conv1D"
    factors, left_out = _factors(state, targets)
    base = {"name_or_path": values.get("base_model_name_or_path") or "unknown"}
    return Adapter(path, "PEFT folder", config, base, {}, state, factors, left_out)


def _refuse_halves(state: Mapping[str, Tensor], targets: Iterable[str], path: Path) -> None:
    for name in targets:
        missing = [f for f in "AB" if f"{name}.lora.{f}" not in state]
        # Layers that share their weight with another have neither.
        if len(missing) == 1:
            raise CheckpointError(
                f"{path} is damaged: {name}.lora.{missing[0]} is missing. Use an earlier "
                "checkpoint."
            )


def _factors(
    state: Mapping[str, Tensor], targets: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Factors], dict[str, str]]:
    found: dict[str, Factors] = {}
    left_out = {}
    for name, target in targets.items():
        A, B = state.get(f"{name}.lora.A"), state.get(f"{name}.lora.B")
        reason = _obstacle(A, B, target)
        if reason is not None:
            left_out[name] = reason
            continue
        assert A is not None and B is not None
        kind, scaling = target.get("kind"), target["scaling"]
        if target.get("slices"):
            slices = Slices(**target["slices"])
            for part, (down, up) in slices.blocks(A, B).items():
                own = slices.widths is not None
                weight = f"{name}.{part}_proj_weight" if own else f"{name}.weight"
                if kind == "MultiheadAttention" and not own:
                    weight = f"{name}.in_proj_weight"
                found[f"{name}[{part}]"] = Factors(
                    down, up, scaling, weight, _is_transposed(kind), part, None if own else slices
                )
            continue
        leaf = "in_proj_weight" if kind == "MultiheadAttention" else "weight"
        found[name] = Factors(A, B, scaling, f"{name}.{leaf}", _is_transposed(kind))
    return found, left_out


def _is_transposed(kind: str | None) -> bool | None:
    return None if kind is None else kind.endswith(_TRANSPOSED)


def _obstacle(A: Tensor | None, B: Tensor | None, target: Mapping[str, Any]) -> str | None:
    """Why the update of a layer cannot be taken for a product of two matrices, or ``None``."""
    if A is None or B is None:
        return "it shares the factors of another layer"
    if not (A.isfinite().all() and B.isfinite().all()):
        return "its factors hold values that are no finite numbers"
    if A.ndim != 2 or B.ndim != 2:
        return f"a convolution: A has {A.ndim} dimensions"
    if target.get("slices"):
        of_experts = str(target.get("kind")).endswith("Experts")
        return "experts: their weights have 3 dimensions" if of_experts else None
    if A.shape[0] != B.shape[1]:
        return "parts of a fused projection, and the checkpoint does not say which"
    if A.shape[0] != target["r"]:
        return "experts: their weights have 3 dimensions"
    return None
