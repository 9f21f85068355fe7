"""The examples in docstrings, under the names that users import the modules by."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import lightning_lora
import lightning_lora.recipes


def _names() -> Iterator[str]:
    for package in (lightning_lora, lightning_lora.recipes):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # Their scripts ask for packages that nothing else needs.
            if ".quickstart." not in module.name:
                yield module.name


@pytest.mark.parametrize("name", sorted(set(_names())))
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_examples_are_found() -> None:
    names = set(_names())
    assert {"lightning_lora.callback", "lightning_lora.layers.base"} <= names
    assert "lightning_lora.recipes.grouping" in names
    finder = doctest.DocTestFinder()
    examples = [
        test.name
        for name in ("lightning_lora.callback", "lightning_lora.recipes.grouping")
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert "lightning_lora.callback.LoRACallback" in examples and len(examples) >= 2
