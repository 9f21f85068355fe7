"""`lightning-lora configs`, and finding bundled configs by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lora import cli_paths
from lightning_lora.cli import main
from lightning_lora.cli_configs import describe
from lightning_lora.cli_paths import bundled_configs, find_bundled, find_config
from lightning_lora.errors import ConfigError


def _text(name: str) -> str:
    found = find_bundled(name)
    assert found is not None
    return found.read_text()


def test_the_list_says_what_each_config_is_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "list"])
    printed = " ".join(capsys.readouterr().out.split())
    for name in bundled_configs():
        title, needs = describe(_text(name))
        assert title, f"{name} begins with a comment"
        assert needs, f"{name} says what it needs"
        assert f"{name} {title} {needs}" in printed


@pytest.mark.parametrize("name", bundled_configs())
def test_every_config_begins_with_its_launch_command(name: str) -> None:
    comment = _text(name).partition("\n\n")[0]
    command = next(line for line in comment.splitlines() if "lightning-lora fit" in line)
    config = command.split("--config ")[1].split()[0]
    assert find_config(config) == str(find_bundled(name))


def test_show_prints_the_yaml_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "show", "quickstart"])
    assert capsys.readouterr().out == _text("quickstart")


def test_a_copy_goes_to_a_file_or_into_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["configs", "copy", "quickstart", "my.yaml"])
    assert "lightning-lora fit --config my.yaml" in capsys.readouterr().out
    main(["configs", "copy", "quickstart", "."])
    main(["configs", "copy", "configs/quickstart.yaml", "new/deep/"])
    found = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert found == ["my.yaml", "new/deep/quickstart.yaml", "quickstart.yaml"]
    for name in found:
        assert (tmp_path / name).read_text() == _text("quickstart")


def test_a_copy_overwrites_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["configs", "copy", "quickstart", "my.yaml"])
    assert stopped.value.code == 2
    assert "my.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "my.yaml").read_text() == "mine"
    main(["configs", "copy", "quickstart", "my.yaml", "--force"])
    assert (tmp_path / "my.yaml").read_text() == _text("quickstart")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "configs: the following arguments are required"),
        (["lst"], "invalid choice: 'lst'"),
        (["show"], "required: NAME"),
        (["show", "quikstart"], "(did you mean quickstart?). Bundled are: "),
        (["copy", "quickstart"], "required: DEST"),
        (["copy", "quickstart", "file/x.yaml"], "file/x.yaml cannot be written"),
        (["list", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["configs", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two configs called text, and a third whose short name is another's whole."""
    for name in ("text", "one/plain", "two/plain", "two/text"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("# A config.\n")
    monkeypatch.setattr(cli_paths, "_config_root", lambda: tmp_path)
    return tmp_path


def test_a_name_that_stands_for_several_is_refused(several: Path) -> None:
    with pytest.raises(ConfigError, match=r"called plain: one/plain, two/plain\. Give the whole"):
        find_config("plain")
    assert find_config("two/plain") == str(several / "two/plain.yaml")
    assert find_config("text") == str(several / "text.yaml"), "the whole name goes first"


def test_a_name_near_the_last_part_of_a_config_is_completed(several: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean (one|two)/plain\?"):
        find_config("plian")


def test_a_file_of_the_users_goes_before_a_bundled_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("lora: {}")
    assert find_config("quickstart") == "quickstart"


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        (
            "# A title\n# in two lines.\n#\n# Needs a GPU.\nmodel:\n# Needs no more.\n",
            "Needs a GPU.",
        ),
        (
            "# Title.\n#\n# Runs long. Needs 1.5 GB and\n# time. Gives .9.\n",
            "Needs 1.5 GB and time.",
        ),
        ("# Title.\n", ""),
        ("model: null\n", ""),
    ],
)
def test_needs_are_the_sentence_that_says_so(comment: str, expected: str) -> None:
    assert describe(comment)[1] == expected


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    heavy = ("torch", "lightning", "numpy", "rich", "jsonargparse", "yaml")
    program = (
        "import sys\nfrom lightning_lora.cli import main\n"
        "main(sys.argv[1:])\n"
        f"print('heavy:', [name for name in {heavy} if name in sys.modules])\n"
    )
    for arguments in (["configs", "list"], ["--help"]):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )
        assert "quickstart" in done.stdout
        assert done.stdout.endswith("heavy: []\n")


def test_what_is_no_text_is_no_config(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"trainer: null # caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml is no text in UTF-8: .* byte 19"):
        find_config(str(latin))
    with pytest.raises(ConfigError, match=r"is a folder\. Give a YAML file"):
        find_config(str(tmp_path))
