"""The memory that a recipe will need by each method, on so many ranks: nothing is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.freezing import cast_frozen, check_dtype
from lightning_lora.injection import inject_lora
from lightning_lora.inventory import OptimizerMemory, optimizer_memory, states_of
from lightning_lora.memory import (
    STRATEGIES,
    RankMemory,
    States,
    Step,
    rank_memory,
    transformer_step,
)
from lightning_lora.plan import Plan
from lightning_lora.recipes.blueprint import BatchShape, build_empty, largest_batch, meter
from lightning_lora.recipes.optimization import build_optimizer
from lightning_lora.recipes.recipe import RecipeModule

METHODS = ("full", "lora", "qlora")
_MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


@dataclass(frozen=True)
class Precision:
    """The numbers that a Trainer computes with.

    Attributes:
        name: Lightning's name.
        mixed: What autocast computes in; None without.
        true: What the model is cast to; None where it stays as it was loaded.
    """

    name: str
    mixed: torch.dtype | None
    true: torch.dtype | None

    @classmethod
    def of(cls, name: str | int | None) -> Precision:
        """Return the precision of that name.

        Raises:
            ConfigError: If the plan cannot count with it.

        Example:
            >>> Precision.of("bf16-mixed").mixed, Precision.of(None).name
            (torch.bfloat16, '32-true')
        """
        text = "32-true" if name is None else str(name)
        text = _ALIASES.get(text, text)
        if text != "32-true" and text not in (*_MIXED, *_TRUE):
            known = ", ".join(("32-true", *_MIXED, *_TRUE))
            raise ConfigError(f"The plan cannot count with trainer.precision {name}, only {known}.")
        return cls(text, _MIXED.get(text), _TRUE.get(text))


@dataclass(frozen=True)
class Row:
    """What a rank needs by a method, with a strategy, on so many ranks."""

    method: str
    strategy: str
    ranks: int
    memory: RankMemory


@dataclass(frozen=True)
class Forecast:
    """What is adapted, what it needs, and what was assumed.

    Attributes:
        plan: What LoRA adapts.
        parameters: Trained parameters and all parameters by method.
        batch: The batch that activations were counted for.
        precision: The Trainer's.
        optimizer: What the optimizer keeps.
        rows: The memory of a rank.
        notes: What had to be assumed, a sentence each.
    """

    plan: Plan
    parameters: dict[str, tuple[int, int]]
    batch: BatchShape
    precision: Precision
    optimizer: OptimizerMemory
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def make_forecast(
    module: RecipeModule,
    datamodule: Any,
    lora: LoRAConfig,
    frozen_dtype: str | None,
    precision: Precision,
    accumulates: bool,
    device: str,
    ranks: Sequence[int],
) -> Forecast:
    """Count the memory of a rank for full fine-tuning, LoRA and QLoRA.

    Args:
        module: A recipe without a model yet; it has one with LoRA on the meta device afterwards.
        datamodule: Its data module, which reads nothing.
        lora: The settings of the adapter.
        frozen_dtype: As for `LoRACallback`.
        precision: The Trainer's.
        accumulates: Whether gradients are accumulated over several batches.
        device: Whose kernels: `"cpu"` or `"cuda"`.
        ranks: Numbers of ranks.

    Raises:
        ConfigError: If the model cannot be found or built.
        TargetError: If the settings of LoRA do not fit the model.
    """
    notes = build_empty(module, datamodule)
    batch = largest_batch(module, datamodule)
    counter = _Counter(module, batch, precision, device, notes)
    with counter.stored(None):
        optimizer = _optimizer(module, device)
        states, steps = {}, {}
        states["full"], steps["full"] = counter.count(optimizer, "full", ranks)
    parameters = {"full": _sizes(module)}
    plan = inject_lora(module, lora, initialize=False)
    parameters["lora"] = parameters["qlora"] = _sizes(module)
    with counter.stored(check_dtype(frozen_dtype)):
        optimizer = _optimizer(module, device)
        for method in ("lora", "qlora"):
            states[method], steps[method] = counter.count(optimizer, method, ranks)
    if not optimizer.known:
        notes.append(
            f"{optimizer.name} takes no step on this machine: "
            f"{max(optimizer.state.values()):g} bytes of state a trained parameter are assumed."
        )
    rows = tuple(
        Row(
            method,
            strategy,
            number,
            rank_memory(states[method], steps[method][strategy], strategy, number, accumulates),
        )
        for method in METHODS
        for strategy in STRATEGIES
        for number in ranks
        if number > 1 or strategy == STRATEGIES[0]
    )
    return Forecast(plan, parameters, batch, precision, optimizer, rows, tuple(notes))


class _Counter:
    """Counts states and steps of one recipe's model."""

    def __init__(
        self,
        module: RecipeModule,
        batch: BatchShape,
        precision: Precision,
        device: str,
        notes: list[str],
    ) -> None:
        self.module, self.batch, self.precision = module, batch, precision
        self.device, self.notes = device, notes
        self._seen: dict[Any, Step] = {}

    @property
    def compute(self) -> torch.dtype:
        """What matrices are multiplied in."""
        if self.precision.mixed is not None:
            return self.precision.mixed
        return next(p.dtype for p in self.module.parameters() if p.ndim > 1)

    @contextmanager
    def stored(self, frozen: torch.dtype | None) -> Iterator[None]:
        """Have the parameters in the dtypes that they are trained in, for a while."""
        with _dtypes_kept(self.module):
            if frozen is not None:
                cast_frozen(self.module, frozen)
            if self.precision.true is not None:
                self.module.to(self.precision.true)
            yield

    def count(
        self, optimizer: OptimizerMemory, method: str, ranks: Sequence[int]
    ) -> tuple[States, dict[str, Step]]:
        """Return what a method keeps, and what its step holds by strategy."""
        states = states_of(self.module, optimizer, self.compute, quantized=method == "qlora")
        mixed = self.precision.mixed
        if mixed is None:
            step = self._step(None)
            return states, dict.fromkeys(STRATEGIES, step)
        with _dtypes_kept(self.module):
            if method == "qlora":
                # Weights come out of the quantization in this dtype: autocast has none to cast.
                cast_frozen(self.module, mixed)
            steps = {"ddp": self._step(mixed)}
        if max(ranks) > 1:
            with _dtypes_kept(self.module):
                # FSDP gathers parameters in the dtype of the computation, and needs no autocast.
                for parameter in self.module.parameters():
                    parameter.data = parameter.data.to(mixed)
                steps["fsdp"] = self._step(None)
        return states, steps

    def _step(self, autocast: torch.dtype | None) -> Step:
        parameters = self.module.parameters()
        key = (autocast, tuple((id(p), p.dtype, p.requires_grad) for p in parameters))
        if key not in self._seen:
            self._seen[key] = self._count_step(autocast)
        return self._seen[key]

    def _count_step(self, autocast: torch.dtype | None) -> Step:
        metered = meter(self.module, self.batch, self.device, autocast)
        if metered is not None:
            return Step(
                metered.activations,
                metered.forward,
                metered.backward,
                metered.backward_with_gradients,
            )
        note = (
            "This model does not run without values: its activations are estimated by the formula "
            "for transformers (see lightning_lora.memory)."
        )
        if note not in self.notes:
            self.notes.append(note)
        config = self.module.model.config.get_text_config()
        head = self.module.model.get_output_embeddings()
        outputs = 0 if head is None else self.batch.rows * self.batch.tokens * config.vocab_size
        step = transformer_step(
            self.batch.rows,
            self.batch.tokens,
            config.hidden_size,
            config.num_hidden_layers,
            outputs,
            self.compute.itemsize,
            bool(self.module.hparams["gradient_checkpointing"]),
        )
        gradients = sum(p.numel() * p.itemsize for p in self.module.parameters() if p.requires_grad)
        return Step(
            step.activations, step.forward, step.backward, step.backward_with_gradients + gradients
        )


@contextmanager
def _dtypes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Put parameters and buffers back as they were."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _optimizer(module: RecipeModule, device: str) -> OptimizerMemory:
    settings = module.hparams
    dtypes = {p.dtype for p in module.parameters() if p.requires_grad}

    def factory(parameters: Any) -> torch.optim.Optimizer:
        probe = torch.nn.ParameterList(parameters)
        return build_optimizer(
            probe, module.optimizer, settings["learning_rate"], settings["weight_decay"]
        )

    return optimizer_memory(factory, dtypes, device)


def _sizes(module: RecipeModule) -> tuple[int, int]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters())
