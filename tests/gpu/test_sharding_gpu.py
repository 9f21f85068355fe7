"""FSDP2 and FSDP1 on one GPU come to the numbers of the GPU alone; run by `pytest -m gpu`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.commands import run_module
from tests.strategies.scenarios import Scenario, asked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LORA = {"bias": "all", "modules_to_save": ["head"]}
SCENARIOS = [
    Scenario("one", optimizer="sgd", lora=LORA),
    Scenario("fsdp2", "fsdp2", optimizer="sgd", lora=LORA),
    Scenario("offload", "fsdp2", {"cpu_offload": True}, optimizer="sgd", lora=LORA),
    Scenario(
        "directory",
        "fsdp2",
        {"save_distributed_checkpoint": True, "activation_checkpointing": True},
        optimizer="sgd",
        lora=LORA,
    ),
    Scenario("fsdp", "fsdp", optimizer="sgd", lora=LORA),
    Scenario("resumed", "fsdp2", optimizer="sgd", lora=LORA, resume="one/step=3.ckpt"),
    Scenario("half", optimizer="sgd", trainer={"precision": "bf16-true"}),
    Scenario("half-fsdp2", "fsdp2", optimizer="sgd", trainer={"precision": "bf16-true"}),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("gpu")
    arguments = [str(root), 1, asked(SCENARIOS), "gpu"]
    done = run_module("tests.strategies.scenarios", arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return {s.name: json.loads((root / s.name / "result.json").read_text()) for s in SCENARIOS}


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ("one", "fsdp2"),
        ("one", "offload"),
        ("one", "directory"),
        ("one", "fsdp"),
        ("one", "resumed"),
        ("half", "half-fsdp2"),
    ],
)
def test_same_numbers(results: dict[str, Any], base: str, other: str) -> None:
    expected, found = results[base]["losses"], results[other]["losses"]
    tolerance = 0.03 if base == "half" else 1e-5
    assert found == pytest.approx(expected[-len(found) :], abs=tolerance)
    assert results[other]["test"] == pytest.approx(results[base]["test"], abs=tolerance)
