"""Class names and class numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_lora.errors import CheckpointError, DataError
from lightning_lora.recipes.classification.labels import (
    class_names_in_checkpoint,
    encode_labels,
    read_class_names,
)
from lightning_lora.recipes.files import Table


def test_names_are_sorted_and_whole_numbers_by_their_value() -> None:
    assert read_class_names(Table("x", {"label": ["b ", "a", "b"]}), "label") == ["a", "b"]
    assert read_class_names(Table("x", {"label": [10, 9, 10]}), "label") == ["9", "10"]


def test_declared_names_keep_their_order_and_unused_ones() -> None:
    table = Table("x", {"label": ["a", "a"]}, class_names=["b", "a"])
    assert read_class_names(table, "label") == ["b", "a"]


def test_labels_become_numbers_in_the_order_of_the_names() -> None:
    assert encode_labels(Table("x", {"label": ["a", " b"]}), "label", ["b", "a"]) == [1, 0]


def test_an_unknown_label_is_named_with_its_place() -> None:
    table = Table("dev.csv", {"label": ["pos", "psitive"]}, [2, 3], "line")
    with pytest.raises(DataError, match=r"dev.csv, line 3: unknown label 'psitive' \(did you mean"):
        encode_labels(table, "label", ["neg", "positive", "pos"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", ""], "row 2: the column 'label' is empty"),
        (["a", None], "row 2: the column 'label' is empty"),
        (["a", "a"], "one class only"),
        ([str(number / 7) for number in range(2000)], "2000 different values"),
    ],
)
def test_labels_that_are_no_classes(labels: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_class_names(Table("x", {"label": labels}), "label")


def test_names_are_read_from_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"class_names": ["a", "b"]}}, tmp_path / "a.ckpt")
    assert class_names_in_checkpoint(tmp_path / "a.ckpt") == ["a", "b"]
    (tmp_path / "b.ckpt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"b\.ckpt"):
        class_names_in_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        class_names_in_checkpoint(tmp_path / "c.ckpt")
