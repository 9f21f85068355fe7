"""Checks of single settings, in words that an error can list."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: object) -> bool:
    """Whether a value is a number above 0."""
    return is_number(value) and value > 0  # type: ignore[operator]


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_rank(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_whole(value) and value >= 1  # type: ignore[operator]


def is_name_list(value: object, empty: bool = False) -> bool:
    """Whether a value is a list of names; an empty one if that is allowed."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return (bool(value) or empty) and all(isinstance(item, str) and item for item in value)


def pattern_problems(name: str, value: object, presets: Sequence[str]) -> list[str]:
    """What is wrong with a preset, a list of suffixes or a regular expression."""
    kinds = f"one of {', '.join(map(repr, presets))}, " if presets else ""
    if isinstance(value, str) and value:
        if value in presets:
            return []
        # Only plain words can be mistyped presets: "attention.*" is an expression, and qkv a name.
        near = difflib.get_close_matches(value.lower(), presets, n=1, cutoff=0.81)
        if near and re.fullmatch(r"[\w -]+", value):
            return [f"{name} {value!r} is unknown: did you mean {near[0]!r}?"]
        try:
            re.compile(value)
        except re.error as error:
            return [f"{name} is not a valid regular expression: {value!r} ({error})"]
        return []
    if not is_name_list(value):
        return [
            f"{name} must be {kinds}a list of name suffixes, or a regular expression, got {value!r}"
        ]
    return []


def mapping_problems(name: str, value: object, accepts: Any, wanted: str) -> list[str]:
    """What is wrong with a mapping of name patterns to values."""
    if value is None:
        return []
    if not isinstance(value, Mapping):
        return [f"{name} must map name patterns to {wanted}, got {value!r}"]
    problems = []
    for pattern, item in value.items():
        if not isinstance(pattern, str):
            problems.append(f"{name}: the name pattern {pattern!r} must be a string")
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{name}: {pattern!r} is not a valid regular expression ({error})")
        if not accepts(item):
            problems.append(f"{name}[{pattern!r}] must be {wanted}, got {item!r}")
    return problems


def choice_problems(name: str, value: object, choices: Sequence[str]) -> list[str]:
    """What is wrong with a value that must be one of a few."""
    if value in choices:
        return []
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return [f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}"]
