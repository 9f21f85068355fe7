"""Names of parameters, free of what wrappers put into them."""

from __future__ import annotations

# torch.compile, activation checkpointing and FSDP1 each put a level of their own into the names below them.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def clean_name(name: str) -> str:
    """The name a parameter or module has without wrappers around any of its ancestors.

    >>> clean_name("model._orig_mod.layer.weight")
    'model.layer.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
