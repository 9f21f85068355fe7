"""Names of parameters and modules, free of what wrappers put into them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# torch.compile, activation checkpointing and FSDP1 each put a level of their own into names.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def clean_name(name: str) -> str:
    """The name a parameter or module has without wrappers around it or any of its ancestors.

    >>> clean_name("model._orig_mod.layer.weight")
    'model.layer.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b", "c"], limit=2)
    'a, b, ... 1 more'
    """
    more = f", ... {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, under its clean name; in the place of a wrapper stands what it wraps."""
    return {clean_name(name): module for name, module in model.named_modules()}


def unwrap(module: nn.Module) -> nn.Module:
    """What the wrappers around a module wrap, or the module itself."""
    while inner := next(
        (module._modules[key] for key in _WRAPPERS if key in module._modules), None
    ):
        module = inner
    return module


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in modules_by_name(model).items()
        for key, buffer in module._buffers.items()
        if buffer is not None
        and key not in module._non_persistent_buffers_set
        and not buffer.is_meta
    }
