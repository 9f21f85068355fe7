"""Weights that several modules share, where PEFT trains a copy of a module.

Here a shared weight trains in place, and all that share it follow. PEFT copies a module of
``modules_to_save``, and what shares its weight keeps the base's: a tied head computes something
else then. Only ``ensure_weight_tying`` lets a head follow the copy of the input embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError
from lightning_lora.injection import Injection, require_injection
from lightning_lora.matching import inside
from lightning_lora.names import listed, modules_by_name

# By the last components of names alone does PEFT see that there is something to tie.
_SEEN_BY_PEFT = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Ties:
    """Shared weights that PEFT would copy.

    Attributes:
        copies: The other names under which PEFT needs a trained weight, by its name.
        modules: The modules that PEFT has to tie, the embedding first; none if it has nothing to
            tie.
    """

    copies: Mapping[str, tuple[str, ...]]
    modules: tuple[str, ...]


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other names of weights that several modules share, by the first one, without a merge."""
    record = require_injection(model)
    return {names[0]: tuple(names[1:]) for names in _all_names(model, record) if len(names) > 1}


def _all_names(model: nn.Module, record: Injection) -> Iterable[list[str]]:
    found: dict[int, list[str]] = {}
    for owner, module in modules_by_name(model).items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{owner}.{leaf}" if owner else leaf
                # A merge parts the weights of adapted layers from those that share them.
                original, _ = record.base_weights.get(name, (parameter, None))
                found.setdefault(id(original), []).append(name)
    return found.values()


def ties_for_peft(model: nn.Module, prefix: str, whole: Iterable[str]) -> Ties:
    """What PEFT needs so that shared weights stay shared.

    Args:
        model: The module that LoRA was injected into.
        prefix: Path of the part that PEFT will know as the model, with a trailing dot.
        whole: Names of the modules that train whole.

    Raises:
        CheckpointError: PEFT would part them.
    """
    shared = shared_names(model)
    copies: dict[str, tuple[str, ...]] = {}
    tied: list[str] = []
    for parameter in require_injection(model).plan.trained:
        # Biases beside factors train in place in PEFT too.
        if parameter.reason == "bias" or parameter.name not in shared:
            continue
        names = (parameter.name, *shared[parameter.name])
        if not _in_one(names, whole):
            tied += _tied_by_peft(model, prefix, names)
        copies[parameter.name] = names[1:]
    return Ties(copies, tuple(tied))


def _in_one(names: Iterable[str], whole: Iterable[str]) -> bool:
    """Whether a single module holds a weight under all of its names, as does a copy of it."""
    return any(all(inside(name.rpartition(".")[0], [each]) for name in names) for each in whole)


def _tied_by_peft(model: nn.Module, prefix: str, names: tuple[str, ...]) -> list[str]:
    """The modules that share the input embedding, if PEFT ties just them to its copy."""
    part: Any = model.get_submodule(prefix.rstrip("."))
    modules = modules_by_name(part)
    owners = [name.rpartition(".")[0].removeprefix(prefix) for name in names]
    embedding = part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else None
    first = [owner for owner in owners if modules.get(owner) is embedding]
    heads = [owner for owner in owners if owner not in first]
    plain = all(type(modules.get(h)) is nn.Linear and modules[h].bias is None for h in heads)
    seen = any(owner.rpartition(".")[2] in _SEEN_BY_PEFT for owner in owners)
    if not (first and plain and seen and set(heads) == _said_to_be_tied(part, first[0])):
        raise CheckpointError(
            f"PEFT trains a copy of {owners[0]!r}, and would leave {listed(owners[1:], limit=3)}, "
            "which shares its weight, as it is: it would compute something else. Export the merged "
            "model."
        )
    return [prefix + owner for owner in (*first, *heads)]


def _said_to_be_tied(part: nn.Module, embedding: str) -> set[str]:
    """The modules whose weight is that of the embedding by what a Hugging Face model says."""
    if getattr(getattr(part, "config", None), "tie_word_embeddings", None) is False:
        return set()
    found = set()
    for name, module in part.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        start = f"{name}." if name else ""
        for key, source in keys.items() if isinstance(keys, Mapping) else ():
            if start + source == f"{embedding}.weight":
                found.add((start + key).rpartition(".")[0])
    return found


def without_copies(model: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The state of an adapter of PEFT with each shared weight once, by its first name.

    Args:
        model: The module that LoRA was injected into with the settings of the adapter.
        state: The state by the model's names.
        source: What to call the adapter in errors.

    Raises:
        CheckpointError: PEFT has parted a weight that the model shares.
    """
    plan = require_injection(model).plan
    shared = shared_names(model)
    result = dict(state)
    for parameter in plan.trained:
        names = (parameter.name, *shared.get(parameter.name, ()))
        values = {name: result.pop(name) for name in names if name in result}
        if not values:
            continue
        in_place = parameter.reason == "bias" or _in_one(names, plan.saved_modules)
        first = next(iter(values.values()))
        if (len(values) < len(names) and not in_place) or not all(
            torch.equal(first, value) for value in values.values()
        ):
            raise CheckpointError(_parted(source, names, values))
        result[parameter.name] = first
    return result


def _parted(source: str, names: tuple[str, ...], values: Mapping[str, Tensor]) -> str:
    trained = next(iter(values)).rpartition(".")[0]
    others = [owner for name in names if (owner := name.rpartition(".")[0]) != trained]
    weight = f"model.{others[0]}.weight"
    return (
        f"{source} was trained by PEFT with a copy of {trained!r} apart from "
        f"{listed(others, limit=3)}, which shares its weight in this model. Part them before you "
        f"load it with load_adapter: model.config.tie_word_embeddings = False, and {weight} = "
        f"torch.nn.Parameter({weight}.detach().clone()); or train it with ensure_weight_tying=True "
        "of PEFT."
    )
