"""How a strategy lays a model out over processes, and what that means for an adapter's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.directories import is_directory, read_directory, save_directory
from lightning_lora.errors import ConfigError
from lightning_lora.injection import require_injection
from lightning_lora.magnitudes import measuring
from lightning_lora.merging import merge_lora, refuse_ties, unmerge_lora
from lightning_lora.metadata import base_fingerprint, frozen_parameters
from lightning_lora.names import clean_name
from lightning_lora.pretrained import fill_parameters
from lightning_lora.quantization import quantized_layers
from lightning_lora.quantized_merging import MergeReport
from lightning_lora.sharded import (
    all_wholes,
    is_sharded,
    local,
    part_of,
    reshard,
    shard_from,
    whole,
)
from lightning_lora.state import adapter_state_dict, load_adapter_state_dict


class Replicated:
    """The whole model in every process: one device, DDP."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy: Any = strategy

    is_sharded = False

    def setup(
        self, original: Callable[[Trainer], None], trainer: Trainer, model: nn.Module
    ) -> None:
        """Set the strategy up around an injected model."""
        with measuring(model):
            fill_parameters(model, torch.device("cpu"))
        original(trainer)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's state as a checkpoint holds it; a collective call."""
        return adapter_state_dict(model)

    def whole_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's state in whole tensors, on every rank; a collective call."""
        return all_wholes(self.state(model))

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The entries of a model's state dict, each storage once, as whole tensors on the CPU;
        every rank has to take them all.
        """
        reshard(model)
        seen = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield clean_name(name), whole(tensor).cpu()

    def optimizer_state(self, original: Any, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state as a checkpoint holds it; a collective call."""
        state: dict[str, Any] = original(optimizer)
        return state

    def load_state(self, model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
        """Load what `state` gave."""
        load_adapter_state_dict(model, state, source)

    def check_merge(self, model: nn.Module) -> None:
        """Refuse, before the fit, what could not be merged after it."""

    def merge(self, model: nn.Module) -> MergeReport:
        """Merge the factors into the base; a collective call."""
        return merge_lora(model)

    def unmerge(self, model: nn.Module) -> None:
        """Restore the exact base; a collective call."""
        unmerge_lora(model)

    def save(self, original: Any, checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
        """Write a checkpoint; a collective call."""
        original(checkpoint, path, **options)

    def read(self, original: Any, path: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, a file or a folder, whichever strategy has written it."""
        if is_directory(path):
            return read_directory(path)
        checkpoint: dict[str, Any] = original(path, **options)
        return checkpoint

    def load_optimizers(self, original: Any, checkpoint: Mapping[str, Any]) -> None:
        """Load what `optimizer_state` gave for each optimizer."""
        original(checkpoint)


class Sharded(Replicated):
    """Parameters sharded by `torch.distributed.fsdp.fully_shard`."""

    is_sharded = True

    @property
    def _as_directory(self) -> bool:
        return bool(self.strategy._save_distributed_checkpoint)

    @override
    def setup(
        self, original: Callable[[Trainer], None], trainer: Trainer, model: nn.Module
    ) -> None:
        self.agree(model)
        original(trainer)

    @override
    def check_merge(self, model: nn.Module) -> None:
        refuse_ties(model)
        if quantized_layers(model) and require_injection(model).merge_base != "requantized":
            raise ConfigError(
                "A quantized base that is sharded has no room for merged weights in 16 bits. Set "
                "merge_on_fit_end=False and merge the checkpoint in one process "
                "(`lightning-lora merge`, or load_lightning_module), or merge into packed weights "
                "(merge_base='requantized')."
            )

    def agree(self, model: nn.Module) -> None:
        """Make the base the same in all processes before it is sharded, as DDP does."""
        frozen = list(frozen_parameters(model))
        base = set(map(id, frozen))
        # With the factors that are drawn and kept.
        trained = [p for p in model.parameters() if id(p) not in base]
        if any(p.is_meta or is_sharded(p) for p in [*trained, *frozen]):
            return
        # Shards of a head that was initialised without a seed would come from different draws.
        self._broadcast([*trained, *model.buffers()])
        mine = base_fingerprint(model)
        first = self.strategy.broadcast(mine)
        differs = torch.tensor(int(mine != first), device=self.strategy.root_device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(differs)
        if differs:
            self._broadcast(frozen)

    def _broadcast(self, tensors: list[Tensor]) -> None:
        if not torch.distributed.is_initialized():
            return
        device = self.strategy.root_device
        for tensor in tensors:
            moved = tensor.detach().to(device).contiguous()
            torch.distributed.broadcast(moved, src=0)
            tensor.detach().copy_(moved)

    @override
    def state(self, model: nn.Module) -> dict[str, Tensor]:
        state = adapter_state_dict(model)
        return state if self._as_directory else all_wholes(state)

    @override
    def optimizer_state(self, original: Any, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = optimizer.state_dict()
        gather = (lambda t: t.detach()) if self._as_directory else (lambda t: whole(t).cpu())
        state["state"] = {
            index: {
                key: gather(value) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for index, values in state["state"].items()
        }
        return state

    @override
    def save(self, original: Any, checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
        path = Path(self.strategy.broadcast(path))
        if self._as_directory:
            save_directory(checkpoint, path)
        else:
            original(checkpoint, path, **options)

    @override
    def read(self, original: Any, path: Any, **options: Any) -> dict[str, Any]:
        # Rank 0's path may hold a time or a version that other ranks do not know.
        path = self.strategy.broadcast(path)
        load = self.strategy.checkpoint_io.load_checkpoint
        return super().read(load, path, weights_only=options.get("weights_only"))

    @override
    def load_optimizers(self, original: Any, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.strategy.optimizers, states, strict=True):
            self.load_optimizer(optimizer, state)

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load one optimizer's state, of which this process keeps its shards."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shards = {
            index: {
                key: _shard(value, parameters[index]) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": shards})


def _shard(value: Tensor, parameter: Tensor) -> Tensor:
    """A state in the layout of its parameter; states of other shapes (step counts) as they are."""
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    part = part_of(value, parameter).to(device=local(parameter).device, copy=True)
    return shard_from(part, parameter)


def sharding_of(strategy: Strategy) -> Replicated:
    """The layout that belongs to a strategy."""
    if isinstance(strategy, ModelParallelStrategy):
        return Sharded(strategy)
    if isinstance(strategy, FSDPStrategy):
        from lightning_lora.strategies.fsdp1 import FlatSharded

        return FlatSharded(strategy)
    return Replicated(strategy)
