"""`lightning-lora inspect` and `lightning-lora diff`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import save_adapter
from lightning_lora.cli import main
from tests.models import mlp
from tests.test_analysis import adapted, checkpoint

NAMES = ["fc1", "fc2"]


def _json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    main([*map(str, arguments), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _text(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    main([*map(str, arguments)])
    return capsys.readouterr().out


def test_inspect_says_what_is_in_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(target_modules=NAMES, modules_to_save=["head"], rank_pattern={"fc2": 3})
    with torch.no_grad():
        model.fc1.lora.B *= 100
    path = checkpoint(model, tmp_path / "a.ckpt", epoch=3, global_step=12)
    found = _json(capsys, "inspect", path)
    assert found["form"] == "Lightning checkpoint" and found["bytes"] == path.stat().st_size
    assert (found["epoch"], found["global_step"]) == (3, 12)
    assert found["settings"]["rank_pattern"] == {"fc2": 3}
    assert found["base"]["parameters"] == sum(p.numel() for p in mlp().parameters())
    assert found["parameters"] == {"factors": 2 * 16 + 3 * 18, "trained_whole": 8 * 3 + 3}
    assert [row["layer"] for row in found["layers"]] == NAMES  # the one that moved most first
    for row in found["layers"]:
        layer = model.get_submodule(row["layer"])
        delta = layer.delta_weight().detach()  # type: ignore[operator]
        assert row["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row["delta_rms"] == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-5)
        assert row["A_norm"] == pytest.approx(float(layer.lora.A.detach().norm()), rel=1e-5)
        assert row["spectral_norm"] == pytest.approx(
            float(torch.linalg.svdvals(delta)[0]), rel=1e-5
        )
    shapes = {row["name"]: row["shape"] for row in found["other_tensors"]}
    assert shapes == {"head.weight": [3, 8], "head.bias": [3]}

    printed = _text(capsys, "inspect", path)
    for expected in ("epoch 3, global step 12", "rank_pattern={'fc2': 3}", "most      fc1, fc2"):
        assert expected in printed


def test_inspect_reads_peft_folders_and_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(target_modules=NAMES)
    found = _json(capsys, "inspect", save_adapter(model, tmp_path / "peft"))
    assert found["form"] == "PEFT folder" and found["base"] == {"name_or_path": "unknown"}
    assert {row["layer"] for row in found["layers"]} == set(NAMES)
    convolution = adapted(lambda: nn.Sequential(nn.Conv1d(2, 3, 2)), target_modules=["0"])
    path = checkpoint(convolution, tmp_path / "conv.ckpt")
    found = _json(capsys, "inspect", path)
    assert found["layers"] == [] and found["parameters"] == {"factors": 14, "trained_whole": 0}
    assert [row["name"] for row in found["other_tensors"]] == ["0.lora.A", "0.lora.B"]
    assert "Left out: 0: a convolution" in _text(capsys, "inspect", path)


def test_an_adapter_that_has_diverged_is_still_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(target_modules=NAMES, modules_to_save=["head"])
    with torch.no_grad():
        model.fc1.lora.A[0, 0] = torch.nan
        model.head.bias[0] = torch.inf
    path = checkpoint(model, tmp_path / "a.ckpt")
    found = _json(capsys, "inspect", path)
    assert [row["layer"] for row in found["layers"]] == ["fc2"]
    assert "no finite numbers" in found["left_out"]["fc1"]
    norms = {row["name"]: row["norm"] for row in found["other_tensors"]}
    assert norms["head.bias"] is None and norms["fc1.lora.A"] is None and norms["head.weight"] > 0
    assert not _json(capsys, "diff", path, path)["identical"]
    assert "head.bias" in _text(capsys, "inspect", path)


def test_diff_of_an_adapter_and_itself_finds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(target_modules=NAMES)
    path, folder = checkpoint(model, tmp_path / "a.ckpt"), save_adapter(model, tmp_path / "peft")
    found = _json(capsys, "diff", path, path)
    assert found["identical"] and found["same_base"] and found["settings"] == {}
    assert all(row["difference_norm"] == 0 for row in found["layers"])
    found = _json(capsys, "diff", path, folder)
    assert found["identical"] and found["same_base"] is None
    assert "All trained tensors and scalings are equal" in _text(capsys, "diff", path, path)


def test_diff_says_how_far_apart_two_adapters_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = adapted(target_modules=NAMES, modules_to_save=["head"], r=2)
    other = adapted(target_modules=NAMES, modules_to_save=["head"], r=3, alpha=12, seed=4)
    with torch.no_grad():
        other.head.bias += 2.0
    paths = [checkpoint(each, tmp_path / f"{i}.ckpt") for i, each in enumerate((one, other))]
    found = _json(capsys, "diff", *paths)
    assert found["settings"] == {"r": [2, 3], "alpha": [6, 12]}
    assert found["same_base"] and not found["identical"]
    assert {row["layer"] for row in found["layers"]} == set(NAMES)
    for row in found["layers"]:
        first, second = (
            m.get_submodule(row["layer"]).delta_weight().detach()  # type: ignore[operator]
            for m in (one, other)
        )
        assert row["difference_norm"] == pytest.approx(float((first - second).norm()), rel=1e-4)
        cosine = torch.cosine_similarity(first.flatten(), second.flatten(), dim=0)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-5)
        tops = [torch.linalg.svd(delta).Vh[0] for delta in (first, second)]
        assert row["phi_1_1"] == pytest.approx(float(tops[0] @ tops[1]) ** 2, abs=1e-5)
    others = {row["name"]: row["difference_norm"] for row in found["other_tensors"]}
    assert others == {"head.weight": 0, "head.bias": pytest.approx(2 * 3**0.5)}
    printed = _text(capsys, "diff", *paths)
    assert "r: 2 -> 3" in printed and "The bases are the same." in printed


def test_diff_names_layers_that_one_alone_adapts_and_another_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = checkpoint(adapted(target_modules=["fc1"]), tmp_path / "a.ckpt")
    both = checkpoint(adapted(lambda: mlp(seed=9), target_modules=NAMES), tmp_path / "b.ckpt")
    found = _json(capsys, "diff", one, both)
    assert found["only_first"] == [] and found["only_second"] == ["fc2"]
    assert found["same_base"] is False and not found["identical"]
    assert "Adapted by the second alone: fc2" in _text(capsys, "diff", one, both)


def test_mistakes_end_with_code_2_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(adapted(target_modules=NAMES), tmp_path / "a.ckpt")
    full = tmp_path / "full.ckpt"
    torch.save({"state_dict": mlp().state_dict()}, full)
    halved = torch.load(path, weights_only=True)
    name = next(name for name in halved["state_dict"] if name.endswith("lora.B"))
    del halved["state_dict"][name]
    torch.save(halved, tmp_path / "halved.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[:1000])
    for arguments, expected in (
        (["inspect"], "the following arguments are required: CKPT"),
        (["inspect", str(tmp_path / "b.ckpt")], "holds: a.ckpt, cut.ckpt, full"),
        (["inspect", str(tmp_path / "halved.ckpt")], f"is damaged: {name} is missing"),
        (["inspect", str(cut)], "failed finding central directory). Use an earlier checkpoint."),
        (["inspect", str(full)], "full-model checkpoint"),
        (["diff", str(path)], "the following arguments are required: CKPT"),
        (["diff", str(path), str(tmp_path)], "is no adapter folder"),
        (["inspekt", str(path)], "did you mean 'inspect'?"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert expected in printed.err and printed.err.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom lightning_lora.cli import main\n"
        "for command in ('inspect', 'diff', 'analyze'):\n"
        "    try:\n        main([command, '--help'])\n    except SystemExit:\n        pass\n"
        "heavy = ('torch', 'lightning', 'rich', 'numpy')\n"
        "print('heavy:', [name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("usage: lightning-lora") == 3
    assert done.stdout.endswith("heavy: []\n")
