"""FSDP1 (`torch.distributed.fsdp.FullyShardedDataParallel`), where units are flat parameters.

A flat parameter that mixes frozen and trained parts keeps gradients for all of it, so every
`LoRAFactors` is a unit of its own: gathering the factors touches nothing of the base. Parameters
that train in place (biases, norms, heads) lie in the units of their blocks, and cost the gathering
of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp._runtime_utils import _lazy_init
from torch.distributed.fsdp.wrap import CustomPolicy, _Policy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoints import optimizer_names
from lightning_lora.errors import ConfigError
from lightning_lora.injection import (
    persistent_buffers,
    require_injection,
    restore_class,
    swap_class,
)
from lightning_lora.layers import LoRAFactors, LoRALayer
from lightning_lora.merging import factors_are_finite
from lightning_lora.names import clean_name, modules_by_name, unwrap
from lightning_lora.quantization import quantized_layers
from lightning_lora.quantized_merging import MergeReport
from lightning_lora.sharded import in_place_of
from lightning_lora.state import adapter_state_dict, audit_state, trained_shapes
from lightning_lora.strategies.sharding import Sharded
from lightning_lora.strategies.wrapping import find_units
from lightning_lora.tokens import CHILD, restore_tokens, rows_of, swap_tokens


class FlatSharded(Sharded):
    """Parameters sharded by Lightning's `FSDPStrategy`."""

    _root: FullyShardedDataParallel | None = None

    @property
    @override
    def _as_directory(self) -> bool:
        return bool(self.strategy._state_dict_type == "sharded")

    @override
    def setup(
        self, original: Callable[[Trainer], None], trainer: Trainer, model: nn.Module
    ) -> None:
        if self._root is not None:
            # Lightning forgets the wrapper between stages, and would run the bare module's shards.
            self.strategy.model = self._root
            original(trainer)
            return
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ConfigError(
                "The model was wrapped by FullyShardedDataParallel before LoRA was injected. Leave "
                "the wrapping to the strategy: FSDPStrategy(auto_wrap_policy={...}), or "
                "strategy='fsdp2'."
            )
        if not self.strategy.kwargs.get("use_orig_params", True):
            raise ConfigError("LoRA needs FSDPStrategy(use_orig_params=True), the default.")
        if quantized_layers(model):
            raise ConfigError(
                "strategy='fsdp' cannot shard a quantized base: its flat parameters take one dtype "
                "each. Use one device, or strategy='ddp'."
            )
        self.agree(model)
        kwargs = self.strategy.kwargs
        kwargs["auto_wrap_policy"] = _with_factors(kwargs.get("auto_wrap_policy"), model)
        original(trainer)
        self._root = self.strategy.model

    @override
    def state(self, model: nn.Module) -> dict[str, Tensor]:
        state = adapter_state_dict(model)
        for parameters in self._gathered(model, set(trained_shapes(require_injection(model)))):
            for name, parameter in parameters.items():
                state[name] = parameter.detach().to("cpu", copy=True)
        return state

    @override
    def tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        record = require_injection(model)
        beside = [f"{t.name}.lora." for t in record.plan.targets]
        beside += [f"{t.name}.{CHILD}." for t in record.plan.tokens]
        hidden = beside if record.merged else []
        for parameters in self._gathered(model):
            seen = set()
            for name, parameter in parameters.items():
                if id(parameter) not in seen and not name.startswith(tuple(hidden)):
                    seen.add(id(parameter))
                    yield name, parameter.detach().to("cpu", copy=True)
        for name, buffer in persistent_buffers(model).items():
            yield name, buffer.detach().cpu()

    @override
    def load_state(self, model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
        audit_state(model, state, source)
        record = require_injection(model)
        for parameters in self._gathered(model, set(trained_shapes(record)), write=True):
            for name, parameter in parameters.items():
                parameter.data.copy_(state[name])
        for name, buffer in model.named_buffers():
            if (key := clean_name(name)) in state:
                buffer.copy_(state[key])
            elif key in record.buffers:
                buffer.copy_(record.buffers[key])

    @override
    def optimizer_state(self, original: Any, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        assert self._root is not None
        with self._full(rank0_only=True):
            by_name = FullyShardedDataParallel.optim_state_dict(self._root, optimizer)
        if not by_name:
            return {}
        states = {clean_name(name): state for name, state in by_name["state"].items()}
        (groups,) = optimizer_names([optimizer], modules_by_name(self.strategy.lightning_module))
        numbers = {name: n for n, name in enumerate(name for group in groups for name in group)}
        return {
            "state": {numbers[name]: state for name, state in states.items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in names]}
                for group, names in zip(optimizer.state_dict()["param_groups"], groups, strict=True)
            ],
        }

    @override
    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        assert self._root is not None
        names = {id(p): name for name, p in self._root.named_parameters()}
        ordered = [
            clean_name(names[id(p)]) for group in optimizer.param_groups for p in group["params"]
        ]
        by_name = {
            "state": {ordered[index]: values for index, values in state["state"].items()},
            "param_groups": [
                {**group, "params": [ordered[index] for index in group["params"]]}
                for group in state["param_groups"]
            ],
        }
        with self._full(rank0_only=False):
            flat = FullyShardedDataParallel.optim_state_dict_to_load(self._root, optimizer, by_name)
        optimizer.load_state_dict(flat)

    @override
    @torch.no_grad()
    def merge(self, model: nn.Module) -> MergeReport:
        record = require_injection(model)
        if record.merged:
            return MergeReport(record.merge_base)
        modules = modules_by_name(model)
        factors = self.state(model)
        factors_are_finite(record, factors)
        targets = {target.name: target for target in record.plan.targets}
        weights = {
            f"{t.name}.{leaf}"
            for t in record.plan.targets
            if t.tied_to is None
            for leaf in t.weights
        }
        tables = {f"{t.name}.weight": t for t in record.plan.tokens}
        for parameters in self._gathered(model, weights | set(tables), write=True):
            for name, weight in parameters.items():
                if name in tables:
                    record.base_weights[name] = (weight, _my_part(weight).to("cpu", copy=True))
                    rows = factors[f"{tables[name].name}.{CHILD}.rows"].to(weight.device)
                    rows_of(modules, tables[name]).write_into(weight.data, rows)
                    continue
                layer, _, leaf = name.rpartition(".")
                module = modules[layer]
                assert isinstance(module, LoRALayer)
                prefix = f"{layer}.lora."
                wholes = {
                    key.removeprefix(prefix): factor.to(weight.device)
                    for key, factor in factors.items()
                    if key.startswith(prefix)
                }
                with in_place_of(unwrap(module.lora), wholes):
                    delta = module.delta_weights()[leaf]
                    scale = module.merge_scale(weight) if targets[layer].dora else None
                record.base_weights[name] = (weight, _my_part(weight).to("cpu", copy=True))
                after = weight.to(delta.dtype) + delta
                weight.data.copy_((after if scale is None else after * scale).to(weight.dtype))
        for target in record.plan.targets:
            unwrap(modules[target.name].lora).hidden = True  # type: ignore[arg-type, assignment]
            restore_class(modules[target.name])
        restore_tokens(modules, record.plan.tokens)
        record.merged = True
        return MergeReport(record.merge_base)

    @override
    @torch.no_grad()
    def unmerge(self, model: nn.Module) -> None:
        record = require_injection(model)
        if not record.merged:
            return
        modules = modules_by_name(model)
        for parameters in self._gathered(model, set(record.base_weights), write=True):
            for name, weight in parameters.items():
                _, part = record.base_weights[name]
                weight.data.copy_(_joined(part.to(weight.device), weight))
        for target in record.plan.targets:
            unwrap(modules[target.name].lora).hidden = False  # type: ignore[arg-type, assignment]
            swap_class(modules[target.name])
        swap_tokens(modules, record.plan.tokens)
        record.base_weights.clear()
        record.merged = False

    def _gathered(
        self, model: nn.Module, names: set[str] | None = None, write: bool = False
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Unit by unit, the whole parameters (those among ``names``) while they are gathered."""
        root = self._root
        if root is None:
            every = {clean_name(name): p for name, p in model.named_parameters()}
            yield {name: every[name] for name in every if names is None or name in names}
            return
        # Otherwise the first unit that is gathered would take itself for the root.
        _lazy_init(root, root)
        for prefix, unit in root.named_modules():
            if not isinstance(unit, FullyShardedDataParallel):
                continue
            if names is not None and not names.intersection(_own_names(prefix, unit)):
                continue
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write):
                own = _own_names(prefix, unit)
                yield {name: own[name] for name in own if names is None or name in names}

    @contextmanager
    def _full(self, rank0_only: bool) -> Iterator[None]:
        root = self._root
        assert root is not None
        offload = self.strategy.root_device.type != "cpu"
        with FullyShardedDataParallel.state_dict_type(
            root,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
            FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
        ):
            yield


def _own_names(prefix: str, unit: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a unit that are in no unit inside it."""
    found: dict[str, nn.Parameter] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and name != "_flat_param":
                found[clean_name(f"{path}{name}")] = parameter
        for name, child in module.named_children():
            if not isinstance(child, FullyShardedDataParallel):
                visit(child, f"{path}{name}.")

    visit(unit, f"{prefix}." if prefix else "")
    return found


def _with_factors(policy: Any, model: nn.Module) -> Any:
    """A policy that also makes every `LoRAFactors` a unit."""
    if policy is None or isinstance(policy, _Policy):
        units = (
            find_units(model, "auto").values()
            if policy is None
            else policy._run_policy(model, set(), {})
        )
        chosen = {id(unit) for unit in units}
        return CustomPolicy(lambda m: isinstance(m, LoRAFactors) or id(m) in chosen)

    def either(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        if recurse or isinstance(module, LoRAFactors):
            return True
        return bool(policy(module=module, recurse=False, nonwrapped_numel=nonwrapped_numel))

    return either


def _my_part(weight: Tensor) -> Tensor:
    """An equal share of a whole weight: what this rank remembers of it."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    flat = weight.detach().reshape(-1)
    return nn.functional.pad(flat, (0, -flat.numel() % world)).chunk(world)[rank]


def _joined(part: Tensor, like: Tensor) -> Tensor:
    """The whole weight from the shares of all ranks."""
    world = torch.distributed.get_world_size()
    parts = [torch.empty_like(part) for _ in range(world)]
    torch.distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)[: like.numel()].view(like.shape)
