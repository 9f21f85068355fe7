"""Answers whose stated place in the context is wrong: found, moved, reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BAD_ANSWERS = ("move", "skip", "refuse")
_EXAMPLES = 3


@dataclass(frozen=True)
class Misplaced:
    """An answer that does not stand where the data say.

    Attributes:
        row: The question's row.
        text: The answer.
        start: Where it is said to start.
        found: What the context has there.
        moved_to: First character and the one after the last of the occurrence nearest to the
            stated place; None where the context does not hold the text.
    """

    row: int
    text: str
    start: int
    found: str
    moved_to: tuple[int, int] | None

    @classmethod
    def find(cls, row: int, context: str, text: str, start: int) -> Misplaced:
        """Describe it, and look for the occurrence nearest to the stated place."""
        places = [(abs(found - start), found) for found in _occurrences(context, text.strip())]
        nearest = min(places)[1] if places else None
        moved = None if nearest is None else (nearest, nearest + len(text.strip()))
        found = context[start : start + len(text)] if start >= 0 else ""
        return cls(row, text, start, found, moved)


def place(context: str, text: str, start: int) -> tuple[int, int] | None:
    """Return the answer's first character and the one after its last, blanks at its ends left out.

    Args:
        context: The text it is taken from.
        text: The answer, not blank.
        start: Where it is said to start.

    Returns:
        None where something else stands there.

    Example:
        >>> place("I saw Rome.", " Rome", 5), place("I saw Rome.", "Rome", 5)
        ((6, 10), None)
    """
    if start < 0 or context[start : start + len(text)] != text:
        return None
    first = start + len(text) - len(text.lstrip())
    return first, first + len(text.strip())


def describe(misplaced: Sequence[Misplaced], where: Sequence[str]) -> str:
    """Say how many answers are misplaced, and show the first of them.

    Args:
        misplaced: The answers, at least one.
        where: Where each stands.
    """
    examples = [
        f"{place}: {answer.text!r:.60} is said to start at {answer.start}, where the context has "
        f"{answer.found!r:.60}"
        for place, answer in list(zip(where, misplaced, strict=True))[:_EXAMPLES]
    ]
    subject = "1 answer does" if len(misplaced) == 1 else f"{len(misplaced)} answers do"
    return f"{subject} not stand where answer_start says. {'; '.join(examples)}."


def _occurrences(context: str, text: str) -> list[int]:
    found, start = [], context.find(text)
    while start >= 0:
        found.append(start)
        start = context.find(text, start + 1)
    return found
