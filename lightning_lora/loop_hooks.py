"""Methods of Lightning's loops, wrapped for a while.

This module, `lightning_lora.epoch_iterator`, `lightning_lora.places` and `lightning_lora.resume`
are the only ones that know private parts of the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from lightning_lora.errors import LightningLoRAError

_PRIVATES = {
    "fit_loop": (
        "reset on_advance_start on_advance_end _load_combined_loader_states _combined_loader"
        " _last_train_dl_reload_epoch _resuming_from_checkpoint _restarting is_resuming"
        " epoch_progress epoch_loop"
    ),
    "fit_loop.epoch_loop": (
        "reset on_run_start advance on_advance_end batch_progress restarting val_loop"
        " update_lr_schedulers _num_ready_batches_reached _get_monitor_value _skip_next_val"
    ),
    "fit_loop.epoch_loop.val_loop": (
        "run setup_data _on_evaluation_end _combined_loader _has_run restarting"
    ),
}


def require_privates(trainer: Trainer) -> None:
    """Make sure that the loops are those that `lightning_lora.resume` was written for.

    Args:
        trainer: The trainer whose loops are to be followed.

    Raises:
        LightningLoRAError: This version of Lightning lacks a private part that is needed.
    """
    missing = [] if hasattr(CombinedLoader([]), "_iterator") else ["CombinedLoader._iterator"]
    for path, names in _PRIVATES.items():
        owner: Any = trainer
        for part in path.split("."):
            owner = getattr(owner, part, None)
        missing += [f"{path}.{name}" for name in names.split() if not hasattr(owner, name)]
    if missing:
        raise LightningLoRAError(
            "Exact resume relies on private parts of Lightning that this version does not have:"
            f" {', '.join(missing)}. Install lightning>=2.6,<2.7, or pass exact_resume=False to"
            " go on without it (a resumed run then differs from an uninterrupted one)."
        )


class LoopHooks:
    """The methods that are wrapped; on the instances of the loops, whose classes stay as they are.

    Attributes:
        installed: Whether any is.
    """

    def __init__(self) -> None:
        self._wrapped: list[tuple[Any, str]] = []

    @property
    def installed(self) -> bool:
        """Whether any method is wrapped."""
        return bool(self._wrapped)

    def wrap(self, loop: Any, name: str, around: Callable[..., Any]) -> None:
        """Call ``around(original, *args, **kwargs)`` in the place of a method.

        Args:
            loop: Whose method it is.
            name: Its name.
            around: What is called.
        """
        original = getattr(loop, name)
        setattr(loop, name, lambda *args, **kwargs: around(original, *args, **kwargs))
        self._wrapped.append((loop, name))

    def undo(self) -> None:
        """Leave the loops as Lightning made them."""
        for loop, name in self._wrapped:
            vars(loop).pop(name, None)
        self._wrapped.clear()
