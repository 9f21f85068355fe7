"""The adapter's state: what a checkpoint holds, and the audit that stands before every load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.initialization import restore_rounds
from lightning_lora.injection import Injection, persistent_buffers, require_injection
from lightning_lora.names import listed, modules_by_name
from lightning_lora.sharded import reshard, write
from lightning_lora.tokens import CHILD


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The trained state alone: factors, trained base parameters, and the buffers that go with them.

    Buffers count if their module trains (a BatchNorm in ``modules_to_save``) or if they changed
    since the injection. A merged model gives the same state as before the merge.

    Args:
        model: The module that LoRA was injected into.

    Returns:
        Detached tensors by name, sharing memory with the model; shards (`DTensor`) where the model
        is sharded.

    Raises:
        ConfigError: The model has no LoRA.
    """
    record = require_injection(model)
    reshard(model)
    modules = modules_by_name(model)
    state = {
        name: parameter.detach() for name, parameter in trained_parameters(modules, record).items()
    }
    buffers = persistent_buffers(model, modules)
    required = _required_buffers(buffers, record)
    for name, buffer in buffers.items():
        before = record.buffers.get(name)
        if name in required or before is None or not _same(before, buffer):
            state[name] = buffer.detach()
    return state


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], source: str = "the adapter"
) -> None:
    """Load what `adapter_state_dict` gave, all of it or nothing.

    Args:
        model: The module that LoRA was injected into, with the same settings.
        state: Whole tensors by name, also for a sharded model.
        source: What to call the state in errors, for instance its path.

    Raises:
        CheckpointError: A missing, unexpected or wrongly shaped key. Nothing has been loaded then.
        ConfigError: The model has no LoRA, or is merged.
    """
    record = require_injection(model)
    if record.merged:
        raise ConfigError(
            "The model is merged. Call unmerge_lora(model) before loading, or use swap_adapter."
        )
    audit_state(model, state, source)
    reshard(model)
    restore_rounds(model, record.plan, record.originals, state, source)
    record.fresh = record.from_inputs = False
    modules = modules_by_name(model)
    buffers = persistent_buffers(model, modules)
    for name, tensor in {**trained_parameters(modules, record), **buffers}.items():
        if name in state:
            write(tensor, state[name])
        elif name in record.buffers:
            write(tensor, record.buffers[name])


def audit_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "the adapter") -> None:
    """Compare the keys and shapes of a state with what the model would save.

    Raises:
        CheckpointError: What is missing, unexpected or of another shape, and what to do about it.
    """
    record = require_injection(model)
    modules = modules_by_name(model)
    buffers = {
        name: tuple(buffer.shape) for name, buffer in persistent_buffers(model, modules).items()
    }
    shapes = trained_shapes(record)
    expected = {name: shapes[name] for name in trained_parameters(modules, record)}
    expected.update({name: buffers[name] for name in _required_buffers(buffers, record)})
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected and name not in buffers]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in {**buffers, **expected}.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if not (missing or unexpected or misshapen):
        return
    if unexpected and not any(".lora." in name for name in state):
        raise CheckpointError(
            f"{source} holds {len(state)} tensors and no LoRA factors: it is a full-model "
            "checkpoint, not an adapter. Load it into the model before LoRA is injected (for "
            "instance in the LightningModule's __init__), and give ckpt_path an adapter "
            "checkpoint."
        )
    lines = [
        f"\n  {label}: {listed(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
        )
        if names
    ]
    raise CheckpointError(
        f"{source} does not fit the model; nothing was loaded.{''.join(lines)}\n  Use the LoRA "
        "settings and the model that it was saved with."
    )


def trained_shapes(record: Injection) -> dict[str, tuple[int, ...]]:
    """The parameters that train or go with them, and their shapes when they are not sharded."""
    shapes = {parameter.name: parameter.shape for parameter in record.plan.trained}
    for target in record.plan.targets:
        if target.tied_to is None:
            for leaf, shape in target.shapes().items():
                shapes[f"{target.name}.lora.{leaf}"] = shape
    for token_target in record.plan.tokens:
        shape = (len(token_target.indices), token_target.width)
        shapes[f"{token_target.name}.{CHILD}.rows"] = shape
    return shapes


def trained_parameters(
    modules: Mapping[str, nn.Module], record: Injection
) -> dict[str, nn.Parameter]:
    """The parameters of `trained_shapes` that the model has, in the order of its modules.

    Args:
        modules: The model's modules by name.
        record: What was injected.
    """
    places = {name: place for place, name in enumerate(modules)}
    owned = []
    for name in trained_shapes(record):
        owner, _, leaf = name.rpartition(".")
        above, _, child = owner.rpartition(".")
        if owner in places:
            owned.append((places[owner], name, modules[owner]._parameters.get(leaf)))
        elif above in places and (shared := modules[above]._modules.get(child)) is not None:
            # Rows of a table that several embeddings share are among the modules once, with the
            # first of those.
            owned.append((places[above], name, shared._parameters.get(leaf)))
    found = {}
    for _, name, parameter in sorted(owned, key=lambda each: each[0]):
        if parameter is not None:
            found[name] = parameter
    for name, layer in record.replaced.items():
        # A merge may have put a copy in another dtype in the place of a bias that trains.
        if layer.bias is not None and f"{name}.bias" in found:
            found[f"{name}.bias"] = layer.bias
    return found


def _same(before: Tensor, now: Tensor) -> bool:
    # A conversion of the whole model (.to(bfloat16)) is no change of the buffer.
    return torch.equal(before.to(now.dtype), now.to(before.device))


def base_buffers(record: Injection) -> dict[str, Tensor]:
    """The buffers that `adapter_state_dict` always holds, with the base's values: PEFT saves those
    of modules that train whole alone.
    """
    return {name: record.buffers[name] for name in _required_buffers(record.buffers, record)}


def _required_buffers(buffers: Iterable[str], record: Injection) -> set[str]:
    owners = {name.rpartition(".")[0] for name in (p.name for p in record.plan.trained)}
    return {name for name in buffers if name.rpartition(".")[0] in owners}
