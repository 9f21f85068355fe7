"""Models built without memory for their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def model_on_meta(auto_class: Any, config: Any, **options: Any) -> Any:
    """Build a model from its config with its parameters on the meta device; buffers are real.

    Args:
        auto_class: A model class of `transformers`, or one of its ``AutoModel`` classes.
        config: Its config.
        **options: For the class's ``from_config``.
    """
    with _parameters_on_meta():
        from_config = getattr(auto_class, "from_config", None) or auto_class._from_config
        return from_config(config, **options)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters begin as `torch.empty`; buffers as computed values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
