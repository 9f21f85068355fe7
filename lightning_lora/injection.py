"""Carrying out a plan: layers are swapped in place and the rest frozen; and undoing it exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.fast_paths import leave_fast_paths
from lightning_lora.freezing import freeze
from lightning_lora.initialization import check_kinds
from lightning_lora.initialization import initialize as initialize_factors
from lightning_lora.layers import LoRAFactors, LoRALayer, LoRALinear, adapted_class
from lightning_lora.layers.siblings import join_siblings
from lightning_lora.names import modules_by_name, parameters_of, persistent_buffers, unwrap
from lightning_lora.plan import Plan
from lightning_lora.quantization import allow_repacking, keep_trainable
from lightning_lora.sharded import has_other_layout, is_sharded, local, shard_alike
from lightning_lora.targeting import make_plan
from lightning_lora.tokens import add_tokens
from lightning_lora.trained import saved_modules

ATTRIBUTE = "_lightning_lora"


@dataclass
class Replaced:
    """What a quantized layer was before a merge has made it another.

    Attributes:
        layer_class: Its class.
        weight: Its packed weight.
        bias: Its bias.
        attributes: Further attributes that were replaced, by name.
        shard: A copy of this process's part of a sharded weight, which is merged in place.
    """

    layer_class: type[nn.Module]
    weight: nn.Parameter
    bias: nn.Parameter | None
    attributes: dict[str, Any] = field(default_factory=dict)
    shard: Tensor | None = None


@dataclass
class Injection:
    """What was done to a model; kept on the model itself, so that it travels with copies and
    pickles.

    Attributes:
        config: The settings.
        plan: The plan that was carried out.
        requires_grad: Names of the base parameters that required gradients before.
        buffers: Copies of the persistent buffers as they were, by name.
        base_weights: While merged, each adapted parameter and its exact base value, by the
            parameter's name; else empty.
        merged: Whether the factors are merged into the weights.
        merged_into: What a quantized base was replaced by for it; a merge that follows an exchange
            repeats it.
        fingerprint: The base's fingerprint, once it was computed.
        quantization: What a checkpoint says of a quantized base, once it was computed.
        repacked: Names of the 4-bit layers that bitsandbytes was free to repack.
        merge_base: What a merge into a quantized base starts from.
        merge_dtype: The dtype of activations where no unquantized matrix of the model shows it.
        replaced: While merged, what each quantized layer was.
        originals: The packed weights that LoftQ has replaced, by the name of the layer.
        hidden_flags: While merged, what made transformers take a module for a quantized one.
        by_row: Whether it stands for the adapters of a batch's rows, and is none by itself.
        fresh: Whether the factors are still those that the injection has drawn, as far as is known.
        from_inputs: Whether they start from the inputs of their layers.
    """

    config: LoRAConfig
    plan: Plan
    requires_grad: frozenset[str]
    buffers: dict[str, Tensor]
    base_weights: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    merged: bool = False
    merged_into: str = "dequantized"
    fingerprint: str | None = None
    quantization: dict[str, Any] | None = None
    repacked: tuple[str, ...] = ()
    merge_base: str = "dequantized"
    merge_dtype: torch.dtype | None = None
    replaced: dict[str, Replaced] = field(default_factory=dict)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    hidden_flags: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    by_row: bool = False
    fresh: bool = True
    from_inputs: bool = False


def inject_lora(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    seed: int | None = None,
    initialize: bool = True,
    **settings: Any,
) -> Plan:
    """Adapt a model in place and freeze the rest.

    Right after it the model's output is bitwise what it was: B is zero. With ``init="pissa"``,
    ``"olora"`` or ``"orthogonal"``, or rows that train in a tied head, it is so within rounding,
    and ``init="loftq"`` corrects what quantization took away. Injecting the same settings again
    does nothing.

    Args:
        model: Any module.
        config: The settings; or give them as keywords (``r=8, target_modules=["fc1"]``).
        seed: Seed of the factors' initial values; drawn from torch's global generator by default,
            and so reproducible under `lightning.seed_everything`.
        initialize: Whether an ``init`` that depends on the base weights reads them now; not where
            an adapter is loaded next.
        **settings: Fields of `LoRAConfig`.

    Returns:
        The plan that was carried out; it prints as a table.

    Raises:
        ConfigError: Invalid settings, or the model was adapted with other settings before.
        TargetError: The settings do not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plan = inject_lora(model, r=2, alpha=4, target_modules=["0"])
        >>> plan.trainable_parameters, [n for n, p in model.named_parameters() if p.requires_grad]
        (16, ['0.lora.A', '0.lora.B'])
    """
    if config is not None and settings:
        raise ConfigError("Give inject_lora either a LoRAConfig or keyword settings, not both.")
    config = config if config is not None else LoRAConfig.from_dict(settings)
    earlier = injection_of(model)
    if earlier is not None:
        if not alike(model, earlier.config, config):
            raise ConfigError(
                "The model was adapted before with other settings "
                f"({_differences(earlier.config, config)}). Call remove_lora(model) first."
            )
        return earlier.plan
    if type(model).__name__ == "_FabricModule":
        raise ConfigError(
            "Fabric has wrapped this module already. Inject into the module itself, before "
            "fabric.setup, and give that to save_adapter, merge_lora and the others too."
        )
    modules = modules_by_name(model)
    for name, module in modules.items():
        if isinstance(module, LoRALayer) or ATTRIBUTE in module.__dict__:
            raise ConfigError(
                f"{name!r} inside the model was adapted before. Call remove_lora on the module "
                "that it was injected into first, or let one place do the injection."
            )
    plan = make_plan(model, config)
    _refuse_tensor_parallel(modules, plan)
    check_kinds(model, plan, config)
    if seed is None:
        seed = int(torch.randint(2**62, (1,), device="cpu"))
    factors = _build_factors(modules, plan, config, seed)
    repacked = keep_trainable(model)
    originals = {}
    if initialize and plan.targets:
        try:
            originals = initialize_factors(model, plan, factors, config)
        except ConfigError:
            allow_repacking(model, repacked)
            raise
    record = Injection(
        config=config,
        plan=plan,
        requires_grad=frozenset(
            name for name, p in parameters_of(modules).items() if p.requires_grad
        ),
        originals=originals,
        buffers={
            name: b.detach().clone() for name, b in persistent_buffers(model, modules).items()
        },
    )
    for target in plan.targets:
        module = modules[target.name]
        weight = getattr(module, target.weights[0])
        module.lora = factors[target.tied_to or target.name]
        swap_class(module)
        if target.dora and target.tied_to is None:
            assert isinstance(module, LoRALayer)
            module.lora.add_magnitude(module.measure())
        if target.tied_to is None and is_sharded(weight):
            # The units are fixed by now, and the factors belong to none of them.
            shard_alike(module.lora, weight)
    join_targets(modules, plan)
    add_tokens(modules, plan.tokens)
    leave_fast_paths(model)
    record.repacked = repacked
    setattr(unwrap(model), ATTRIBUTE, record)
    freeze(model, plan)
    return plan


def alike(model: nn.Module, first: LoRAConfig, second: LoRAConfig) -> bool:
    """Whether settings mean the same for a model: no modules to save can be said in three ways.

    Args:
        model: The model, adapted or not.
        first: Settings.
        second: Others.
    """
    if first == second:
        return True
    modules = modules_by_name(model)

    def plain(config: LoRAConfig) -> LoRAConfig:
        found = config.modules_to_save
        if found == "auto":
            found = list(saved_modules(modules, config))
        return replace(config, modules_to_save=found or None)

    return plain(first) == plain(second)


def injection_of(model: nn.Module) -> Injection | None:
    """The record of what was injected into a model, or ``None``."""
    record = unwrap(model).__dict__.get(ATTRIBUTE)
    return record if isinstance(record, Injection) else None


def forget_rebuilt(model: nn.Module) -> None:
    """Drop the record of what was injected into layers that are no longer there.

    A LightningModule may build its network anew in each stage.
    """
    record = injection_of(model)
    if record is None or not record.plan.targets:
        return
    modules = modules_by_name(model)
    if not any(
        "lora" in modules[t.name]._modules for t in record.plan.targets if t.name in modules
    ):
        del unwrap(model).__dict__[ATTRIBUTE]


def require_injection(model: nn.Module) -> Injection:
    """The record of what was injected into a model.

    Raises:
        ConfigError: The model has no LoRA, or `lightning_lora.adapter_per_row` runs on it.
    """
    record = injection_of(model)
    if record is None:
        raise ConfigError(
            f"{type(model).__name__} has no LoRA. Call inject_lora on this very module first (not "
            "on a part of it or on a module around it)."
        )
    if record.by_row:
        raise ConfigError(
            "Inside adapter_per_row the model has no adapter of its own to work on. Leave the "
            "context first."
        )
    return record


def swap_class(module: nn.Module) -> None:
    """Make a layer run its factors."""
    adapted = adapted_class(type(module))
    if adapted is None:
        raise TargetError(f"{type(module).__name__} is not a supported layer type.")
    module.__class__ = adapted


def restore_class(module: nn.Module) -> None:
    """Make an adapted layer one of its original class again; its factors stay in place."""
    if isinstance(module, LoRALayer):
        module.__class__ = module.base_class  # type: ignore[assignment]


def _build_factors(
    modules: dict[str, nn.Module], plan: Plan, config: LoRAConfig, seed: int
) -> dict[str, LoRAFactors]:
    factors = {}
    for target in plan.targets:
        if target.tied_to is not None:
            continue
        module = modules[target.name]
        adapted, weight = adapted_class(type(module)), getattr(module, target.weights[0])
        assert adapted is not None and isinstance(weight, Tensor)
        factors[target.name] = LoRAFactors(
            name=target.name,
            A_shape=target.A_shape,
            B_shape=target.B_shape,
            r=target.r,
            alpha=target.alpha,
            scaling=target.scaling,
            dropout=config.dropout,
            init=config.init,
            seed=seed,
            device=local(weight).device,
            dtype=weight.dtype,
            slices=target.slices,
            zero=adapted.zero_factor,
            frozen=target.frozen,
            keeps_start=target.keeps_start,
            keeps_prior=target.keeps_prior,
        ).train(module.training)
    return factors


def join_targets(modules: dict[str, nn.Module], plan: Plan) -> None:
    """Let adapted layers run as one where they read the same input."""
    by_parent: dict[str, list[nn.Module]] = {}
    for target in plan.targets:
        module = modules[target.name]
        if type(module) is LoRALinear:
            by_parent.setdefault(target.name.rpartition(".")[0], []).append(module)
    for layers in by_parent.values():
        join_siblings(layers)


def _refuse_tensor_parallel(modules: dict[str, nn.Module], plan: Plan) -> None:
    for target in plan.targets:
        if any(has_other_layout(getattr(modules[target.name], leaf)) for leaf in target.weights):
            raise ConfigError(
                f"{target.name!r} is split by tensor parallelism, which LoRA does not support: its "
                "gradients would be wrong. Shard the model by fully_shard alone, for instance "
                "with FSDP2Strategy."
            )


def _differences(old: LoRAConfig, new: LoRAConfig) -> str:
    before, after = old.to_dict(), new.to_dict()
    return ", ".join(
        f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]
    )
