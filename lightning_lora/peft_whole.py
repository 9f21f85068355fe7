"""Modules that train whole, by the names that PEFT finds them by: it compares the ends of names as
plain text, and adds the heads of a task by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lightning_lora.errors import CheckpointError
from lightning_lora.matching import suffix_matches
from lightning_lora.names import listed
from lightning_lora.plan import Plan

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
# What PEFT trains whole for a task, whatever the settings say.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def trained_whole(plan: Plan) -> list[str]:
    """Names of the modules that PEFT has to train whole: those that are to, norms, embeddings."""
    found = list(plan.saved_modules)
    for parameter in plan.trained:
        owner = parameter.name.rpartition(".")[0]
        if parameter.reason in ("norm", "embedding") and owner not in found:
            found.append(owner)
    return found


def refuse_reached(part: nn.Module, names: Sequence[str]) -> None:
    """PEFT must train no other modules than these.

    Args:
        part: What PEFT will know as the model.
        names: The modules' names in it.

    Raises:
        CheckpointError: A name is the end of another module's name, too.
    """
    for name in names:
        others = [other for other in _reached(part, [name]) if other not in names]
        if others:
            raise CheckpointError(
                f"PEFT compares the ends of names: with {name!r} in modules_to_save it would train "
                f"{listed(others, limit=3)} too. Train these as well, or export the merged model."
            )


def task_type(part: nn.Module, names: Sequence[str]) -> str | None:
    """The task under which PEFT trains these modules of the part and no others.

    With a head that stays frozen, or that is adapted, a task that trains it whole is not named.
    """
    kind = type(part).__name__
    task = next((task for end, task in _TASK_TYPES.items() if kind.endswith(end)), None)
    heads = _HEADS.get(str(task), ())
    return task if all(head in names for head in _reached(part, heads)) else None


def _reached(part: nn.Module, ends: Iterable[str]) -> list[str]:
    ends = tuple(ends)
    return [name for name, _ in part.named_modules(remove_duplicate=False) if name.endswith(ends)]


def whole_from_peft(wanted: Iterable[str], owners: Iterable[str]) -> list[str]:
    """``modules_to_save`` of PEFT by names that mean the same here.

    Args:
        wanted: PEFT's names.
        owners: The names of the modules that the adapter has tensors of.
    """
    ancestors = dict.fromkeys(name for owner in owners for name in _ancestors(owner))
    found = []
    for each in wanted:
        reached = [name for name in ancestors if name.endswith(each)]
        plain = all(suffix_matches(each, name) for name in reached)
        found += [each] if reached and plain else reached
    return list(dict.fromkeys(found))


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
