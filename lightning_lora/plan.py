"""The plan: what an injection will adapt, train and freeze. A value; making one changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_lora.names import listed
from lightning_lora.slices import Slices
from lightning_lora.start import PRIOR, START
from lightning_lora.tables import as_text

if TYPE_CHECKING:
    from rich.table import Table

# Of one setting; `redistribute_ranks` has one for each layer.
_PATTERNS_SHOWN = 16


@dataclass(frozen=True)
class Target:
    """One layer to adapt.

    Attributes:
        name: Full module name.
        kind: Type of the layer.
        r: Rank.
        alpha: Numerator of the scaling.
        scaling: The factor s in front of ``B @ A``.
        A_shape: Shape of A.
        B_shape: Shape of B.
        tied_to: Name of an earlier target with the same weight, whose factors this layer shares.
        slices: The parts of a fused projection that are adapted, each with rank r; ``None`` if the
            whole layer is.
        weights: Names of the layer's parameters that the update is added to.
        dora: Whether a magnitude trains too, one element for each row of B.
        frozen: Names of the parameters among the factors that stay as they start.
        keeps_start: Whether the factors go with what they started from, which is subtracted.
        keeps_prior: Whether they go with those that settle how LoftQ has quantized the weight.
    """

    name: str
    kind: str
    r: int
    alpha: float
    scaling: float
    A_shape: tuple[int, ...]
    B_shape: tuple[int, ...]
    tied_to: str | None = None
    slices: Slices | None = None
    weights: tuple[str, ...] = ("weight",)
    dora: bool = False
    frozen: tuple[str, ...] = ()
    keeps_start: bool = False
    keeps_prior: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters in the factors; 0 for a layer that shares those of another."""
        if self.tied_to is not None:
            return 0
        return sum(map(_product, self.shapes().values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter among the factors, by name."""
        shapes = {"A": self.A_shape, "B": self.B_shape}
        own = tuple(shapes.items())
        if self.keeps_start:
            shapes |= {START[name]: shape for name, shape in own}
        if self.keeps_prior:
            shapes |= {PRIOR[name]: shape for name, shape in own}
        return {**shapes, "magnitude": self.B_shape[:1]} if self.dora else shapes

    @property
    def frozen_parameters(self) -> int:
        """Number of those that do not train."""
        if self.tied_to is not None:
            return 0
        shapes = self.shapes()
        return sum(_product(shapes[name]) for name in self.frozen)


@dataclass(frozen=True)
class TrainedParameter:
    """A base parameter that trains in place.

    Attributes:
        name: Full name.
        shape: Its shape.
        reason: ``"bias"``, ``"norm"``, ``"embedding"`` or ``"whole"``.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return _product(self.shape)


@dataclass(frozen=True)
class TokenTarget:
    """An embedding of which some rows train.

    Attributes:
        name: Full name of the embedding.
        kind: Type of the layer.
        indices: The rows that train.
        width: Elements of a row.
        tied: Names of the other layers with the same weight, where the rows train too.
    """

    name: str
    kind: str
    indices: tuple[int, ...]
    width: int
    tied: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements that train."""
        return len(self.indices) * self.width


@dataclass(frozen=True)
class Plan:
    """Everything an injection will do.

    Attributes:
        targets: The layers to adapt.
        trained: The base parameters that train in place.
        saved_modules: Names of the modules that train whole.
        matches: How many layers each pattern of the settings matched, as ``(setting,
            pattern, count)``.
        skipped: Layers that a preset leaves out, as ``(name, reason)``.
        base_parameters: Number of parameters before injection.
        tokens: The embeddings of which some rows train.
    """

    targets: tuple[Target, ...]
    trained: tuple[TrainedParameter, ...]
    saved_modules: tuple[str, ...]
    matches: tuple[tuple[str, str, int], ...]
    skipped: tuple[tuple[str, str], ...]
    base_parameters: int
    tokens: tuple[TokenTarget, ...] = ()

    @property
    def lora_parameters(self) -> int:
        """Number of parameters in all factors."""
        return sum(target.parameters for target in self.targets)

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that train: factors, biases, norms, embeddings and whole modules."""
        frozen = sum(target.frozen_parameters for target in self.targets)
        return self.lora_parameters - frozen + sum(self.counts().values())

    @property
    def total_parameters(self) -> int:
        """Number of parameters after injection."""
        return self.base_parameters + self.lora_parameters + self.counts()["token"]

    def counts(self) -> dict[str, int]:
        """Parameters that train beside the factors, by reason."""
        counts = {"bias": 0, "norm": 0, "embedding": 0, "whole": 0, "token": 0}
        counts["token"] = sum(target.numel for target in self.tokens)
        for parameter in self.trained:
            counts[parameter.reason] += parameter.numel
        return counts

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="LoRA", title_justify="left", show_header=False, pad_edge=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for setting, count in Counter(setting for setting, *_ in self.matches).items():
            own = [(pattern, n) for name, pattern, n in self.matches if name == setting]
            if count > _PATTERNS_SHOWN:
                own = [(f"({count} patterns)", sum(n for _, n in own))]
            for pattern, n in own:
                table.add_row(escape(f"{setting} {pattern}"), f"{n:,}", "modules matched")
        table.add_section()
        for (kind, parts, r, alpha), count in _grouped(self.targets).items():
            kind += f" ({', '.join(parts)})" if parts else ""
            table.add_row(f"{kind}, r={r}, alpha={alpha:g}", f"{count:,}", "layers adapted")
        for reason, count in Counter(reason for _, reason in self.skipped).items():
            names = [name for name, why in self.skipped if why == reason]
            table.add_row(
                "left alone", f"{count:,}", escape(f"{reason} ({listed(names, limit=3)})")
            )
        table.add_section()
        labels = {
            "bias": "biases",
            "norm": "norms",
            "embedding": "embeddings",
            "token": escape(f"rows of {listed([t.name for t in self.tokens], limit=3)}"),
            "whole": escape(f"trained whole ({listed(self.saved_modules, limit=3)})"),
        }
        table.add_row("parameters", f"{self.lora_parameters:,}", "LoRA factors")
        if frozen := sum(target.frozen_parameters for target in self.targets):
            table.add_row("", f"-{frozen:,}", "of these stay as they start")
        for reason, count in self.counts().items():
            if count:
                table.add_row("", f"{count:,}", labels[reason])
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        table.add_row("trainable", f"{self.trainable_parameters:,}", f"{share:.3g} % of all")
        table.add_row("total", f"{self.total_parameters:,}", "")
        return table

    def __str__(self) -> str:
        return as_text(self)


def _grouped(targets: tuple[Target, ...]) -> Counter[tuple[str, tuple[str, ...], int, float]]:
    return Counter(
        (target.kind, target.slices.adapted if target.slices else (), target.r, target.alpha)
        for target in targets
    )


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
