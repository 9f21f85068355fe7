"""The figures of a study, after those of arXiv:2106.09685, section 7 and appendix H."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.figures import COLOURS, MARKERS, dress_axis, legend_beside, new_figure, save
from lightning_lora.names import shortened
from lightning_lora.study import BaseRow, Similarity, Study

# A page of heat maps with more than these cannot be read.
_PANELS = 24
_COLUMNS = 6
_PHI = "phi(i, j)"


def draw_study(study: Study, folder: Path) -> list[Path]:
    """Draw everything that a study has numbers for.

    Args:
        study: What was found.
        folder: Where the PNG files are put.

    Returns:
        The files.
    """
    figures: dict[str, Callable[[Path], None]] = {"spectra.png": partial(draw_spectra, study)}
    for (first, second), found in _by_pair(study.similarities):
        name = f"similarity_{_file_name(first)}_{_file_name(second)}.png"
        figures[name] = partial(draw_similarity, found, study.side)
    if study.base:
        figures["amplification.png"] = partial(draw_amplification, study)
    for label in study.labels:
        rows = [row for row in study.base if row.label == label]
        if rows:
            name = f"base_{_file_name(label)}.png"
            figures[name] = partial(draw_overlap, rows)
    for name, draw in figures.items():
        draw(folder / name)
    return [folder / name for name in figures]


def draw_spectra(study: Study, path: Path) -> None:
    """Norm and effective rank of dW by layer, and its singular values."""
    figure = new_figure(11, 9.5, layout="constrained")
    norm, rank, values = figure.subplots(3, 1)
    layers = list(dict.fromkeys(s.layer for found in study.spectra.values() for s in found))
    for number, (label, found) in enumerate(study.spectra.items()):
        places, style = [layers.index(each.layer) for each in found], _style(number, label)
        norm.plot(places, [each.delta_norm for each in found], **style)
        rank.plot(places, [each.effective_rank for each in found], **style)
        for place, each in enumerate(s for s in found if s.singular_values):
            shares = [value / each.spectral_norm for value in each.singular_values]
            values.plot(
                range(1, len(shares) + 1),
                shares,
                color=style["color"],
                linewidth=0.8,
                alpha=0.6,
                label="_" if place else label,
            )
    _dress(norm, "Norm of the update", "||dW||_F")
    _dress(rank, "Effective rank of the update", "directions")
    _dress(values, "Singular values of the update, a line a layer", "share of the largest")
    norm.set_ylim(bottom=0)
    rank.set_ylim(bottom=0)
    values.set_yscale("log")
    values.set_ylim(bottom=1e-4)
    values.set_xlabel("index")
    for axis in (norm, rank):
        _name_layers(axis, layers)
    save(figure, path)


def draw_similarity(found: Sequence[Similarity], side: str, path: Path) -> None:
    """Heat maps of phi(i, j) between two adapters in each layer, beside a random one (Figures 3 and
    4).
    """
    first, second = found[0].first, found[0].second
    names = shortened([each.layer for each in found])
    grids = {name: each.grid for name, each in zip(names, found, strict=True)}
    _draw_grids(
        {**_evenly(grids), "random matrices": found[0].random},
        f"phi(i, j) of {side}: i directions of {first}, j of {second}{_some(grids)}",
        path,
    )


def draw_overlap(rows: Sequence[BaseRow], path: Path) -> None:
    """Heat maps of phi(i, j) between W and dW in each layer, beside a random one (Figure 8)."""
    names = shortened([row.layer for row in rows])
    grids = {name: row.overlap.grid for name, row in zip(names, rows, strict=True)}
    places = rows[0].overlap.places
    _draw_grids(
        {**_evenly(grids), "random in the place of dW": rows[0].overlap.random},
        f"phi(i, j): i directions of W, j of dW of {rows[0].label}{_some(grids)}",
        path,
        rows_up_to=places[-1],
    )


def draw_amplification(study: Study, path: Path) -> None:
    """||U^T W V||_F on the directions of dW, of W and of random matrices, and the amplification
    factor, by layer (Table 7).
    """
    figure = new_figure(11, 7.5, layout="constrained")
    norms, factors = figure.subplots(2, 1)
    layers = list(dict.fromkeys(row.layer for row in study.base))
    for number, label in enumerate(study.labels):
        rows = [row for row in study.base if row.label == label]
        places = [layers.index(row.layer) for row in rows]
        for what, name, line in (
            ("on_weight", "W", ":"),
            ("on_delta", "dW", "-"),
            ("on_random", "random", "--"),
        ):
            values = [getattr(row.numbers, what) for row in rows]
            norms.plot(places, values, **{**_style(number, f"{label}: {name}"), "linestyle": line})
        amplified = [_finite(row.numbers.amplification) for row in rows]
        factors.plot(places, amplified, **_style(number, label))
    _dress(norms, "W on the first directions of W, dW and random matrices", "||U^T W V||_F")
    _dress(factors, "Amplification", "||dW||_F / ||U^T W V||_F")
    for axis in (norms, factors):
        axis.set_yscale("log")
        _name_layers(axis, layers)
    save(figure, path)


def _draw_grids(
    grids: Mapping[str, Tensor], title: str, path: Path, rows_up_to: int | None = None
) -> None:
    columns = min(_COLUMNS, len(grids))
    rows = math.ceil(len(grids) / columns)
    figure = new_figure(1.0 + 2.2 * columns, 1.2 + 2.3 * rows, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    image = None
    for axis, (name, grid) in zip(axes, grids.items(), strict=False):
        height, width = grid.shape
        image = axis.imshow(
            grid.numpy(),
            vmin=0,
            vmax=1,
            cmap="cividis",
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, width + 0.5, 0.5, (rows_up_to or height) + 0.5),
        )
        axis.set_title(name, fontsize=8, parse_math=False)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("j", fontsize=8)
        axis.set_ylabel("i", fontsize=8)
    for axis in axes[len(grids) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes.tolist(), label=_PHI, shrink=0.8)
    figure.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)
    save(figure, path)


def _by_pair(
    found: Sequence[Similarity],
) -> list[tuple[tuple[str, str], list[Similarity]]]:
    def pair(each: Similarity) -> tuple[str, str]:
        return each.first, each.second

    return [(key, list(group)) for key, group in groupby(sorted(found, key=pair), key=pair)]


def _evenly(grids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As many as a page holds, from the first to the last."""
    names = list(grids)
    count = min(len(names), _PANELS - 1)
    steps = [round(place * (len(names) - 1) / max(1, count - 1)) for place in range(count)]
    return {names[step]: grids[names[step]] for step in steps}


def _some(grids: Mapping[str, Tensor]) -> str:
    return f" ({_PANELS - 1} of {len(grids)} layers)" if len(grids) >= _PANELS else ""


def _style(number: int, label: str) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.4,
        "label": label,
    }


def _dress(axis: Any, title: str, unit: str) -> None:
    dress_axis(axis, title)
    axis.set_ylabel(unit, parse_math=False)
    legend_beside(axis)


def _name_layers(axis: Any, layers: Sequence[str]) -> None:
    step = math.ceil(len(layers) / 40)
    axis.set_xticks(
        range(0, len(layers), step),
        shortened(layers)[::step],
        rotation=60,
        ha="right",
        fontsize=7,
        parse_math=False,
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _file_name(label: str) -> str:
    return label.replace("/", "-")
