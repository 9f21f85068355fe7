"""Several adapters beside one another, and beside their base: section 7 of arXiv:2106.09685."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from lightning_lora.adapters import Adapter, Factors, notes_of
from lightning_lora.analysis import (
    AgainstBase,
    Decomposition,
    against_base,
    decompose,
    decompose_product,
    random_directions,
    random_similarity,
    subspace_similarity,
)
from lightning_lora.base_weights import BaseWeights, is_plain
from lightning_lora.errors import CheckpointError
from lightning_lora.names import corresponding, listed
from lightning_lora.spectra import Spectrum, spectrum_of

# What directions are taken of: the factors, as in the paper, or what dW reads from and writes to.
SIDES = ("A", "B", "input", "output")
# The paper says of the first four directions of dW how much of them is in the first tenth of W's.
FIRST = 4
_PLACES = 64


@dataclass(frozen=True)
class Similarity:
    """phi(i, j) between two adapters in one layer (Figures 3 and 4).

    Attributes:
        first: Label of the adapter that i counts directions of.
        second: Label of the one that j does.
        layer: Name of the layer.
        grid: phi, shape ``(k1, k2)``.
        random: phi of random matrices of the same sizes.
        size: Dimension of the space.
    """

    first: str
    second: str
    layer: str
    grid: Tensor
    random: Tensor
    size: int

    def at(self, i: int, j: int) -> float:
        """phi(i, j), with directions that are not there left out."""
        return float(self.grid[min(i, self.grid.shape[0]) - 1, min(j, self.grid.shape[1]) - 1])

    def expected(self, i: int, j: int) -> float:
        """What phi(i, j) is on average for random directions."""
        return random_similarity(min(i, self.grid.shape[0]), min(j, self.grid.shape[1]), self.size)

    def diagonal(self) -> list[float]:
        """phi(i, i)."""
        values: list[float] = self.grid.diagonal().tolist()
        return values


@dataclass(frozen=True)
class Overlap:
    """phi(i, j) between the first i directions of W and the first j of dW (Figure 8).

    Attributes:
        places: The values of i.
        grid: phi, shape ``(len(places), k)``.
        random: phi of random directions in the place of dW's, of the same shape.
        tenth: How many directions are a tenth of W's.
        first_in_tenth: phi(tenth, 4).
        expected: What that is on average for random directions.
    """

    places: tuple[int, ...]
    grid: Tensor
    random: Tensor
    tenth: int
    first_in_tenth: float
    expected: float


@dataclass(frozen=True)
class BaseRow:
    """One adapter's dW against W in one layer."""

    label: str
    layer: str
    numbers: AgainstBase
    overlap: Overlap


