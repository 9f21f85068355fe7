"""`lightning-lora push` against a hub that is an object in memory; no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError

from lightning_lora import inject_lora, save_adapter
from lightning_lora.cli import main
from tests.commands import imported, run_command
from tests.models import hugging_face

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


class Hub:
    """What the client is asked to do."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, set[str]] = {}
        self.failure: Exception | None = None

    def whoami(self) -> dict[str, str]:
        if isinstance(self.failure, ConnectionError):
            raise self.failure
        return {"name": "somebody"}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        if " " in repo_id:
            raise HFValidationError("Repo id must use alphanumeric chars")
        assert exist_ok
        self.repositories[repo_id] = private

    def upload_folder(
        self, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> None:
        if self.failure is not None:
            raise self.failure
        assert repo_id in self.repositories
        assert all((folder_path / name).is_file() for name in allow_patterns)
        self.files[repo_id] = set(allow_patterns)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    # A class, because other packages name it in annotations.
    api = type("HfApi", (), {"__new__": lambda cls: found})
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = hugging_face("bert")
    inject_lora(model, r=2)
    path = save_adapter(model, tmp_path / "adapter")
    (path / ".cache").mkdir()
    (path / ".cache/secret").write_text("")
    return path


def test_an_adapter_is_uploaded_with_its_card(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(folder), "mine", "--private"])
    assert hub.repositories == {"somebody/mine": True} and hub.files == {"somebody/mine": ADAPTER}
    assert "Uploaded to https://huggingface.co/somebody/mine" in capsys.readouterr().out
    main(["push", str(folder), "org/theirs", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["url"].endswith("org/theirs") and set(found["files"]) == ADAPTER
    assert not hub.repositories["org/theirs"]


def test_a_merged_model_is_uploaded_and_a_dry_run_is_not(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = hugging_face("bert")
    model.save_pretrained(tmp_path / "merged")
    main(["push", str(tmp_path / "merged"), "m", "--dry_run"])
    assert "Nothing was uploaded" in capsys.readouterr().out and hub.repositories == {}
    main(["push", str(tmp_path / "merged"), "m"])
    assert hub.files["somebody/m"] == {"config.json", "model.safetensors"}


def test_mistakes_end_with_code_2_and_one_message(
    hub: Hub,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def says(expected: str, *arguments: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["push", *arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert expected in printed.err and printed.err.count("\n") == 1, printed.err

    says("the following arguments are required: NAME", str(folder))
    says("There is no folder", str(tmp_path / "nowhere"), "m")
    (tmp_path / "a.ckpt").write_text("")
    says("lightning-lora export CKPT DIR", str(tmp_path / "a.ckpt"), "m")
    says("is no name for the hub", str(folder), "two words")
    hub.failure = RuntimeError("403 Forbidden\nrequest id")
    says("was not uploaded to somebody/m: 403 Forbidden", str(folder), "m")
    hub.failure = ConnectionError("no route")
    says("cannot be reached (no route)", str(folder), "m")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    says("Run `hf auth login`", str(folder), "m")
    assert hub.files == {}


def test_without_a_login_the_command_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    done = run_command(tmp_path, "push", str(folder), "mine")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: Not logged in to the hub")


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy, done = imported(tmp_path, ("torch", "huggingface_hub"), "push", "--help")
    assert heavy == [] and "usage: lightning-lora push" in done.stdout
