"""What a study found, as JSON and as CSV files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_lora.files import replacing_file
from lightning_lora.study import FIRST, Similarity, Study
from lightning_lora.study_figures import draw_study


def as_json(study: Study) -> dict[str, Any]:
    """Return a study in primitives; of phi(i, j) the diagonal and a few values alone, since the
    whole is in the CSV files. Infinite ratios are ``None``.
    """
    return {
        "adapters": list(study.labels),
        "directions_of": study.side,
        "spectra": {
            label: [
                {**each.numbers(), "singular_values": list(each.singular_values)} for each in found
            ]
            for label, found in study.spectra.items()
        },
        "similarity": [
            _similarity_row(each) | {"diagonal": each.diagonal()} for each in study.similarities
        ],
        "base": list(_base_rows(study)),
        "left_out": [
            {"adapter": label, "layer": layer, "reason": reason}
            for label, layer, reason in study.left_out
        ],
        "notes": study.notes,
    }


def write_study(study: Study, folder: Path) -> list[Path]:
    """Write all there is of a study: tables, `analysis.json` and figures.

    Args:
        study: What was found.
        folder: Where to; made if it is not there. What else is there stays.

    Returns:
        The files.
    """
    whole = folder / "analysis.json"
    with replacing_file(whole) as fresh:
        fresh.write_text(json.dumps(as_json(study), indent=2) + "\n", encoding="utf-8")
    return [whole, *write_tables(study, folder), *draw_study(study, folder)]


def write_tables(study: Study, folder: Path) -> list[Path]:
    """Write the CSV files of a study that have rows, each complete or not at all.

    Args:
        study: What was found.
        folder: Where to; made if it is not there.

    Returns:
        The files.
    """
    tables = {
        "layers.csv": (
            {"adapter": label, **each.numbers()}
            for label, found in study.spectra.items()
            for each in found
        ),
        "singular_values.csv": (
            {"adapter": label, "layer": each.layer, "index": place, "value": value}
            for label, found in study.spectra.items()
            for each in found
            for place, value in enumerate(each.singular_values, start=1)
        ),
        "similarity.csv": (_similarity_row(each) for each in study.similarities),
        "similarity_grid.csv": (
            {
                "first": each.first,
                "second": each.second,
                "layer": each.layer,
                "i": i + 1,
                "j": j + 1,
                "phi": value,
                "random": each.random[i, j].item(),
            }
            for each in study.similarities
            for i, row in enumerate(each.grid.tolist())
            for j, value in enumerate(row)
        ),
        "base.csv": _base_rows(study),
        "base_grid.csv": (
            {
                "adapter": row.label,
                "layer": row.layer,
                "i": i,
                "j": j + 1,
                "phi": value,
                "random": row.overlap.random[place, j].item(),
            }
            for row in study.base
            for place, i in enumerate(row.overlap.places)
            for j, value in enumerate(row.overlap.grid[place].tolist())
        ),
    }
    written = []
    for name, rows in tables.items():
        if _write(folder / name, rows):
            written.append(folder / name)
    return written


def mean_rows(study: Study) -> dict[tuple[str, str], dict[str, float]]:
    """The means over layers of the numbers in `similarity.csv`, by the labels of each pair."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in study.similarities:
        pairs.setdefault((each.first, each.second), []).append(_similarity_row(each))
    return {
        pair: {
            key: sum(row[key] for row in rows) / len(rows)
            for key, value in rows[0].items()
            if not isinstance(value, str)
        }
        for pair, rows in pairs.items()
    }


def _similarity_row(each: Similarity) -> dict[str, Any]:
    k = min(each.grid.shape)
    return {
        "first": each.first,
        "second": each.second,
        "layer": each.layer,
        "phi_1_1": each.at(1, 1),
        "expected_1_1": each.expected(1, 1),
        "phi_1_all": each.at(1, each.grid.shape[1]),
        "expected_1_all": each.expected(1, each.grid.shape[1]),
        "directions": k,
        "phi_k_k": each.at(k, k),
        "expected_k_k": each.expected(k, k),
        # The paper calls directions shared where phi is above a half.
        "shared": max(
            (i for i, phi in enumerate(each.diagonal(), start=1) if phi > 0.5), default=0
        ),
    }


def _base_rows(study: Study) -> Iterable[dict[str, Any]]:
    for row in study.base:
        numbers = {
            key: value if math.isfinite(value) else None
            for key, value in asdict(row.numbers).items()
        }
        yield {
            "adapter": row.label,
            "layer": row.layer,
            **numbers,
            f"first_{FIRST}_in_tenth": row.overlap.first_in_tenth,
            f"expected_{FIRST}_in_tenth": row.overlap.expected,
        }


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> bool:
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return False
    with replacing_file(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(first))
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(rows)
    return True
