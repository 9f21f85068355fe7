"""`FSDP2Strategy`: sharding without a line of the user's code."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.init import (
    _has_meta_device_parameters_or_buffers,
    _materialize_distributed_module,
)
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRAFactors, Masters
from lightning_lora.magnitudes import measuring
from lightning_lora.pretrained import fill_parameters
from lightning_lora.quantization import store_as
from lightning_lora.strategies.activations import checkpoint_activations
from lightning_lora.strategies.wrapping import Policy, find_units


class FSDP2Strategy(ModelParallelStrategy):
    """Shard any LightningModule with FSDP2 (`torch.distributed.fsdp.fully_shard`), units found by
    themselves.

    Registered as ``fsdp2``: ``Trainer(strategy="fsdp2")``. The model may be built in ``__init__``,
    ``setup`` or ``configure_model``; one that is sharded in ``configure_model`` already (over
    ``self.device_mesh["data_parallel"]``) is left as it is. With `LoRACallback` the factors are
    injected before, checkpoints gather the adapter alone, and the merge happens on the shards.

    Steps run through the sharded module. Code that calls the model elsewhere (in a hook, for
    instance to generate text) has to do so through `through_root`, on all ranks alike.

    Args:
        auto_wrap_policy: Which modules are gathered and freed as units: ``"auto"``, a list of class
            names, or a number of parameters (`find_units`).
        reshard_after_forward: Free the parameters of a unit after its forward pass and gather them
            again for backward; without it more memory and less communication.
        cpu_offload: Keep parameters, gradients and optimizer state on the CPU.
        activation_checkpointing: Recompute the activations of each unit in backward.
        replicas: How many copies of the sharded model there are (hybrid sharding, a 2-D mesh).
            Ranks that follow each other share one copy: with as many replicas as nodes, each node
            holds one.
        save_distributed_checkpoint: Let each rank write its part to a folder, instead of rank 0 the
            whole to one file.
        process_group_backend: As in Lightning's strategies.
        timeout: As in Lightning's strategies.

    Raises:
        ConfigError: Invalid settings, or a precision that FSDP2 cannot do.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", logger=False)
        >>> type(trainer.strategy).__name__
        'FSDP2Strategy'
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        auto_wrap_policy: str | int | list[str] = "auto",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        activation_checkpointing: bool = False,
        replicas: int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if replicas < 1:
            raise ConfigError(f"replicas must be at least 1, got {replicas}")
        self.auto_wrap_policy: Policy = auto_wrap_policy
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.activation_checkpointing = activation_checkpointing
        self.replicas = replicas
        self._shard_mesh: DeviceMesh | None = None

    @override
    def setup_environment(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        planned = self.num_nodes * self.num_processes
        if environment.creates_processes_externally and environment.world_size() != planned:
            # Lightning compares them only for processes that it starts itself.
            raise ConfigError(
                f"{environment.world_size()} processes were started, and the Trainer has "
                f"devices={self.num_processes} and num_nodes={self.num_nodes}, which makes "
                f"{planned}. Let the launcher and the Trainer ask for the same (torchrun "
                "--nproc_per_node and --nnodes; srun --ntasks-per-node and --nodes)."
            )
        # One dimension of data parallelism over all processes, and none of tensor parallelism.
        self._data_parallel_size = planned
        self._tensor_parallel_size = 1
        super().setup_environment()
        if self.replicas == 1:
            self._shard_mesh = self.device_mesh["data_parallel"]
            return
        if self.world_size % self.replicas:
            raise ConfigError(
                f"replicas={self.replicas} does not divide the {self.world_size} processes."
            )
        self._shard_mesh = init_device_mesh(
            self.root_device.type,
            (self.replicas, self.world_size // self.replicas),
            mesh_dim_names=("replicate", "shard"),
        )

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        if any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules()):
            raise ConfigError(
                "The model holds modules that are wrapped by FullyShardedDataParallel. "
                "strategy='fsdp2' shards by fully_shard: leave the wrapping to the strategy."
            )
        if not any(isinstance(module, FSDPModule) for module in self.model.modules()):
            self._shard(self.model)
        with measuring(self.model):
            fill_parameters(self.model, self._parameter_device)
            if _has_meta_device_parameters_or_buffers(self.model):
                _materialize_distributed_module(self.model, self.root_device)
        self.model_to_device()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting and not self.cpu_offload:
            _optimizers_to_device(self.optimizers, self.root_device)

    def through_root(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the LightningModule as a step is called, with the parameters that belong
        to no inner unit gathered; on all ranks alike.
        """
        module = self.lightning_module
        assert module is not None
        if not isinstance(module, FSDPModule):
            return getattr(module, method)(*args, **kwargs)
        assert isinstance(module, nn.Module)
        return self._forward_redirection(module, module, method, *args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("training_step", self.precision_plugin.train_step_context(), args, kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("validation_step", self.precision_plugin.val_step_context(), args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("test_step", self.precision_plugin.test_step_context(), args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(
            "predict_step", self.precision_plugin.predict_step_context(), args, kwargs
        )

    def _step(
        self, method: str, context: AbstractContextManager[Any], args: Any, kwargs: Any
    ) -> Any:
        with context:
            return self.through_root(method, *args, **kwargs)

    @property
    def _parameter_device(self) -> torch.device:
        return torch.device("cpu") if self.cpu_offload else self.root_device

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.root_device)

    def _shard(self, model: nn.Module) -> None:
        units = find_units(model, self.auto_wrap_policy)
        store_as(model, torch.uint8)  # which no conversion touches
        compute_dtype = self._convert(model)
        store_as(model, compute_dtype or torch.float32)
        if self.activation_checkpointing:
            checkpoint_activations(model, units.values())
        settings: dict[str, Any] = {
            "mesh": self._shard_mesh,
            # Autocast and the modules themselves decide on the dtype of activations.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute_dtype,
                reduce_dtype=None if compute_dtype is None else torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": (
                CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
                if self.cpu_offload
                else OffloadPolicy()
            ),
        }
        if compute_dtype is not None:
            # A magnitude in half precision would be off by more than training moves it.
            whole = {**settings, "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
            for module in list(model.modules()):
                if isinstance(module, LoRAFactors) and module.magnitude is not None:
                    fully_shard(module, reshard_after_forward=self.reshard_after_forward, **whole)
        for unit in units.values():
            fully_shard(unit, reshard_after_forward=self.reshard_after_forward, **settings)
        # What belongs to no unit is needed again at the very start of backward.
        fully_shard(model, reshard_after_forward=False, **settings)

    def _convert(self, model: nn.Module) -> torch.dtype | None:
        """Bring parameters into the dtypes of the Trainer's precision.

        Under autocast parameters are gathered as they are, so that it casts them as on one device
        (`LoRACallback(frozen_dtype="bf16")` halves what is kept and gathered of the frozen ones).
        Trained parameters of one unit need one dtype, and factors are kept in float32: where they
        differ, all that trains is kept in float32 and computed with in the dtype of the rest.

        Returns:
            The dtype that units are gathered in, or ``None`` for each parameter's own.
        """
        plugin = self.precision_plugin
        compute: torch.dtype | None = None
        if isinstance(plugin, MixedPrecision) and plugin.precision != "bf16-mixed":
            raise ConfigError(
                f"precision={plugin.precision!r} needs a gradient scaler, which FSDP2 does not "
                "work with. Use 'bf16-mixed', 'bf16-true', '16-true' or '32-true'."
            )
        if isinstance(plugin, HalfPrecision):
            compute = plugin._desired_input_dtype
            factors = {
                id(parameter)
                for module in model.modules()
                if isinstance(module, Masters)
                for parameter in module.parameters()
            }
            # Not model.to(dtype): rotary tables and the like are buffers, and lose their precision.
            for parameter in model.parameters():
                is_master = id(parameter) in factors or (bool(factors) and parameter.requires_grad)
                if parameter.is_floating_point() and not is_master:
                    parameter.data = parameter.data.to(compute)
        else:
            plugin.convert_module(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        dtypes = {p.dtype for p in trained}
        if len(dtypes) > 1:
            narrow = dtypes - {torch.float32, torch.float64}
            if compute is None and len(narrow) == 1:
                compute = narrow.pop()
            for parameter in trained:
                parameter.data = parameter.data.to(torch.float32)
        return compute


def register() -> None:
    """Make ``Trainer(strategy="fsdp2")`` known to Lightning."""
    if FSDP2Strategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(
            FSDP2Strategy.strategy_name,
            FSDP2Strategy,
            description="FSDP2 with automatic wrapping, from lightning-lora",
        )


register()
