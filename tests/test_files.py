from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import CheckpointError
from lightning_lora.files import replacing_directory, replacing_file


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with replacing_directory(target) as fresh:
        (fresh / "new").write_text("1")
        assert not target.exists()
        assert fresh.parent == target.parent, "a rename must not cross file systems"
    assert listing(tmp_path) == ["deep", "deep/target", "deep/target/new"]


def test_the_old_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("0")
    with replacing_directory(str(target)) as fresh:
        (fresh / "new").write_text("1")
        assert listing(target) == ["old"]
    assert listing(tmp_path) == ["target", "target/new"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_all_as_it_was(
    tmp_path: Path, exists: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "target"
    if exists:
        target.mkdir()
        (target / "old").write_text("0")
    before = listing(tmp_path)
    with pytest.raises(error), replacing_directory(target) as fresh:
        (fresh / "new").write_text("1")
        raise error
    assert listing(tmp_path) == before


def test_a_failed_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("0")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == target and "old" not in self.parent.name:
            raise OSError("disk full")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"), replacing_directory(target) as fresh:
        (fresh / "new").write_text("1")
    assert listing(tmp_path) == ["target", "target/old"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    with pytest.raises(NotADirectoryError, match="is a file"), replacing_directory(target):
        pytest.fail("the block must not run")
    assert target.read_text() == "precious"
    assert listing(tmp_path) == ["target"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with replacing_directory(tmp_path / "target"):
        pass
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_private_files_become_as_readable_as_new_ones(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    with replacing_directory(tmp_path / "target") as fresh:
        (fresh / "private").write_text("")
        (fresh / "private").chmod(0o600)
    modes = [(tmp_path / name).stat().st_mode for name in ("ordinary", "target/private")]
    assert modes[0] == modes[1]


def test_a_file_appears_when_it_is_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target.txt"
    for text in ("0", "1"):
        with replacing_file(target) as fresh:
            fresh.write_text(text)
            assert not target.exists() or target.read_text() == "0"
            assert fresh.parent == target.parent, "a rename must not cross file systems"
        assert target.read_text() == text
    assert listing(tmp_path) == ["deep", "deep/target.txt"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "target.txt"
    target.write_text("0")
    with pytest.raises(RuntimeError, match="stop"), replacing_file(target) as fresh:
        fresh.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "0"
    assert listing(tmp_path) == ["target.txt"]
    with pytest.raises(IsADirectoryError, match="is a folder"), replacing_file(tmp_path):
        pass


@pytest.mark.parametrize("replacing", [replacing_file, replacing_directory])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_error(tmp_path: Path, replacing: Any, error: Exception) -> None:
    target = tmp_path / "target"
    said = r"target was not written: there is no room left"
    with pytest.raises(CheckpointError, match=said), replacing(target) as fresh:
        file = fresh / "part" if fresh.is_dir() else fresh
        file.write_text("half")
        raise error
    assert listing(tmp_path) == []


@pytest.mark.parametrize("replacing", [replacing_file, replacing_directory])
@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_names_as_long_as_can_be(tmp_path: Path, replacing: Any, name: str) -> None:
    for _ in range(2):
        with replacing(tmp_path / name) as fresh:
            (fresh / "a" if fresh.is_dir() else fresh).write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), replacing_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "no")
