"""`LoRAConfig`: the settings of an adapter, validated as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_lora.errors import ConfigError

PRESETS = ("all-linear", "qv", "attention")
BIAS_MODES = ("none", "lora_only", "all")
INITS = ("kaiming", "gaussian", "loftq")


@dataclass
class LoRAConfig:
    """What is adapted, how strongly, and what else is trained.

    The update of a weight ``W0`` of shape ``[out, in]`` is ``s * B @ A`` with ``A`` of shape
    ``[r, in]``, ``B`` of shape ``[out, r]`` and ``s = alpha / r`` (LoRA, arXiv:2106.09685, section
    4.1), or ``s = alpha / sqrt(r)`` with ``use_rslora`` (arXiv:2312.03732).

    Args:
        r: Rank of the update.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an element of the adapter's input while training, in
            ``[0, 1)``.
        target_modules: ``"all-linear"`` (every linear layer but the output head), ``"qv"`` (the
            paper's W_q and W_v, also inside a fused projection), ``"attention"`` (every linear
            layer inside attention blocks), a list of name suffixes (``["query", "output.dense"]``),
            or one regular expression for the full name.
        exclude_modules: Suffixes or one regular expression for layers that are left alone.
        rank_pattern: ``{suffix or regex: r}`` for layers with another rank.
        alpha_pattern: ``{suffix or regex: alpha}`` for layers with another alpha.
        bias: Which biases train: ``"none"``, those of adapted layers (``"lora_only"``) or
            ``"all"``.
        train_layer_norms: Train every LayerNorm, RMSNorm and GroupNorm, found by type.
        train_embeddings: Train every embedding table whole.
        modules_to_save: Modules that are trained whole: a list of names, or ``"auto"`` for the
            newly initialised head of a Hugging Face task model, or ``None``.
        use_rslora: Scale by ``alpha / sqrt(r)``.
        use_dora: Let a magnitude for each output feature train beside the update of the direction
            (DoRA, arXiv:2402.09353): ``W = m (W0 + s B A) / ||W0 + s B A||``.
        init: Initialisation of A: ``"kaiming"`` (uniform, as in PEFT and loralib) or ``"gaussian"``
            (standard deviation ``1 / r``). B is zero. ``"loftq"`` starts both of a quantized base
            from the error of its quantization (arXiv:2310.08659), which needs the original weights'
            files.

    Raises:
        ConfigError: Lists every problem found, not only the first.

    Example:
        >>> LoRAConfig(r=8, alpha=16).scaling(8, 16)
        2.0
        >>> LoRAConfig(r=0, dropout=1.5)
        Traceback (most recent call last):
        ...
        lightning_lora.errors.ConfigError: 2 problems in the LoRA settings:
          - r must be a whole number of at least 1, got 0
          - dropout must be in [0, 1), got 1.5
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    train_layer_norms: bool = False
    train_embeddings: bool = False
    modules_to_save: str | list[str] | None = "auto"
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                setattr(
                    self,
                    name,
                    sorted(value) if isinstance(value, (set, frozenset)) else list(value),
                )
        problems = list(self._problems())
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise ConfigError(f"{count} in the LoRA settings:{lines}")

    def scaling(self, r: int, alpha: float) -> float:
        """The factor in front of ``B @ A`` for a layer of this rank and alpha."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def to_dict(self) -> dict[str, Any]:
        """The settings as primitives, in the order of the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """Build from primitives.

        Raises:
            ConfigError: An unknown key (with the nearest known one), or an invalid value.
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            hints = []
            for key in unknown:
                near = difflib.get_close_matches(str(key), known, n=1)
                hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
            raise ConfigError(
                f"Unknown LoRA setting {', '.join(hints)}. Known settings: {', '.join(known)}."
            )
        return cls(**values)

    def _problems(self) -> list[str]:
        problems: list[str] = []
        if not _is_rank(self.r):
            problems.append(f"r must be a whole number of at least 1, got {self.r!r}")
        if not _is_positive(self.alpha):
            problems.append(f"alpha must be a number above 0, got {self.alpha!r}")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            problems.append(f"dropout must be in [0, 1), got {self.dropout!r}")
        problems += _pattern_problems("target_modules", self.target_modules, PRESETS)
        if self.exclude_modules is not None:
            problems += _pattern_problems("exclude_modules", self.exclude_modules, ())
        problems += _mapping_problems(
            "rank_pattern", self.rank_pattern, _is_rank, "a rank of at least 1"
        )
        problems += _mapping_problems(
            "alpha_pattern", self.alpha_pattern, _is_positive, "an alpha above 0"
        )
        problems += _choice_problems("bias", self.bias, BIAS_MODES)
        problems += _choice_problems("init", self.init, INITS)
        if self.modules_to_save not in (None, "auto") and not _is_name_list(
            self.modules_to_save, empty=True
        ):
            problems.append(
                "modules_to_save must be 'auto', null, or a list of module names, got "
                f"{self.modules_to_save!r}"
            )
        for name in ("train_layer_norms", "train_embeddings", "use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        return problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_name_list(value: object, empty: bool = False) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return (bool(value) or empty) and all(isinstance(item, str) and item for item in value)


def _pattern_problems(name: str, value: object, presets: Sequence[str]) -> list[str]:
    kinds = f"one of {', '.join(map(repr, presets))}, " if presets else ""
    if isinstance(value, str) and value:
        if value in presets:
            return []
        # Only plain words can be mistyped presets: "attention.*" is an expression, and qkv a name.
        near = difflib.get_close_matches(value.lower(), presets, n=1, cutoff=0.81)
        if near and re.fullmatch(r"[\w -]+", value):
            return [f"{name} {value!r} is unknown: did you mean {near[0]!r}?"]
        try:
            re.compile(value)
        except re.error as error:
            return [f"{name} is not a valid regular expression: {value!r} ({error})"]
        return []
    if not _is_name_list(value):
        return [
            f"{name} must be {kinds}a list of name suffixes, or a regular expression, got {value!r}"
        ]
    return []


def _mapping_problems(name: str, value: object, accepts: Any, wanted: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, Mapping):
        return [f"{name} must map name patterns to {wanted}, got {value!r}"]
    problems = []
    for pattern, item in value.items():
        if not isinstance(pattern, str):
            problems.append(f"{name}: the name pattern {pattern!r} must be a string")
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{name}: {pattern!r} is not a valid regular expression ({error})")
        if not accepts(item):
            problems.append(f"{name}[{pattern!r}] must be {wanted}, got {item!r}")
    return problems


def _choice_problems(name: str, value: object, choices: Sequence[str]) -> list[str]:
    if value in choices:
        return []
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return [f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}"]
