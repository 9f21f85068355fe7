"""From settings and a model to a `Plan`. Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.fused import fused_projections, query_and_value
from lightning_lora.layers import LoRALayer, adapted_class
from lightning_lora.matching import (
    inside,
    key_matches,
    suggest,
    value_for,
)
from lightning_lora.names import modules_by_name
from lightning_lora.obstacles import (
    find_obstacles,
    refuse_lazy,
)
from lightning_lora.plan import Plan, Target
from lightning_lora.quantization import count_parameters, quantized_layers
from lightning_lora.selection import is_excluded, select_layers
from lightning_lora.slices import Slices
from lightning_lora.start import PRIOR, START, keeps_start
from lightning_lora.tokens import token_targets
from lightning_lora.trained import saved_modules, trained_parameters


def make_plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Decide which layers are adapted, with which ranks, and which base parameters train.

    Args:
        model: Any module that has no LoRA yet.
        config: The settings.

    Raises:
        TargetError: A pattern matched nothing (with the nearest names), or a layer that cannot be
            adapted.
    """
    modules = modules_by_name(model)
    refuse_lazy(modules)
    saved = saved_modules(modules, config)
    if config.r == 0:
        return _without_factors(model, config, saved)
    obstacles = find_obstacles(modules, config.dropout, config.use_dora)
    slices = _slices(modules, config, saved, obstacles)
    names, matches, skipped = select_layers(modules, config, saved, obstacles, slices)
    _refuse_quantized(model, saved)
    targets = tuple(_targets(modules, names, config, slices, set(quantized_layers(model))))
    matches += _key_counts("rank_pattern", config.rank_pattern, names)
    matches += _key_counts("alpha_pattern", config.alpha_pattern, names)
    return Plan(
        targets=targets,
        trained=tuple(trained_parameters(model, config, saved, set(names))),
        saved_modules=saved,
        matches=tuple(matches),
        skipped=tuple(skipped),
        base_parameters=count_parameters(model),
        tokens=tuple(token_targets(modules, config, saved, names)),
    )


def _without_factors(model: nn.Module, config: LoRAConfig, saved: tuple[str, ...]) -> Plan:
    """The plan of the baselines that train a part of the model itself: probes, BitFit."""
    _refuse_quantized(model, saved)
    trained = tuple(trained_parameters(model, config, saved, set()))
    tokens = tuple(token_targets(modules_by_name(model), config, saved, ()))
    if not trained and not tokens:
        raise TargetError(
            "Nothing would train: r=0 adapts no layer, and no head, bias, norm or embedding is set "
            "to train. Name the head in modules_to_save, or set bias='all', train_layer_norms, "
            "train_embeddings or trainable_token_indices; or give r a rank."
        )
    return Plan((), trained, saved, (), (), count_parameters(model), tokens)


def _refuse_quantized(model: nn.Module, saved: tuple[str, ...]) -> None:
    for name in quantized_layers(model):
        if inside(name, saved):
            raise TargetError(
                f"modules_to_save: {name!r} is quantized, and a quantized weight cannot train. "
                "Load the model with it left out of the quantization (llm_int8_skip_modules of a "
                "BitsAndBytesConfig, ignore_modules of BitsandbytesPrecision), or adapt it."
            )


def _slices(
    modules: dict[str, nn.Module],
    config: LoRAConfig,
    saved: tuple[str, ...],
    obstacles: dict[str, str | None],
) -> dict[str, Slices]:
    """The parts of layers that have factors of their own, by the layer's name."""
    found = {}
    for name, module in modules.items():
        adapted = adapted_class(type(module))
        if adapted is not None and obstacles[name] is None:
            parts = adapted.slices(module, query_and_value=config.target_modules == "qv")
            if parts is not None:
                found[name] = parts
    for name in fused_projections(modules) if config.target_modules == "qv" else ():
        if is_excluded(name, config) or inside(name, saved):
            continue
        adapted = adapted_class(type(modules[name]))
        if adapted is None or obstacles[name] is not None:
            raise TargetError(
                f"target_modules='qv': {name!r} holds the query, key and value projections and "
                f"cannot be adapted: {obstacles[name]}."
            )
        rows = adapted.factor_shapes(modules[name], r=1)[1][0]
        found[name] = query_and_value(name, rows, modules)
    return found


def _targets(
    modules: dict[str, nn.Module],
    names: list[str],
    config: LoRAConfig,
    slices: dict[str, Slices],
    quantized: set[str],
) -> Iterator[Target]:
    first_with: dict[int, str] = {}
    layouts: dict[str, tuple[object, ...]] = {}
    for name in names:
        module = modules[name]
        adapted = adapted_class(type(module))
        assert adapted is not None
        r = value_for(config.rank_pattern, name, config.r)
        alpha = value_for(config.alpha_pattern, name, config.alpha)
        A_shape, B_shape = adapted.factor_shapes(module, r)
        parts = slices.get(name)
        if parts is not None:
            A_shape, B_shape = parts.shapes(A_shape, B_shape)
            if config.use_dora:
                raise TargetError(
                    f"use_dora: target_modules='qv' adapts parts of the fused projection {name!r}, "
                    "and a magnitude belongs to a whole layer. Adapt all of it with "
                    "target_modules='attention' or by name, or set use_dora to false."
                )
        weights = adapted.weights(module, parts)
        first = first_with.setdefault(id(getattr(module, weights[0])), name)
        # Which way round the weight lies is part of what its factors mean.
        layout = (A_shape, B_shape, adapted.zero_factor, adapted.out_dim)
        if layouts.setdefault(first, layout) != layout:
            raise TargetError(
                f"{name!r} and {first!r} share one weight, but their factors have other shapes "
                f"(A {A_shape} and {layouts[first][0]}) or an update that lies the other way "
                "round, so they cannot share those. Leave one of them out with exclude_modules: it "
                "keeps the base weight, and a merge unties it."
            )
        yield Target(
            name=name,
            kind=type(module).__name__,
            r=r,
            alpha=alpha,
            scaling=config.scaling(r, alpha),
            A_shape=A_shape,
            B_shape=B_shape,
            tied_to=None if first == name else first,
            slices=parts,
            weights=weights,
            dora=config.use_dora,
            frozen=_frozen(adapted, config, name in quantized),
            keeps_start=keeps_start(config.init),
            keeps_prior=config.loftq_iter > 1 and name in quantized,
        )


def _frozen(adapted: type[LoRALayer], config: LoRAConfig, is_quantized: bool) -> tuple[str, ...]:
    """What stays as it starts: the factor that is drawn, and what goes with the factors."""
    frozen = ["A" if adapted.zero_factor == "B" else "B"] if config.freeze_A else []
    if keeps_start(config.init):
        frozen += START.values()
    if config.loftq_iter > 1 and is_quantized:
        frozen += PRIOR.values()
    return tuple(frozen)


def _key_counts(
    setting: str, pattern: Mapping[str, float] | None, names: list[str]
) -> list[tuple[str, str, int]]:
    counts = []
    for key in pattern or {}:
        count = sum(key_matches(key, name) for name in names)
        if not count:
            raise TargetError(
                f"{setting}: {key!r} matches none of the targets. {suggest(key, names)}"
            )
        counts.append((setting, key, count))
    return counts
