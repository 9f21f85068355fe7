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
    "tokens": {"trainable_token_indices": [33, 5, 12, 21], "bias": "all"},
    "bitfit": {"r": 0, "bias": "all", "modules_to_save": ["head"]},
}
NETWORKS = {"tokens": "bert"}
# From data, which needs the whole model in each process.
EVA = {"init": "eva", "target_modules": ["linear1", "linear2", "query"], "init_batches": 6}
pytestmark = pytest.mark.slow


def fit(name: str, base: str, strategy: str = "auto", **settings: Any) -> Scenario:
    network = NETWORKS.get(base, "attention")
    return sgd(name, strategy, lora=VARIANTS.get(base, EVA), network=network, **settings)


def layouts(base: str) -> list[Scenario]:
    return [
        fit(f"{base}-ddp", base, "ddp"),
        fit(f"{base}-fsdp2", base, "fsdp2"),
        fit(f"{base}-directory", base, "fsdp2", options=DIRECTORY),
        fit(f"{base}-fsdp2-from-one", base, "fsdp2", resume=f"{base}/{CKPT}"),
        fit(f"{base}-fsdp", base, "fsdp"),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    run(root, 1, [fit(base, base) for base in [*VARIANTS, "eva"]])
    two = [each for base in VARIANTS for each in layouts(base)]
    two.append(fit("half", "frozen-a", "fsdp2", trainer={"precision": "bf16-true"}))
    two.append(fit("eva-ddp", "eva", "ddp"))
    two.append(fit("eva-fsdp2-from-one", "eva", "fsdp2", resume=f"eva/{CKPT}"))
    run(root, 2, two)
    run(root, 1, [fit(f"{b}-from-directory", b, resume=f"{b}-directory/{CKPT}") for b in VARIANTS])
    return root


CASES = [(base, other.name) for base in VARIANTS for other in layouts(base)]
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
