"""Which modules become units of sharding: gathered, computed and freed one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRALayer, Masters
from lightning_lora.layers.tokens import TokenLayer
from lightning_lora.names import clean_name, listed
from lightning_lora.sharded import is_sharded

Policy = str | int | Sequence[str]


def find_units(model: nn.Module, policy: Policy) -> dict[str, nn.Module]:
    """The modules to shard as units, inner ones before those around them.

    A module that shares parameters with the rest of the model (an embedding tied to the head) is
    never a unit, nor is an adapted layer on its own.

    Args:
        model: The model; it is no unit itself.
        policy: ``"auto"`` takes the transformer blocks that a Hugging Face model names
            (``_no_split_modules``), and else the elements of the outermost `torch.nn.ModuleList`
            and `torch.nn.Sequential` of equal elements. A list of class names takes the instances
            of these classes. A number takes modules with at least so many parameters that are in
            no unit yet.

    Raises:
        ConfigError: A class name that no module has, or an invalid policy.
    """
    if isinstance(policy, bool) or not isinstance(policy, (str, int, Sequence)):
        raise ConfigError(f"auto_wrap_policy must be 'auto', class names or a number: {policy!r}")
    candidates = {
        clean_name(name): module for name, module in model.named_modules() if _can_be_unit(module)
    }
    candidates.pop("", None)
    if isinstance(policy, int):
        chosen = set(_by_size(model, policy, set(map(id, candidates.values()))))
    elif policy == "auto":
        chosen = _blocks(model, candidates) or _elements(model)
    else:
        chosen = _of_classes(candidates, [policy] if isinstance(policy, str) else policy)
    units = {name: module for name, module in candidates.items() if id(module) in chosen}
    outside = _shared_with_the_rest(model, units)
    return dict(reversed([(name, unit) for name, unit in units.items() if name not in outside]))


def _can_be_unit(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, LoRALayer, TokenLayer, Masters)):
        return False
    parameters = list(module.parameters())
    return bool(parameters) and not any(is_sharded(parameter) for parameter in parameters)


def _blocks(model: nn.Module, candidates: dict[str, nn.Module]) -> set[int]:
    named: set[str] = set()
    for module in model.modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    return {id(module) for module in candidates.values() if type(module).__name__ in named}


def _elements(model: nn.Module) -> set[int]:
    found: set[int] = set()

    def visit(module: nn.Module) -> None:
        elements = list(module.children())
        if (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(elements) > 1
            and len({type(element) for element in elements}) == 1
            and any(elements[0].children())
        ):
            found.update(map(id, elements))
            return
        for element in elements:
            visit(element)

    visit(model)
    return found


def _of_classes(candidates: dict[str, nn.Module], names: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for wanted in names:
        matching = [
            id(module)
            for module in candidates.values()
            if wanted in {ancestor.__name__ for ancestor in type(module).__mro__}
        ]
        if not matching:
            classes = sorted({type(module).__name__ for module in candidates.values()})
            raise ConfigError(
                f"auto_wrap_policy: no module of class {wanted!r} could be a unit. The model has "
                f"{listed(classes, limit=12)}."
            )
        found.update(matching)
    return found


def _by_size(model: nn.Module, minimum: int, candidates: set[int]) -> Iterator[int]:
    if minimum < 1:
        raise ConfigError(f"auto_wrap_policy as a number must be at least 1, got {minimum}")
    chosen: list[int] = []

    def visit(module: nn.Module) -> int:
        left = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        left += sum(visit(child) for child in module.children())
        if left >= minimum and id(module) in candidates and module is not model:
            chosen.append(id(module))
            return 0
        return left

    visit(model)
    yield from chosen


def _shared_with_the_rest(model: nn.Module, units: dict[str, nn.Module]) -> set[str]:
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    shared = set()
    for name, unit in units.items():
        inside = {id(module) for module in unit.modules()}
        if any(owners[id(parameter)] - inside for parameter in unit.parameters()):
            shared.add(name)
    return shared
