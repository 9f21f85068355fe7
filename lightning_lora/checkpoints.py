"""Reading checkpoint files: what can be wrong with one, said in one sentence."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora.directories import is_directory, read_directory
from lightning_lora.errors import CheckpointError, first_line
from lightning_lora.metadata import METADATA_KEY, check_version
from lightning_lora.names import listed, modules_by_name, parameters_of


@contextmanager
def explain_unreadable(path: Any) -> Iterator[None]:
    """Turn the many errors of reading a checkpoint into `CheckpointError`s that say what to do."""
    try:
        yield
    except FileNotFoundError as error:
        folder = Path(str(path)).parent
        found = sorted(p.name for p in folder.glob("*.ckpt")) if folder.is_dir() else []
        where = (
            f"{folder} holds: {', '.join(found[:5])}"
            if found
            else f"there are no .ckpt files in {folder}"
        )
        raise CheckpointError(f"Checkpoint not found: {path} ({where}).") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} could not be read: it is damaged, or holds more than tensors and primitives, "
            "which are not loaded from files that may come from elsewhere (such as objects in "
            "save_hyperparameters: leave those out with ignore=[...]; of a file of your own, "
            f"weights_only=False reads them). {_reason(error)}"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise CheckpointError(
            f"{path} could not be read: it is truncated, or not a checkpoint "
            f"({first_line(error).partition('. ')[0].rstrip('.')}). Use an earlier checkpoint."
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read an adapter checkpoint, a file or a sharded folder, onto the CPU; nothing in it is
    executed.

    Raises:
        CheckpointError: The file is missing, damaged, or no adapter checkpoint.
    """
    with explain_unreadable(path):
        if is_directory(path):
            checkpoint = read_directory(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    require_metadata(checkpoint, str(path))
    return dict(checkpoint)


def require_metadata(checkpoint: Any, source: str) -> Mapping[str, Any]:
    """The section that every adapter checkpoint has.

    Raises:
        CheckpointError: The file is a checkpoint of another kind, or the section is damaged.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(f"{source} is not a Lightning checkpoint: it has no 'state_dict'.")
    metadata = checkpoint.get(METADATA_KEY)
    if metadata is None:
        count = len(checkpoint["state_dict"])
        raise CheckpointError(
            f"{source} is a full-model checkpoint ({count} tensors, no {METADATA_KEY!r} section), "
            "not an adapter. Load it into the model before LoRA is injected (for instance in the "
            "LightningModule's __init__), and give ckpt_path a checkpoint that LoRACallback "
            "wrote."
        )
    if isinstance(metadata, Mapping):
        check_version(metadata, source)
    if not _is_whole(metadata):
        raise CheckpointError(
            f"{source} is damaged: its {METADATA_KEY!r} section does not say which layers are "
            "adapted, how, and on which base. Use an earlier checkpoint."
        )
    section: Mapping[str, Any] = metadata
    return section


def _is_whole(metadata: Any) -> bool:
    """Whether the section has what every checkpoint of every version has."""
    if not isinstance(metadata, Mapping):
        return False
    config, targets, base = (metadata.get(name) for name in ("config", "targets", "base"))
    return (
        isinstance(config, Mapping)
        and isinstance(targets, Mapping)
        and isinstance(base, Mapping)
        and {"fingerprint", "name_or_path", "parameters"} <= set(base)
        and all(
            isinstance(target, Mapping) and {"r", "alpha", "scaling"} <= set(target)
            for target in targets.values()
        )
    )


def require_training_state(checkpoint: Mapping[str, Any], source: str) -> None:
    """A fit goes on only from a checkpoint with the optimizers' state.

    Raises:
        CheckpointError: The checkpoint was saved with ``weights_only=True``.
    """
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"{source} holds the adapter without optimizer state (it was saved with "
            "weights_only=True), so a fit cannot resume from it. Start the fit without ckpt_path "
            "after load_adapter(model, path), or resume from a full checkpoint."
        )


def optimizer_names(
    optimizers: Sequence[Optimizer], modules: Mapping[str, nn.Module]
) -> list[list[list[str]]]:
    """The names of the parameters in each group of each optimizer, in order.

    Args:
        optimizers: The optimizers.
        modules: The model's modules by name.
    """
    names = {id(parameter): name for name, parameter in parameters_of(modules).items()}
    found = []
    for optimizer in optimizers:
        # Parameters from outside the module are told apart by their order.
        unnamed = count()
        found.append(
            [
                [names.get(id(p)) or f"?{next(unnamed)}" for p in group["params"]]
                for group in optimizer.param_groups
            ]
        )
    return found


def optimizer_states(
    checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer], model: nn.Module
) -> list[dict[str, Any]]:
    """The optimizers' states of a checkpoint, in the order of the parameters in the optimizers.

    Torch numbers parameters; by their names, which the checkpoint holds too, states stay with their
    parameters when the order has changed.

    Raises:
        CheckpointError: The optimizers have other parameters, groups or kinds than those that were
            saved.
    """
    states = checkpoint["optimizer_states"]
    saved = checkpoint[METADATA_KEY].get("optimizers")
    if len(states) != len(optimizers):
        raise CheckpointError(
            f"The checkpoint holds the state of {len(states)} optimizers, and "
            f"configure_optimizers returned {len(optimizers)}. {_RESUME_ALIKE}"
        )
    if saved is None:
        return list(states)
    found = []
    now = optimizer_names(optimizers, modules_by_name(model))
    for state, groups, names in zip(states, saved, now, strict=True):
        if list(map(sorted, groups)) != list(map(sorted, names)):
            raise CheckpointError(_other_parameters(groups, names))
        places = dict(
            zip(_flat(groups), _flat([g["params"] for g in state["param_groups"]]), strict=True)
        )
        order = [places[name] for name in _flat(names)]
        numbers = iter(range(len(order)))
        found.append(
            {
                "state": {
                    new: state["state"][old]
                    for new, old in enumerate(order)
                    if old in state["state"]
                },
                "param_groups": [
                    {**group, "params": [next(numbers) for _ in group["params"]]}
                    for group in state["param_groups"]
                ],
            }
        )
    return found


_RESUME_ALIKE = (
    "Resume with the optimizers and the parameter groups that were saved, or start a new fit after "
    "load_adapter(model, path)."
)


def _other_parameters(saved: list[list[str]], now: list[list[str]]) -> str:
    before, after = set(_flat(saved)), set(_flat(now))
    if before == after:
        what = f"the parameters are in {len(now)} groups, and were in {len(saved)}"
        if len(now) == len(saved):
            what = "the parameters are divided otherwise into groups"
    else:
        what = "; ".join(
            f"{label}: {listed(sorted(names), limit=3)}"
            for label, names in (("only saved", before - after), ("only now", after - before))
            if names
        )
    return f"The checkpoint's optimizer state does not fit the optimizer ({what}). {_RESUME_ALIKE}"


def _flat(groups: Iterable[Iterable[Any]]) -> list[Any]:
    return [each for group in groups for each in group]


def _reason(error: BaseException) -> str:
    """What torch says of the object that it does not load, without its advice."""
    found = re.search(r"Unsupported (?:global|operand).*?(?=\. |\n|$)", str(error))
    return found[0] if found else first_line(error)
