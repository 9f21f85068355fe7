"""Names of parameters and modules, free of what wrappers put into them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

# torch.compile, activation checkpointing and FSDP1 each put a level of their own into names.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_MARKS = re.compile("|".join(_WRAPPERS))


def clean_name(name: str) -> str:
    """The name a parameter or module has without wrappers around it or any of its ancestors.

    >>> clean_name("model._orig_mod.layer.weight")
    'model.layer.weight'
    """
    if not _MARKS.search(name):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b", "c"], limit=2)
    'a, b, ... 1 more'
    """
    more = f", ... {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def corresponding(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Names of a model among those of the same model inside, or outside of, something else.

    One beginning is exchanged for another, the same for all names: the pair that most names bear
    out, and of those the shortest.

    Returns:
        The known name of each name that has one.

    >>> corresponding(["model.bert.layer.0.q", "model.head"], ["layer.0.q", "layer.1.q"])
    {'model.bert.layer.0.q': 'layer.0.q'}
    """
    names, known = list(names), set(known)
    by_end: dict[str, list[str]] = defaultdict(list)
    for each in known:
        for beginning, end in _splits(each):
            by_end[end].append(beginning)
    pairs = Counter(
        (old, new) for name in names for old, end in _splits(name) for new in by_end.get(end, ())
    )
    if not pairs:
        return {}
    old, new = min(pairs, key=lambda pair: (-pairs[pair], len(pair[0]) + len(pair[1]), pair))
    renamed = {name: new + name.removeprefix(old) for name in names if name.startswith(old)}
    return {name: other for name, other in renamed.items() if other in known}


def _splits(name: str) -> list[tuple[str, str]]:
    parts = name.split(".")
    return [
        ("".join(f"{part}." for part in parts[:depth]), ".".join(parts[depth:]))
        for depth in range(len(parts))
    ]


def shortened(layers: Sequence[str]) -> list[str]:
    """Names without the components that all of them begin with, and those that only fill.

    >>> shortened(["model.layer.0.self.query", "model.layer.1.self.value"])
    ['0.query', '1.value']
    """
    split = [name.split(".") for name in layers]
    columns = [set(parts) for parts in zip(*split, strict=False)]
    if len({len(parts) for parts in split}) > 1:
        common = next((d for d, parts in enumerate(columns) if len(parts) > 1), 0)
        return [".".join(parts[common:]) for parts in split]
    kept = [d for d, parts in enumerate(columns) if len(parts) > 1] or [len(columns) - 1]
    return [".".join(parts[d] for d in kept) for parts in split]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, under its clean name; in the place of a wrapper stands what it wraps."""
    return dict(_walk(model))


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # What named_modules does, without nested generators: checkpoints of small adapters on large
    # bases would spend most of their time there.
    seen = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None:
                left.append((name if key in _WRAPPERS else prefix + key, child))


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter once, by its clean name.

    Args:
        modules: The model's modules by name.
    """
    seen = set()
    found = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}" if name else key] = parameter
    return found


def unwrap(module: nn.Module) -> nn.Module:
    """What the wrappers around a module wrap, or the module itself."""
    while inner := next(
        (module._modules[key] for key in _WRAPPERS if key in module._modules), None
    ):
        module = inner
    return module


def persistent_buffers(
    model: nn.Module, modules: Mapping[str, nn.Module] | None = None
) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name.

    Args:
        model: The model.
        modules: Its modules by name, where they are known.
    """
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in (modules or modules_by_name(model)).items()
        if module._buffers
        for key, buffer in module._buffers.items()
        if buffer is not None
        and key not in module._non_persistent_buffers_set
        and not buffer.is_meta
    }
