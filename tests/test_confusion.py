"""The confusion matrix: counts where they belong, and readable for few classes and many."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lora import confusion
from lightning_lora.confusion import compact, draw_confusion_matrix, shorten
from tests.test_figures import size_of_image


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, the latest last."""
    kept: list[Any] = []
    save = confusion.save

    def keep(figure: Any, path: str | Path) -> None:
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr("lightning_lora.confusion.save", keep)
    return kept


def _counts(classes: int, scale: int = 100) -> torch.Tensor:
    noise = torch.arange(classes * classes).reshape(classes, classes) % 7
    return (torch.eye(classes, dtype=torch.long) * scale + noise).long()


def test_rows_are_true_classes_and_columns_predicted_ones(tmp_path: Path, drawn: list[Any]) -> None:
    counts = torch.tensor([[3, 1], [0, 8]])
    draw_confusion_matrix(counts, ["no", "yes"], tmp_path / "matrix.png", "Validation")
    axis = drawn[-1].axes[0]
    cells = {(text.get_position()[1], text.get_position()[0]): text for text in axis.texts}
    written = {place: text.get_text() for place, text in cells.items()}
    assert written == {(0, 0): "3", (0, 1): "1", (1, 0): "0", (1, 1): "8"}
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["no", "yes"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["no", "yes"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert axis.get_title() == "Validation"
    assert cells[1, 1].get_color() == "white", "on dark"
    assert cells[0, 1].get_color() == "black", "on light"
    assert size_of_image(tmp_path / "matrix.png") > (300, 300)


def test_a_class_without_rows_has_no_shares(tmp_path: Path, drawn: list[Any]) -> None:
    counts = np.array([[2, 2, 0], [0, 0, 0], [0, 1, 1]])
    draw_confusion_matrix(counts, ["a", "b", "c"], tmp_path / "matrix.png", "t")
    shares = drawn[-1].axes[0].images[0].get_array()
    assert shares.mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]


@pytest.mark.parametrize("classes", [2, 3, 7, 12, 20, 50])
@pytest.mark.parametrize("length", [3, 60])
def test_names_and_counts_are_readable_and_apart(
    tmp_path: Path, drawn: list[Any], classes: int, length: int
) -> None:
    names = [f"{number} " + "name " * (length // 5) for number in range(classes)]
    draw_confusion_matrix(_counts(classes, 1234), names, tmp_path / "matrix.png", "t")
    figure = drawn[-1]
    renderer = figure.canvas.get_renderer()
    axis = figure.axes[0]
    texts = [text.get_window_extent(renderer) for text in axis.texts]
    side = axis.get_window_extent(renderer).width / classes
    assert len(texts) >= classes
    assert all(box.width < side and box.height < side for box in texts)
    assert min(text.get_fontsize() for text in axis.texts) >= 4
    for labels in (axis.get_yticklabels(), axis.get_xticklabels()):
        assert min(label.get_fontsize() for label in labels) >= 7
        if labels[0].get_rotation() in (0, 90):
            boxes = [label.get_window_extent(renderer) for label in labels]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert max(size_of_image(tmp_path / "matrix.png")) < 3000


def test_cells_too_small_for_numbers_have_none(tmp_path: Path, drawn: list[Any]) -> None:
    names = [str(number) for number in range(200)]
    draw_confusion_matrix(_counts(200, 123456), names, tmp_path / "matrix.png", "t")
    assert not drawn[-1].axes[0].texts


def test_names_are_no_formulas(tmp_path: Path) -> None:
    names = ["$\\frac$", "a_b", "日本"]
    draw_confusion_matrix(_counts(3), names, tmp_path / "matrix.png", "runs/$\\x$")
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.png"]


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_shapes_have_to_fit(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"3 class names need \(3, 3\)"):
        draw_confusion_matrix(torch.ones(shape), ["a", "b", "c"], tmp_path / "matrix.png", "t")
    assert not list(tmp_path.iterdir())


def test_long_names_keep_both_ends() -> None:
    assert shorten("a b\n c") == "a b c"
    shortened = shorten("x" * 40 + "y" * 40, longest=11)
    assert shortened == "xxxxx…yyyyy"


def test_large_counts_take_few_letters() -> None:
    assert [compact(n) for n in (0, 9999, 10_000, 999_400, 1_000_000)] == [
        "0",
        "9999",
        "10k",
        "999k",
        "1.0M",
    ]
