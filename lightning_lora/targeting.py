"""From settings and a model to a `Plan`. Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

from lightning_lora.blocks import in_blocks
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.fused import fused_projections, query_and_value
from lightning_lora.heads import output_heads
from lightning_lora.layers import LoRALayer, adapted_class, supported_layers
from lightning_lora.matching import (
    in_attention,
    inside,
    is_query_or_value,
    key_matches,
    pattern_matches,
    suffix_matches,
    suggest,
)
from lightning_lora.names import modules_by_name
from lightning_lora.obstacles import (
    attention_around,
    find_obstacles,
    holds_experts,
    refuse_lazy,
)
from lightning_lora.plan import Plan, Target
from lightning_lora.quantization import count_parameters, quantized_layers
from lightning_lora.slices import Slices
from lightning_lora.start import PRIOR, START, keeps_start
from lightning_lora.tokens import token_targets
from lightning_lora.trained import saved_modules, trained_parameters

N = TypeVar("N", int, float)


def make_plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Decide which layers are adapted, with which ranks, and which base parameters train.

    Args:
        model: Any module that has no LoRA yet.
        config: The settings.

    Raises:
        TargetError: A pattern matched nothing (with the nearest names), or a layer that cannot be
            adapted.
    """
    refuse_lazy(model)
    modules = modules_by_name(model)
    saved = saved_modules(modules, config)
    if config.r == 0:
        return _without_factors(model, config, saved)
    obstacles = find_obstacles(modules, config.dropout, config.use_dora)
    slices = _slices(modules, config, saved, obstacles)
    names, matches, skipped = _target_names(modules, config, saved, obstacles, slices)
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


def _target_names(
    modules: dict[str, nn.Module],
    config: LoRAConfig,
    saved: tuple[str, ...],
    obstacles: dict[str, str | None],
    slices: dict[str, Slices],
) -> tuple[list[str], list[tuple[str, str, int]], list[tuple[str, str]]]:
    adaptable = [name for name, why in obstacles.items() if why is None]
    matches: list[tuple[str, str, int]] = []
    skipped: list[tuple[str, str]] = []
    wanted = config.target_modules
    if wanted in ("all-linear", "qv", "attention"):
        heads = output_heads(modules)
        asked = [
            name
            for name, module in modules.items()
            if _in_preset(str(wanted), name, module, slices)
            and not inside(name, heads)
            and _is_linear(module)
        ]
        chosen = [name for name in asked if obstacles[name] is None]
        skipped += [(name, str(obstacles[name])) for name in asked if obstacles[name] is not None]
        if wanted == "all-linear":
            reason = "the weights of experts, which are adapted by name alone"
            skipped += [(name, reason) for name, module in modules.items() if holds_experts(module)]
        if not chosen:
            hint = suggest("query", adaptable)
            if skipped:
                hint = f"{skipped[0][0]!r} cannot be adapted: {skipped[0][1]}."
            raise TargetError(
                f"target_modules={wanted!r} matched no layer. {hint} "
                f"Name the layers to adapt, for instance target_modules=['fc1', 'fc2']. "
                f"Supported layer types: {', '.join(supported_layers())}."
            )
        matches.append(("target_modules", str(wanted), len(chosen)))
    else:
        chosen = _explicit(modules, config, saved, obstacles, adaptable, matches)
    if config.layers_to_transform is not None:
        wanted_blocks, pattern = config.layers_to_transform, config.layers_pattern
        chosen, counts = in_blocks(chosen, modules, wanted_blocks, pattern)
        matches += counts
    if config.exclude_modules is not None:
        chosen = _without_excluded(modules, chosen, config, matches)
    outers = {name: attention_around(name, modules) for name in chosen}
    chosen = [
        name
        for name, outer in outers.items()
        if not inside(name, saved)
        and not (config.train_embeddings and isinstance(modules[name], nn.Embedding))
        and not (outer is not None and _excluded(outer, config))
    ]
    for name in chosen:
        outer = outers[name]
        if outer is not None and outer not in chosen:
            raise TargetError(
                f"{name!r} is run by {outer!r}, which reads its weights instead of calling it: "
                f"adapt {outer.rpartition('.')[-1]!r} too, or leave both out."
            )
    if not chosen:
        raise TargetError(
            f"No layer is left to adapt: target_modules={wanted!r} matched only layers that "
            "exclude_modules, modules_to_save or train_embeddings take away."
        )
    return chosen, matches, skipped


