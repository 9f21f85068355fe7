"""Which layers ``target_modules`` and what narrows it down mean."""

from __future__ import annotations

from torch import nn

from lightning_lora.blocks import in_blocks
from lightning_lora.config import PRESETS, LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.matching import inside, pattern_matches, suffix_matches, suggest
from lightning_lora.obstacles import attention_around
from lightning_lora.presets import preset_layers, refuse_latent
from lightning_lora.slices import Slices


def select_layers(
    modules: dict[str, nn.Module],
    config: LoRAConfig,
    saved: tuple[str, ...],
    obstacles: dict[str, str | None],
    slices: dict[str, Slices],
) -> tuple[list[str], list[tuple[str, str, int]], list[tuple[str, str]]]:
    """The layers to adapt.

    Args:
        modules: The model's modules by name.
        config: The settings.
        saved: Names of the modules that train whole.
        obstacles: For each module, why it cannot be adapted, or ``None``.
        slices: The parts of fused projections that are adapted.

    Returns:
        The names of the layers; how many each pattern matched, with the setting that it stands in;
        the layers that a preset left out, and why.

    Raises:
        TargetError: A pattern matches nothing, or a layer that cannot be adapted.
    """
    adaptable = [name for name, why in obstacles.items() if why is None]
    matches: list[tuple[str, str, int]] = []
    skipped: list[tuple[str, str]] = []
    wanted = config.target_modules
    if wanted in PRESETS:
        preset = str(wanted)
        if preset == "qv":
            refuse_latent(name for name in modules if not is_excluded(name, config))
        chosen, skipped = preset_layers(preset, modules, obstacles, slices)
        matches.append(("target_modules", preset, len(chosen)))
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
        and not (outer is not None and is_excluded(outer, config))
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
            and not is_excluded(name, config)
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


def is_excluded(name: str, config: LoRAConfig) -> bool:
    """Whether ``exclude_modules`` names a module."""
    excluded = config.exclude_modules
    return excluded is not None and bool(pattern_matches(excluded, name))
