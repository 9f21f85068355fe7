"""`LoRAConfig`: the settings of an adapter, validated as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_lora.errors import ConfigError, SettingsError
from lightning_lora.validation import (
    choice_problems,
    is_name_list,
    is_number,
    is_positive,
    is_rank,
    is_whole,
    mapping_problems,
    pattern_problems,
)

PRESETS = ("all-linear", "qv", "attention")
BIAS_MODES = ("none", "lora_only", "all")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")


@dataclass
class LoRAConfig:
    """What is adapted, how strongly, and what else is trained.

    The update of a weight ``W0`` of shape ``[out, in]`` is ``s * B @ A`` with ``A`` of shape
    ``[r, in]``, ``B`` of shape ``[out, r]`` and ``s = alpha / r`` (LoRA, arXiv:2106.09685, section
    4.1), or ``s = alpha / sqrt(r)`` with ``use_rslora`` (arXiv:2312.03732).

    Args:
        r: Rank of the update. With 0 no layer is adapted, and what else is set to train does so
            alone: heads (a linear probe), ``bias="all"`` (BitFit, arXiv:2106.10199), norms or
            embeddings; settings about factors have no effect then.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an element of the adapter's input while training, in
            ``[0, 1)``.
        target_modules: ``"all-linear"`` (every linear layer but the output head), ``"qv"`` (the
            paper's W_q and W_v, also inside a fused projection), ``"attention"`` (every linear
            layer inside attention blocks), a list of name suffixes (``["query", "output.dense"]``),
            or one regular expression for the full name.
        exclude_modules: Suffixes or one regular expression for layers that are left alone.
        layers_to_transform: Number or numbers of the blocks whose layers are adapted, all others
            being left alone; negative numbers count from the last block. ``None`` for all layers.
        layers_pattern: Regular expression or expressions for the names of the containers that hold
            the blocks (``"layers"``, ``"encoder.layer"``); by default the outermost
            `torch.nn.ModuleList` around a layer, or `torch.nn.Sequential` where there is none.
        rank_pattern: ``{suffix or regex: r}`` for layers with another rank.
        alpha_pattern: ``{suffix or regex: alpha}`` for layers with another alpha.
        bias: Which biases train: ``"none"``, those of adapted layers (``"lora_only"``) or
            ``"all"``.
        train_layer_norms: Train every LayerNorm, RMSNorm and GroupNorm, found by type.
        train_embeddings: Train every embedding table whole.
        trainable_token_indices: Rows of the embeddings that train, new tokens for instance, while
            the others stay: a list for the input embeddings, or ``{name suffix: list}``. A head
            that is tied to the embedding has the same rows.
        modules_to_save: Modules that are trained whole: a list of names, or ``"auto"`` for the
            newly initialised head of a Hugging Face task model, or ``None``.
        use_rslora: Scale by ``alpha / sqrt(r)``.
        use_dora: Let a magnitude for each output feature train beside the update of the direction
            (DoRA, arXiv:2402.09353): ``W = m (W0 + s B A) / ||W0 + s B A||``.
        freeze_A: Keep A as it is drawn and train B alone (LoRA-FA, arXiv:2308.03303), so that the
            backward pass needs no inputs of adapted layers. Of embeddings, where B is drawn and A
            starts from zero, B is kept.
        init: Initialisation of A: ``"kaiming"`` (uniform, as in PEFT and loralib) or ``"gaussian"``
            (standard deviation ``1 / r``), with B zero; ``"orthogonal"`` draws both such that their
            product is zero (as PEFT's, r must be even). ``"pissa"`` starts both from the principal
            part of the weight (arXiv:2404.02948; ``"pissa_niter_4"`` by a randomized SVD of four
            iterations, which is much faster) and ``"olora"`` from its QR decomposition
            (arXiv:2406.01775); the base stays as it is, and the start is subtracted from the
            update, on the same input, dropout included. ``"eva"`` starts A from the principal
            components of the layer's inputs (arXiv:2410.07170), in the first batches of training.
            ``"loftq"`` starts both of a quantized base from the error of its quantization
            (arXiv:2310.08659), which needs the original weights' files.
        loftq_iter: How often ``init="loftq"`` quantizes and decomposes in turn. Above 1 the weights
            are quantized anew, in 4 bits alone, and loading the adapter needs the files too.

    Raises:
        ConfigError: Lists every problem found, not only the first.

    Example:
        >>> LoRAConfig(r=8, alpha=16).scaling(8, 16)
        2.0
        >>> LoRAConfig(r=-1, dropout=1.5)
        Traceback (most recent call last):
        ...
        lightning_lora.errors.SettingsError: 2 problems in the LoRA settings:
          - r must be a whole number of at least 1 (or 0 to adapt no layer), got -1
          - dropout must be in [0, 1), got 1.5
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    train_layer_norms: bool = False
    train_embeddings: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    modules_to_save: str | list[str] | None = "auto"
    use_rslora: bool = False
    use_dora: bool = False
    freeze_A: bool = False  # noqa: N815
    init: str = "kaiming"
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        for name in (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
        ):
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                setattr(
                    self,
                    name,
                    sorted(value) if isinstance(value, (set, frozenset)) else list(value),
                )
        problems = list(self._problems())
        if problems:
            raise SettingsError(problems)

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
        if not (is_rank(self.r) or (is_whole(self.r) and self.r == 0)):
            problems.append(
                f"r must be a whole number of at least 1 (or 0 to adapt no layer), got {self.r!r}"
            )
        elif self.r == 0:
            problems += self._problems_without_rank()
        if not is_positive(self.alpha):
            problems.append(f"alpha must be a number above 0, got {self.alpha!r}")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            problems.append(f"dropout must be in [0, 1), got {self.dropout!r}")
        problems += pattern_problems("target_modules", self.target_modules, PRESETS)
        if self.exclude_modules is not None:
            problems += pattern_problems("exclude_modules", self.exclude_modules, ())
        problems += self._block_problems()
        problems += self._token_problems()
        problems += mapping_problems(
            "rank_pattern", self.rank_pattern, is_rank, "a rank of at least 1"
        )
        problems += mapping_problems(
            "alpha_pattern", self.alpha_pattern, is_positive, "an alpha above 0"
        )
        problems += choice_problems("bias", self.bias, BIAS_MODES)
        problems += self._init_problems()
        problems += self._loftq_problems()
        if self.modules_to_save not in (None, "auto") and not is_name_list(
            self.modules_to_save, empty=True
        ):
            problems.append(
                "modules_to_save must be 'auto', null, or a list of module names, got "
                f"{self.modules_to_save!r}"
            )
        for name in ("train_layer_norms", "train_embeddings", "use_rslora", "use_dora", "freeze_A"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        return problems

    def _problems_without_rank(self) -> list[str]:
        problems = [
            f"{name} gives layers a rank or alpha of their own, and r=0 adapts none: leave it out"
            for name in ("rank_pattern", "alpha_pattern")
            if getattr(self, name)
        ]
        if self.bias == "lora_only":
            problems.append(
                "bias='lora_only' trains the biases of adapted layers, and r=0 adapts none: use "
                "'all' or 'none'"
            )
        return problems

    def _token_problems(self) -> list[str]:
        wanted, name = self.trainable_token_indices, "trainable_token_indices"
        if wanted is None:
            return []
        lists = wanted if isinstance(wanted, Mapping) else {"": wanted}
        problems = []
        for key, indices in lists.items():
            label = f"{name}[{key!r}]" if key else name
            if not (
                isinstance(indices, list)
                and indices
                and all(is_whole(index) and index >= 0 for index in indices)
                and len(set(indices)) == len(indices)
            ):
                problems.append(
                    f"{label} must be a list of different token numbers, got {indices!r}"
                )
        if not lists or not all(isinstance(key, str) for key in lists):
            problems.append(f"{name} must map name suffixes to lists, got {wanted!r}")
        if self.train_embeddings is True:
            problems.append(f"{name} trains rows of what train_embeddings trains whole; set one")
        return problems

    def _loftq_problems(self) -> list[str]:
        if not is_rank(self.loftq_iter):
            return [f"loftq_iter must be a whole number of at least 1, got {self.loftq_iter!r}"]
        if self.loftq_iter > 1 and self.init != "loftq":
            return [f"loftq_iter is about init='loftq', and init is {self.init!r}: leave it out"]
        return []

    def _init_problems(self) -> list[str]:
        if isinstance(self.init, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", self.init):
            return []
        problems = choice_problems("init", self.init, INITS)
        pattern = self.rank_pattern if isinstance(self.rank_pattern, Mapping) else {}
        ranks = [self.r, *pattern.values()]
        odd = [r for r in ranks if is_rank(r) and r % 2]
        if self.init == "orthogonal" and odd:
            problems.append(f"init='orthogonal' needs even ranks, got {', '.join(map(str, odd))}")
        return problems

    def _block_problems(self) -> list[str]:
        problems = []
        wanted, pattern = self.layers_to_transform, self.layers_pattern
        numbers = wanted if isinstance(wanted, list) else [wanted]
        if wanted is not None and not (numbers and all(map(is_whole, numbers))):
            problems.append(
                "layers_to_transform must be the number of a block or a list of such numbers, got "
                f"{wanted!r}"
            )
        if pattern is not None:
            if wanted is None:
                problems.append(
                    "layers_pattern says where the blocks of layers_to_transform are; "
                    "set both or none"
                )
            patterns = [pattern] if isinstance(pattern, str) else pattern
            if not is_name_list(patterns):
                problems.append(
                    "layers_pattern must be a regular expression or a list of them, got "
                    f"{pattern!r}"
                )
            else:
                problems += [
                    p for each in patterns for p in pattern_problems("layers_pattern", each, ())
                ]
        return problems