def _is_linear(module: nn.Module) -> bool:
    """Whether the presets count a module among the linear layers, adaptable or not."""
    adapted = adapted_class(type(module))
    return isinstance(module, nn.Linear) or (adapted is not None and adapted.is_linear)


def _in_preset(preset: str, name: str, module: nn.Module, slices: dict[str, Slices]) -> bool:
    is_attention = isinstance(module, nn.MultiheadAttention)
    if preset == "qv":
        return is_query_or_value(name) or name in slices or is_attention
    return preset == "all-linear" or in_attention(name) or is_attention


def _explicit(
    modules: dict[str, nn.Module],
    config: LoRAConfig,
    saved: tuple[str, ...],
    obstacles: dict[str, str | None],
    adaptable: list[str],
    matches: list[tuple[str, str, int]],
) -> list[str]:
    wanted = config.target_modules
    patterns = [wanted] if isinstance(wanted, str) else wanted
    found: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for name in modules:
        for pattern in pattern_matches(wanted, name):
            found[pattern].append(name)
    problems = []
    for pattern, names in found.items():
        good = [name for name in names if obstacles[name] is None]
        # A pattern may also run over the containers around the layers it means.
        bad = [
            name
            for name in names
            if obstacles[name]
            and not (good and any(modules[name].children()))
            and not inside(name, saved)
            and not _excluded(name, config)
        ]
        if not names:
            hint = ""
            if isinstance(wanted, str) and any(suffix_matches(wanted, name) for name in adaptable):
                hint = f" A single string is a regex for the whole name; write [{wanted!r}]."
            problems.append(f"{pattern!r} matched nothing.{hint} {suggest(pattern, adaptable)}")
        elif bad:
            problems.append(
                f"{pattern!r} matched {bad[0]!r}, which cannot be adapted: {obstacles[bad[0]]}."
            )
        matches.append(("target_modules", pattern, len(good)))
    if problems:
        raise TargetError("target_modules: " + "\n  ".join(problems))
    order = {name: None for name in modules if any(name in names for names in found.values())}
    return [name for name in order if obstacles[name] is None]


def _without_excluded(
    modules: dict[str, nn.Module],
    chosen: list[str],
    config: LoRAConfig,
    matches: list[tuple[str, str, int]],
) -> list[str]:
    excluded = config.exclude_modules
    assert excluded is not None
    patterns = [excluded] if isinstance(excluded, str) else excluded
    hits = {name: pattern_matches(excluded, name) for name in modules}
    targets = set(chosen)
    for pattern in patterns:
        found = [name for name in modules if pattern in hits[name]]
        count = sum(name in targets for name in found)
        # A layer that would not have been adapted anyway may be named to be safe; a container is
        # a mistake, because the layers inside it would still be adapted.
        if not count and not any(not any(modules[name].children()) for name in found):
            raise TargetError(
                f"exclude_modules: {pattern!r} excludes none of the targets. "
                f"{suggest(pattern, chosen)}"
            )
        matches.append(("exclude_modules", pattern, count))
    return [name for name in chosen if not hits[name]]


def _excluded(name: str, config: LoRAConfig) -> bool:
    excluded = config.exclude_modules
    return excluded is not None and bool(pattern_matches(excluded, name))


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
        if _excluded(name, config) or inside(name, saved):
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
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name in names:
        module = modules[name]
        adapted = adapted_class(type(module))
        assert adapted is not None
        r = _by_key(config.rank_pattern, name, config.r)
        alpha = _by_key(config.alpha_pattern, name, config.alpha)
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
        if shapes.setdefault(first, (A_shape, B_shape)) != (A_shape, B_shape):
            raise TargetError(
                f"{name!r} and {first!r} share one weight, but their factors have other shapes "
                f"(A {A_shape} and {shapes[first][0]}), so they cannot share those. Leave one of "
                "them out with exclude_modules: it keeps the base weight, and a merge unties it."
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


def _by_key(pattern: Mapping[str, N] | None, name: str, default: N) -> N:
    for key, value in (pattern or {}).items():
        if key_matches(key, name):
            return value
    return default


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
