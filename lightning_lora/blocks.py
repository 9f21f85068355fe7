"""Numbered blocks of a model, and which of its layers lie in the blocks that are asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.matching import suggest
from lightning_lora.names import listed


@dataclass(frozen=True)
class Block:
    """Where a layer lies.

    Attributes:
        stack: Name of the container whose children are the blocks.
        index: Number of the block among them.
    """

    stack: str
    index: int


def block_of(
    name: str, modules: dict[str, nn.Module], patterns: Sequence[str] | None
) -> Block | None:
    """The block that a layer lies in, or is; ``None`` for layers outside all blocks.

    Args:
        name: Name of the layer.
        modules: The model's modules by name.
        patterns: Regular expressions for the ends of the names of containers, as PEFT's
            ``layers_pattern``. Without them the blocks are those of the outermost
            `torch.nn.ModuleList` around the layer, and where there is none, of the outermost
            `torch.nn.Sequential`.

    Example:
        >>> net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])})
        >>> block_of("layers.1", dict(net.named_modules()), None)
        Block(stack='layers', index=1)
    """
    parts = name.split(".")
    stacks = [".".join(parts[:depth]) for depth in range(len(parts)) if parts[depth].isdigit()]
    if patterns is not None:
        ends = re.compile("|".join(rf"(?:.*\.)?(?:{pattern})" for pattern in patterns))
        found = next((stack for stack in stacks if ends.fullmatch(stack)), None)
    else:
        of_kind = (
            (stack for stack in stacks if isinstance(modules[stack], kind))
            for kind in (nn.ModuleList, nn.Sequential)
        )
        found = next((stack for kind in of_kind for stack in kind), None)
    if found is None:
        return None
    return Block(found, int(parts[len(found.split(".")) if found else 0]))


def in_blocks(
    names: Sequence[str],
    modules: dict[str, nn.Module],
    wanted: int | list[int],
    patterns: str | list[str] | None,
) -> tuple[list[str], list[tuple[str, str, int]]]:
    """The layers inside the blocks with these numbers.

    Args:
        names: Names of layers.
        modules: The model's modules by name.
        wanted: Numbers of blocks; negative ones count from the last block of each container.
        patterns: As for `block_of`.

    Returns:
        The names that are left, and for each number how many of them it gave, as
        ``(setting, number, count)``.

    Raises:
        TargetError: Numbers of blocks that hold none of the layers, with those that do.
    """
    listed_patterns = [patterns] if isinstance(patterns, str) else patterns
    blocks = {name: block_of(name, modules, listed_patterns) for name in names}
    held: dict[str, set[int]] = {}
    for block in blocks.values():
        if block is not None:
            held.setdefault(block.stack, set()).add(block.index)
    if not held:
        raise TargetError(_no_blocks(names, modules, listed_patterns))
    sizes = {stack: sum(1 for _ in modules[stack].children()) for stack in held}
    numbers = [wanted] if isinstance(wanted, int) else wanted
    given = dict.fromkeys(numbers, 0)
    left = []
    for name, block in blocks.items():
        if block is None:
            continue
        hits = [n for n in given if block.index == (n if n >= 0 else sizes[block.stack] + n)]
        for number in hits:
            given[number] += 1
        if hits:
            left.append(name)
    empty = [str(number) for number, count in given.items() if not count]
    if empty:
        valid = "; ".join(
            f"{_ranges(sorted(indices))} in {stack or 'the model itself'}"
            + ("" if indices >= set(range(sizes[stack])) else f" (of {sizes[stack]} blocks)")
            for stack, indices in held.items()
        )
        raise TargetError(
            f"layers_to_transform: {', '.join(empty)} is no block that holds a target. "
            f"Blocks with targets: {valid}; negative numbers count from the last block."
        )
    return left, [("layers_to_transform", str(number), count) for number, count in given.items()]


def _no_blocks(
    names: Sequence[str], modules: dict[str, nn.Module], patterns: list[str] | None
) -> str:
    if patterns is None:
        return (
            f"layers_to_transform: none of the targets ({listed(names, limit=3)}) lies in a "
            "ModuleList or Sequential. Name the layers with target_modules instead."
        )
    stacks = [
        name
        for name, module in modules.items()
        if name and isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    asked = ", ".join(map(repr, patterns))
    return (
        f"layers_pattern: {asked} names no container of numbered blocks that hold targets. "
        f"{suggest(patterns[0], stacks) if stacks else 'The model has no such containers.'}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
