"""The pages of docs/: what they name exists, nothing is left out, and the site builds."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora import LoRACallback, cli
from tests import documents
from tests.commands import ROOT
from tests.documents import pages


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for target in documents.links(page):
        if not target.startswith("#"):
            assert documents.resolve(page, target).exists(), f"{page}: {target}"


def test_every_setting_of_the_callback_is_explained() -> None:
    named = [n for row in documents.table("docs/lightning.md", "Settings") for n in
             documents.names(row[0])]  # fmt: skip
    assert sorted(named) == sorted(inspect.signature(LoRACallback).parameters)


def test_every_subcommand_is_explained() -> None:
    rows = documents.table("docs/recipes.md", "Subcommands")
    assert {documents.names(row[0])[0] for row in rows} == set(cli._KNOWN)


def test_every_public_name_has_its_docstring_in_the_site() -> None:
    shown = "\n".join(documents.read(p) for p in pages() if p.startswith("docs/api/"))
    named = re.findall(r"^::: lightning_lora\.(\S+)$", shown, re.MULTILINE)
    recipes = importlib.import_module("lightning_lora.recipes").__all__
    assert {*lightning_lora.__all__, *(f"recipes.{name}" for name in recipes)} <= set(named)


def test_every_argument_of_peft_has_a_row() -> None:
    peft = pytest.importorskip("peft")
    rows = documents.table("docs/peft.md", "Arguments of LoraConfig")
    named = [name for row in rows for name in documents.names(row[0])]
    fields = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert sorted(named) == sorted(fields)


def test_what_peft_arguments_are_called_here_exists() -> None:
    ours = {*inspect.signature(LoRACallback).parameters, *lightning_lora.__all__}
    rows = documents.table("docs/peft.md", "Arguments of LoraConfig")
    for theirs, here, *_ in rows:
        for name in documents.names(here):
            assert name in ours, f"{theirs}: there is no {name}"
        for name in documents.names(theirs):
            assert name not in ours or name in documents.names(here), f"{name} is here"


def test_what_peft_functions_are_called_here_exists() -> None:
    pytest.importorskip("peft")
    rows = documents.table("docs/peft.md", "Functions")
    assert len(rows) > 10
    for theirs, here, *_ in rows:
        for name in documents.names(theirs):
            pkgutil.resolve_name(f"peft.{name}")
        for name in documents.names(here):
            if name.startswith("lightning-lora "):
                assert name.split()[1] in cli._KNOWN, name
            else:
                assert name in lightning_lora.__all__ or hasattr(LoRACallback(), name), name


def _messages() -> list[str]:
    """The texts in the source, with `...` for what is filled in."""
    found = []
    for folder in ("lightning_lora", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [
                    part.value if isinstance(part, ast.Constant) else "..."
                    for part in parts
                    if not isinstance(part, ast.Constant) or isinstance(part.value, str)
                ]
                found.append("".join(texts))
    return found


def test_messages_that_are_explained_are_those_of_the_program() -> None:
    messages = _messages()
    page = documents.read("docs/troubleshooting.md")
    rows = [
        row
        for section in re.findall(r"^## (.+)$", page, re.MULTILINE)
        for row in documents.table("docs/troubleshooting.md", section)
    ]
    assert len(rows) > 30
    for message, _ in rows:
        text = message.strip("`")
        assert any(text in known for known in messages), f"no message says: {text}"


def _feature_rows() -> Iterator[list[str]]:
    for section in re.findall(r"^## (.+)$", documents.read("docs/features.md"), re.MULTILINE):
        rows = documents.table("docs/features.md", section)
        yield from (row for row in rows if len(row) == 6)


def test_every_test_in_the_table_of_features_exists() -> None:
    rows = list(_feature_rows())
    assert len(rows) > 30
    for feature, *_, tests in rows:
        named = documents.names(tests)
        assert named, f"{feature}: no test"
        for name in named:
            file, _, function = name.partition("::")
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {re.escape(function)}\(", source, re.MULTILINE), name


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason='the site needs mkdocs-material and mkdocstrings: pip install -e ".[docs]"',
)
def test_the_site_builds(tmp_path: Path) -> None:
    # Proxies that lead nowhere: the build has to do without the network.
    closed = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [*(sys.executable, "-m", "mkdocs", "build", "--strict"), "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **closed, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api/callback/index.html").read_text(encoding="utf-8")
    assert "merge_on_fit_end" in page and "Raises" in page
    assert "Examples" in page and "<blockquote" not in page
    assert (
        "lightning_lora.recipes.TextClassifier" in (tmp_path / "api/recipes/index.html").read_text()
    )
    outside = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+"')
    remote = [m[0] for path in tmp_path.rglob("*.html") for m in outside.finditer(path.read_text())]
    assert not [tag for tag in remote if 'rel="canonical"' not in tag]
