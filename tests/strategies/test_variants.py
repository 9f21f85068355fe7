"""Variants of LoRA that must come to the same numbers however the model is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.strategies.scenarios import SAVE_AT, STEPS, Scenario
from tests.strategies.test_scenarios import result, run, sgd

CKPT = f"step={SAVE_AT}.ckpt"
DIRECTORY = {"save_distributed_checkpoint": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen-a": {"freeze_A": True, "bias": "all"},
    "pissa": {"init": "pissa_niter_4"},
    "bitfit": {"r": 0, "bias": "all", "modules_to_save": ["head"]},
}
# From data, which needs the whole model in each process.
EVA = {"init": "eva", "target_modules": ["linear1", "linear2", "query"], "init_batches": 6}
pytestmark = pytest.mark.slow


def layouts(name: str, lora: dict[str, Any]) -> list[Scenario]:
    return [
        sgd(f"{name}-ddp", "ddp", lora=lora),
        sgd(f"{name}-fsdp2", "fsdp2", lora=lora),
        sgd(f"{name}-directory", "fsdp2", lora=lora, options=DIRECTORY),
        sgd(f"{name}-fsdp2-from-one", "fsdp2", lora=lora, resume=f"{name}/{CKPT}"),
        sgd(f"{name}-fsdp", "fsdp", lora=lora),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    half = {"precision": "bf16-true"}
    run(root, 1, [sgd(name, lora=lora) for name, lora in [*VARIANTS.items(), ("eva", EVA)]])
    two = [each for name, lora in VARIANTS.items() for each in layouts(name, lora)]
    two.append(sgd("half", "fsdp2", lora=VARIANTS["frozen-a"], trainer=half))
    two.append(sgd("eva-ddp", "ddp", lora=EVA))
    two.append(sgd("eva-fsdp2-from-one", "fsdp2", lora=EVA, resume=f"eva/{CKPT}"))
    run(root, 2, two)
    last = [
        sgd(f"{name}-from-directory", lora=lora, resume=f"{name}-directory/{CKPT}")
        for name, lora in VARIANTS.items()
    ]
    run(root, 1, last)
    return root


CASES = [(name, other.name) for name, lora in VARIANTS.items() for other in layouts(name, lora)]
CASES += [(name, f"{name}-from-directory") for name in VARIANTS]
CASES += [("eva", "eva-fsdp2-from-one")]


@pytest.mark.parametrize(("base", "other"), CASES)
def test_same_numbers(results: Path, base: str, other: str) -> None:
    expected, found = result(results, base), result(results, other)
    count = STEPS - SAVE_AT if "-from-" in other else STEPS
    assert found["losses"] == pytest.approx(expected["losses"][-count:], abs=2e-6)
    assert found["test"] == pytest.approx(expected["test"], abs=2e-6)
    if count == STEPS:
        assert abs(found["test"] - found["test_of_checkpoint"]) > 2e-6
    before = torch.load(results / base / "merged.pt", weights_only=True)
    after = torch.load(results / other / "merged.pt", weights_only=True)
    assert before.keys() == after.keys() and not any(".lora." in name for name in after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("base", VARIANTS)
def test_files_hold_the_same(results: Path, base: str) -> None:
    one = torch.load(results / base / CKPT, weights_only=True)
    for layout in ("ddp", "fsdp2", "fsdp"):
        checkpoint = torch.load(results / f"{base}-{layout}" / CKPT, weights_only=True)
        assert list(checkpoint["state_dict"]) == list(one["state_dict"])
        ours, theirs = (c["lightning_lora"]["base"]["fingerprint"] for c in (checkpoint, one))
        assert ours == theirs


def test_frozen_factors_are_saved_as_they_were_drawn(results: Path) -> None:
    states = [
        torch.load(results / name / CKPT, weights_only=True)["state_dict"]
        for name in ("frozen-a", "frozen-a-fsdp2", "frozen-a-fsdp", "half")
    ]
    factors = [{n: t for n, t in state.items() if n.endswith("lora.A")} for state in states]
    for found in factors:
        assert found and found.keys() == factors[0].keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, factors[0][name]) and tensor.dtype == torch.float32


def test_processes_find_the_components_of_all_their_batches(results: Path) -> None:
    one, two = (
        torch.load(results / name / CKPT, weights_only=True)["state_dict"]
        for name in ("eva", "eva-ddp")
    )
    for name, A in one.items():
        if name.endswith("lora.A"):
            cosines = torch.linalg.svdvals(A @ two[name].t())
            scale = torch.linalg.svdvals(A) * torch.linalg.svdvals(two[name])
            assert (cosines / scale).min() > 0.99, name
