"""The states of all ranks in a checkpoint, and which of them a rank goes on from."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.places import IDLE


def gather_states(mine: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The states of all ranks; a collective call in a distributed run.

    Args:
        mine: The state of this rank: tensors and primitives.
        world_size: How many ranks there are.

    Returns:
        What a checkpoint holds.
    """
    ranks: list[Any] = [mine]
    if world_size > 1 and torch.distributed.is_initialized():
        ranks = [None] * world_size
        torch.distributed.all_gather_object(ranks, mine)
    return {"version": 1, "ranks": ranks}


def choose_state(
    loaded: dict[str, Any] | None, rank: int, world_size: int
) -> dict[str, Any] | None:
    """The state that a rank goes on from; warns where the run cannot be continued exactly.

    Args:
        loaded: What `gather_states` returned, or None where a checkpoint was written without it.
        rank: The number of this rank.
        world_size: How many ranks there are now.

    Returns:
        The rank's state, or None where there is nothing to go on from.
    """
    if loaded is None:
        rank_zero_warn(
            "The checkpoint holds no exact-resume state (it was written without it), so"
            " dropout, shuffling and the position within the epoch are not those of the first"
            " run."
        )
        return None
    ranks: list[dict[str, Any]] = loaded["ranks"]
    if ranks[0]["place"] == IDLE:
        return None
    if len(ranks) == world_size:
        return ranks[rank]
    rank_zero_warn(
        f"The checkpoint was written by {len(ranks)} processes and is resumed by"
        f" {world_size}: the number of batches that each process has trained in"
        " this epoch is kept, but not the random states or gradients in accumulation, so the"
        " resumed run is not the exact continuation. Use as many processes for that."
    )
    return {**ranks[0], "rng": None, "iteration": None, "gradients": {}}