@dataclass
class Study:
    """What was found.

    Attributes:
        labels: Names of the adapters.
        side: One of `SIDES`.
        spectra: By adapter.
        similarities: Of each pair, layer after layer.
        base: Rows of dW against W; empty without a base.
        left_out: Adapter, layer and why it is not there.
        notes: What else a reader has to know.
    """

    labels: tuple[str, ...]
    side: str
    spectra: dict[str, list[Spectrum]] = field(default_factory=dict)
    similarities: list[Similarity] = field(default_factory=list)
    base: list[BaseRow] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_study(
    adapters: Mapping[str, Adapter],
    base: BaseWeights | None = None,
    side: str = "A",
    directions: int = 64,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Study:
    """Compare adapters layer by layer; no more than one layer of each is held decomposed.

    Args:
        adapters: By label, one or more, of the same model.
        base: The weights that they were trained on; without them dW is not compared with W.
        side: Of what the directions are compared, one of `SIDES`: of A (right singular vectors, as
            in the paper), of B (left), of what dW reads from its input or writes to its output.
        directions: How many are compared at most.
        seed: Of the random matrices.
        progress: Told how many layers are done, how many there are, and the next one's name.

    Raises:
        CheckpointError: Two adapters have no layer in common, or layers of other sizes.
    """
    study = Study(tuple(adapters), side, {label: [] for label in adapters})
    study.notes += _notes(adapters, base)
    layers = _layers(adapters, study)
    generator = torch.Generator("cpu").manual_seed(seed)
    weights = {} if base is None else base.names_for(_weights_of(layers))
    for done, (layer, factors) in enumerate(layers.items()):
        if progress is not None:
            progress(done, len(layers), layer)
        _check_sizes(layer, factors)
        deltas = {
            label: decompose_product(each.A, each.B, each.scaling)
            for label, each in factors.items()
        }
        for label, delta in deltas.items():
            study.spectra[label].append(spectrum_of(layer, factors[label], delta))
            if not len(delta.S):
                study.left_out.append((label, layer, "its update is zero"))
        moved = {label: delta for label, delta in deltas.items() if len(delta.S)}
        study.similarities += _similarities(layer, factors, moved, side, directions, generator)
        if base is not None and moved:
            study.base += _base_rows(
                layer, factors, moved, base, weights, study, directions, generator
            )
    return study


def _notes(adapters: Mapping[str, Adapter], base: BaseWeights | None) -> list[str]:
    prints = {a.base["fingerprint"] for a in adapters.values() if "fingerprint" in a.base}
    notes = list(dict.fromkeys(note for adapter in adapters.values() for note in notes_of(adapter)))
    if len(prints) > 1:
        notes.append("The adapters were trained on bases with different fingerprints.")
    if base is None:
        notes.append("dW was not compared with W: that needs the base's weights, --base FOLDER.")
    else:
        notes.append(
            f"The weights in {base.folder} were matched by name and shape; the base's fingerprint "
            "was not checked, which takes the whole model."
        )
    return notes


def _layers(adapters: Mapping[str, Adapter], study: Study) -> dict[str, dict[str, Factors]]:
    """The factors of each adapter by layer, under the first adapter's names where it has them."""
    found: dict[str, dict[str, Factors]] = {}
    own: dict[str, set[str]] = {}
    first = next(iter(adapters.values()))
    for label, adapter in adapters.items():
        names = corresponding(adapter.factors, first.factors)
        for name, factors in adapter.factors.items():
            found.setdefault(names.get(name, name), {})[label] = factors
        own[label] = {names.get(name, name) for name in adapter.factors}
        study.left_out += [(label, name, reason) for name, reason in adapter.left_out.items()]
    if not found:
        reasons = sorted({reason for _, _, reason in study.left_out})
        raise CheckpointError(
            f"{first.path} adapts no layer by a product of two matrices: {'; '.join(reasons)}."
        )
    for one, other in combinations(own, 2):
        if not own[one] & own[other]:
            theirs = "; ".join(listed(sorted(own[each]), 2) or "none" for each in (one, other))
            raise CheckpointError(
                f"{one} and {other} have no layer in common that can be compared ({theirs}). Give "
                "adapters of the same model."
            )
    return found


def _check_sizes(layer: str, factors: Mapping[str, Factors]) -> None:
    sizes = {label: (f.B.shape[0], f.A.shape[1]) for label, f in factors.items()}
    if len(set(sizes.values())) > 1:
        listing = ", ".join(
            f"{rows} x {columns} in {label}" for label, (rows, columns) in sizes.items()
        )
        raise CheckpointError(
            f"{layer} has other sizes in the adapters ({listing}). Give adapters of the same model."
        )


def _weights_of(layers: Mapping[str, Mapping[str, Factors]]) -> list[str]:
    found = [next(iter(factors.values())).weight for factors in layers.values()]
    return list(dict.fromkeys(found))


def _directions(factors: Factors, delta: Decomposition, side: str) -> Tensor:
    if side == "A":
        return decompose(factors.A).V
    if side == "B":
        return decompose(factors.B).U
    return delta.V if side == "input" else delta.U


def _similarities(
    layer: str,
    factors: Mapping[str, Factors],
    deltas: Mapping[str, Decomposition],
    side: str,
    count: int,
    generator: torch.Generator,
) -> list[Similarity]:
    if len(deltas) < 2:
        return []
    spans = {
        label: _directions(factors[label], delta, side)[:, :count]
        for label, delta in deltas.items()
    }
    found = []
    for first, second in combinations(spans, 2):
        size, k = spans[first].shape
        random = subspace_similarity(
            random_directions(size, k, generator),
            random_directions(size, spans[second].shape[1], generator),
        )
        grid = subspace_similarity(spans[first], spans[second])
        found.append(Similarity(first, second, layer, grid, random, size))
    return found


def _base_rows(
    layer: str,
    factors: Mapping[str, Factors],
    deltas: Mapping[str, Decomposition],
    base: BaseWeights,
    names: Mapping[str, str],
    study: Study,
    directions: int,
    generator: torch.Generator,
) -> list[BaseRow]:
    # All adapters of the layer have the same W.
    some = next(iter(factors.values()))
    reason = None
    if some.weight not in names:
        reason = f"no tensor of {base.folder} is its {some.weight}"
    else:
        stored = base.read(names[some.weight])
        weight = some.of_base(stored) if is_plain(stored) else None
        if not is_plain(stored):
            reason = f"its base weight is stored as {stored.dtype}"
        elif weight is None:
            reason = f"its base weight has shape {tuple(stored.shape)}"
    if reason is not None:
        study.left_out += [(label, layer, f"dW against W: {reason}") for label in deltas]
        return []
    assert weight is not None
    whole = decompose(weight)
    rows = []
    for label, delta in deltas.items():
        top = delta.top(directions)
        numbers = against_base(top, weight, whole, generator)
        overlap = _overlap(whole, top, study.side in ("A", "input"), generator)
        rows.append(BaseRow(label, layer, numbers, overlap))
    return rows


def _overlap(
    base: Decomposition, delta: Decomposition, on_input: bool, generator: torch.Generator
) -> Overlap:
    of_base, of_delta = (base.V, delta.V) if on_input else (base.U, delta.U)
    size, k = of_base.shape
    grid = subspace_similarity(of_base, of_delta)
    random = subspace_similarity(of_base, random_directions(size, of_delta.shape[1], generator))
    places = sorted({max(1, round(k * step / _PLACES)) for step in range(1, _PLACES + 1)})
    chosen = torch.tensor(places) - 1
    tenth, first = max(1, round(k / 10)), min(FIRST, of_delta.shape[1])
    return Overlap(
        places=tuple(places),
        grid=grid[chosen],
        random=random[chosen],
        tenth=tenth,
        first_in_tenth=float(grid[tenth - 1, first - 1]),
        expected=random_similarity(first, tenth, size),
    )
