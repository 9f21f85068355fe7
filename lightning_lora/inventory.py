"""What a model and its optimizer consist of, in bytes, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_lora.heads import output_heads
from lightning_lora.matching import inside
from lightning_lora.memory import States, nf4_bytes
from lightning_lora.names import modules_by_name
from lightning_lora.strategies.wrapping import find_units

_PROBE = (256, 256)
_EIGHT_BIT = 2.0
_ADAM = 2.0


@dataclass(frozen=True)
class OptimizerMemory:
    """What an optimizer keeps.

    Attributes:
        name: Its class.
        state: Bytes of state for each trained parameter, by dtype.
        copies: Whether its update copies the trained parameters once.
        known: Whether the state was seen and not assumed.
    """

    name: str
    state: dict[torch.dtype, float]
    copies: bool
    known: bool = True


def optimizer_memory(
    factory: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    dtypes: Iterable[torch.dtype],
    device: str,
) -> OptimizerMemory:
    """Let an optimizer take a step on a small matrix and look at the state that it keeps.

    Args:
        factory: Takes parameters.
        dtypes: Of the trained parameters.
        device: `"cpu"` or `"cuda"`: where it will run, which chooses PyTorch's implementation.

    Example:
        >>> adam = optimizer_memory(torch.optim.AdamW, [torch.float32, torch.bfloat16], "cuda")
        >>> [round(adam.state[dtype], 2) for dtype in (torch.float32, torch.bfloat16)]
        [8.0, 4.0]
        >>> optimizer_memory(lambda p: torch.optim.SGD(p, lr=1.0), [torch.float32], "cpu").state
        {torch.float32: 0.0}
    """
    state, known = {}, True
    # SGD without a momentum has no state, and nothing else is asked of an optimizer of none.
    optimizer = factory([nn.Parameter(torch.zeros(_PROBE))])
    for dtype in set(dtypes):
        try:
            state[dtype] = _state_of(factory, dtype)
        except Exception:  # whatever an optimizer that wants a GPU, or a closure, may raise
            known = False
            eight_bit = "8bit" in type(optimizer).__name__.lower()
            state[dtype] = _EIGHT_BIT if eight_bit else _ADAM * dtype.itemsize
    settings = optimizer.defaults
    copies = (
        device == "cuda"
        and "foreach" in settings
        and settings["foreach"] is not False
        and not settings.get("fused")
    )
    return OptimizerMemory(type(optimizer).__name__, state, copies, known)


def _state_of(factory: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> float:
    parameter = nn.Parameter(torch.zeros(_PROBE, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = factory([parameter])
    optimizer.step()
    size = parameter.numel()
    # Counters and tables are a few values, whatever the size of the parameter.
    values = [
        value
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor) and value.numel() > max(_PROBE)
    ]
    return sum(value.numel() * value.element_size() for value in values) / size


def states_of(
    model: nn.Module,
    optimizer: OptimizerMemory,
    compute: torch.dtype,
    quantized: bool = False,
    double_quantization: bool = True,
) -> States:
    """Count what a method keeps of a model.

    Args:
        model: The model, frozen and adapted as it will be trained, in the dtypes that it is stored
            in.
        optimizer: What the optimizer keeps.
        compute: Dtype of the computation.
        quantized: Whether the frozen weights of linear layers other than the head are NF4 (QLoRA).
        double_quantization: Whether their constants are quantized too.
    """
    matrices = _quantizable(model) if quantized else set()
    weights = constants = 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in model.parameters():
        if id(parameter) in matrices:
            stored, extra = nf4_bytes(parameter.numel(), double_quantization)
            weights, constants = weights + stored + extra, constants + extra
        else:
            weights += _bytes(parameter)

    def gathered(parameters: Iterable[nn.Parameter]) -> float:
        return sum(
            p.numel() / 2 if id(p) in matrices else p.numel() * min(compute.itemsize, p.itemsize)
            for p in parameters
        )

    units = _units(model)
    late = units[len(units) // 2 :]
    in_units = {id(parameter) for unit in units for parameter in unit}
    root = [p for p in model.parameters() if id(p) not in in_units]
    gradients = float(sum(map(_bytes, trained)))
    largest = float(max(map(_bytes, trained), default=0))
    return States(
        weights=weights,
        constants=constants,
        buffers=float(sum(map(_bytes, model.buffers()))),
        gradients=gradients,
        optimizer=sum(p.numel() * optimizer.state[p.dtype] for p in trained),
        update=gradients if optimizer.copies else largest,
        unit=max(map(gathered, late), default=0.0),
        unit_gradients=max((gathered(_trained(unit)) for unit in late), default=0.0),
        largest_unit=max(map(gathered, units), default=0.0),
        largest_unit_gradients=max((gathered(_trained(unit)) for unit in units), default=0.0),
        root=gathered(root),
        root_gradients=gathered(_trained(root)),
        dequantized=float(
            max((p.numel() for p in model.parameters() if id(p) in matrices), default=0)
            * compute.itemsize
        ),
        largest_gradient=largest,
    )


def _units(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each module that FSDP gathers at a time, in the order of the model."""
    taken: set[int] = set()
    units = []
    for unit in find_units(model, "auto").values():
        units.append([p for p in unit.parameters() if id(p) not in taken])
        taken.update(map(id, units[-1]))
    return units[::-1]


def _quantizable(model: nn.Module) -> set[int]:
    modules = modules_by_name(model)
    heads = output_heads(modules)
    found = set()
    for name, module in modules.items():
        # The two kinds that bitsandbytes takes: torch's layer and GPT-2's.
        linear = any(kind.__name__ in ("Linear", "Conv1D") for kind in type(module).__mro__)
        weight: Any = getattr(module, "weight", None)
        if linear and not inside(name, heads) and weight is not None and not weight.requires_grad:
            found.add(id(weight))
    return found


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
