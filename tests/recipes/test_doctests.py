"""The examples in the recipes' docstrings.

They are imported by their installed names: collected by path, the same classes would exist twice
and their short names would be ambiguous on the command line.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from lightning_lora import recipes

MODULES = [
    module.name
    for module in pkgutil.walk_packages(recipes.__path__, "lightning_lora.recipes.")
    if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) >= 10
