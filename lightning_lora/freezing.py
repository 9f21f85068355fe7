"""What trains and what does not, after the factors are in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.errors import ConfigError
from lightning_lora.layers import Masters
from lightning_lora.matching import inside
from lightning_lora.names import clean_name, listed, modules_by_name, parameters_of
from lightning_lora.plan import Plan
from lightning_lora.quantization import quantized_layers
from lightning_lora.quantized_biases import keep_biases

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def freeze(model: nn.Module, plan: Plan) -> None:
    """Let the factors and the plan's base parameters train, and nothing else.

    Frozen normalisation layers with running statistics (BatchNorm) stay in evaluation mode,
    whatever the mode of the model, so that their statistics stay those of the base. Calling it
    again repairs what others changed.
    """
    modules = modules_by_name(model)
    for _, parameter, wanted in _wanted(modules, plan):
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)
    trained = {parameter.name for parameter in plan.trained}
    layers = quantized_layers(model).items()
    keep_biases(layer for name, layer in layers if f"{name}.bias" in trained)
    for name, module in modules.items():
        if isinstance(module, _NormBase) and module.track_running_stats:
            trains = any(parameter.requires_grad for parameter in module.parameters())
            if not trains and not inside(name, plan.saved_modules):
                _hold_in_evaluation(module)


def refuse_unfrozen(model: nn.Module, plan: Plan) -> None:
    """Stop before a base that was unfrozen is trained, which no checkpoint would hold.

    Args:
        model: The adapted model.
        plan: What trains.

    Raises:
        ConfigError: Parameters require gradients that are to stay as they are.
    """
    unfrozen = [
        name
        for name, parameter, wanted in _wanted(modules_by_name(model), plan)
        if parameter.requires_grad and not wanted
    ]
    if unfrozen:
        raise ConfigError(
            f"{len(unfrozen)} parameters of the frozen base were unfrozen during the fit: "
            f"{listed(unfrozen, limit=3)}. Checkpoints hold the adapter alone, so what they learn "
            "would be lost. Name what is to train whole in modules_to_save (or bias, "
            "train_layer_norms, train_embeddings), and leave requires_grad to LoRACallback."
        )


def _wanted(
    modules: Mapping[str, nn.Module], plan: Plan
) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Each parameter with its name, and whether it trains."""
    trained = {parameter.name for parameter in plan.trained}
    factors = {
        id(parameter)
        for module in modules.values()
        if isinstance(module, Masters)
        for leaf, parameter in module._parameters.items()
        if leaf not in module.frozen
    }
    for name, parameter in parameters_of(modules).items():
        yield name, parameter, id(parameter) in factors or name in trained


def release(model: nn.Module, requires_grad: Collection[str]) -> None:
    """Undo `freeze`: exactly the named parameters require gradients again."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(clean_name(name) in requires_grad)
    for module in model.modules():
        if isinstance(module, _NormBase):
            remove_hook(module, _enter_evaluation)
            remove_hook(module, _leave_evaluation)


def check_dtype(name: str | None) -> torch.dtype | None:
    """The dtype with this short name.

    Raises:
        ConfigError: An unknown name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(
            f"frozen_dtype must be null or one of {', '.join(map(repr, DTYPES))}, got {name!r}"
        )
    return DTYPES[name]


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen matrices of the base; vectors (norms, biases), factors and everything that
    trains keep their precision.

    Under autocast this saves the cast of each frozen weight in every forward pass, and the copy
    kept for backward.
    """
    # Packed weights may be stored in a floating-point dtype whose values mean nothing.
    left_out = {id(layer.weight) for layer in quantized_layers(model).values()}
    for module in model.modules():
        if isinstance(module, Masters):
            left_out.update(map(id, module.parameters()))
    for parameter in model.parameters():
        if id(parameter) in left_out:
            continue
        if not parameter.requires_grad and parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _hold_in_evaluation(module: nn.Module) -> None:
    """Let a layer run in evaluation mode; its flag stays the user's between its forward passes."""
    if _enter_evaluation not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_enter_evaluation)
        # Checkpointing ends what it computes again by an exception.
        module.register_forward_hook(_leave_evaluation, always_call=True)


def _enter_evaluation(module: nn.Module, args: Any) -> None:
    module._lightning_lora_mode = module.training  # type: ignore[assignment]
    module.training = False


def _leave_evaluation(module: nn.Module, args: Any, output: Any) -> None:
    module.training = module._lightning_lora_mode  # type: ignore[assignment]


def remove_hook(module: nn.Module, hook: Any) -> bool:
    """Take a forward hook away, found by the function itself, so that no handle has to be kept.

    Returns:
        Whether the module had it.
    """
    found = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
            found = True
    return found
