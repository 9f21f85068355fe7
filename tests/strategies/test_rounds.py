"""A base that LoftQ quantizes anew, on one process, under DDP and under FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import run_module
from tests.quantized import quantized_hugging_face
from tests.strategies.scenarios import SAVE_AT, STEPS

pytestmark = pytest.mark.slow
RUNS: list[tuple[int, list[tuple[str, str, int, str | None]]]] = [
    (1, [("one", "auto", 1, None)]),
    (2, [("ddp", "ddp", 2, None), ("two", "fsdp2", 2, None), ("two-from-one", "fsdp2", 2, "one")]),
    (1, [("one-from-two", "auto", 1, "two")]),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("rounds")
    quantized_hugging_face("bert", "nf4", root / "base")
    for processes, runs in RUNS:
        done = run_module("tests.strategies.rounds", [str(root), runs], processes, 300)
        assert done.returncode == 0, done.stderr[-4000:]
    found = {path.parent.name: json.loads(path.read_text()) for path in root.glob("*/losses.json")}
    return {"root": root, **found}


@pytest.mark.parametrize("name", ["ddp", "two", "two-from-one", "one-from-two"])
def test_same_numbers_and_resume_either_way(results: dict[str, Any], name: str) -> None:
    expected, found = results["one"], results[name]
    assert len(found) == (STEPS - SAVE_AT if "from" in name else STEPS)
    assert found == pytest.approx(expected[-len(found) :], abs=2e-6)
    assert expected[-1] != expected[0]


def test_files_say_how_the_base_was_quantized(results: dict[str, Any]) -> None:
    root: Path = results["root"]
    one, two = (
        torch.load(root / name / f"step={SAVE_AT}.ckpt", weights_only=True)
        for name in ("one", "two")
    )
    assert list(one["state_dict"]) == list(two["state_dict"])
    prior = [name for name in one["state_dict"] if name.endswith("_prior")]
    assert prior and all(one["state_dict"][name].any() for name in prior)
    for name in prior:
        torch.testing.assert_close(two["state_dict"][name], one["state_dict"][name])
    bases = [c["lightning_lora"]["base"]["fingerprint"] for c in (one, two)]
    assert bases[0] == bases[1]
