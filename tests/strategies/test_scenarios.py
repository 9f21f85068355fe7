"""Fits that must come to the same numbers however the model is laid out over processes.

Three sets of processes run all scenarios once: one process, two started by torchrun, and again one,
which resumes from what two have saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import load_adapter
from tests.commands import run_module
from tests.models import hugging_face
from tests.modules import Attention
from tests.strategies.scenarios import SAVE_AT, STEPS, Scenario, asked

IN_PLACE = {"bias": "all", "modules_to_save": ["head"]}
NORMS = {"bias": "lora_only", "train_layer_norms": True}
# What PyTorch's attention computes has no place for magnitudes; the preset leaves it out.
DORA = {"use_dora": True}
CKPT = f"step={SAVE_AT}.ckpt"
pytestmark = pytest.mark.slow


def sgd(name: str, strategy: str = "auto", **settings: Any) -> Scenario:
    # Gradients of A are zero at first: AdamW would make noise of their rounding.
    return Scenario(name, strategy, **{"lora": IN_PLACE, "optimizer": "sgd", **settings})


FIRST = [
    sgd("one"),
    sgd("one-fsdp2", "fsdp2"),
    sgd("bert", network="bert", lora=NORMS),
    sgd("default", lora={}),
    Scenario("adamw", lora=IN_PLACE),
    sgd("saved", network="LLAMA", lora={}),
    sgd("dora", lora=DORA),
    sgd("dora-saved", network="LLAMA", lora=DORA),
    sgd("dora-half", lora=DORA, trainer={"precision": "bf16-true"}),
    sgd("half", lora={}, trainer={"precision": "bf16-true"}),
    sgd("mixed", lora={}, trainer={"precision": "bf16-mixed"}),
    sgd("clipped", trainer={"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
]
LAYOUTS = {
    "one": [
        sgd("ddp", "ddp"),
        sgd("fsdp2", "fsdp2"),
        sgd(
            "directory",
            "fsdp2",
            options={
                "save_distributed_checkpoint": True,
                "activation_checkpointing": True,
                "auto_wrap_policy": 300,
            },
        ),
        sgd("offload", "fsdp2", options={"cpu_offload": True}),
        sgd("hybrid", "fsdp2", options={"replicas": 2, "reshard_after_forward": False}),
        sgd("named", "fsdp2", options={"auto_wrap_policy": ["TransformerEncoderLayer"]}),
        sgd("fsdp", "fsdp"),
        sgd("fsdp-directory", "fsdp", options={"state_dict_type": "sharded"}),
        sgd("fsdp-grad-op", "fsdp", options={"sharding_strategy": "SHARD_GRAD_OP"}),
        # From one process, from a directory, and from one kind of sharding into the other.
        sgd("fsdp2-from-one", "fsdp2", resume=f"one/{CKPT}"),
        sgd("fsdp2-from-directory", "fsdp2", resume=f"directory/{CKPT}"),
        sgd("fsdp2-from-fsdp", "fsdp2", resume=f"fsdp/{CKPT}"),
        sgd("fsdp-from-directory", "fsdp", resume=f"directory/{CKPT}"),
        sgd("fsdp-from-ddp", "fsdp", resume=f"ddp/{CKPT}"),
        sgd("ddp-from-directory", "ddp", resume=f"directory/{CKPT}"),
        sgd("ddp-from-fsdp2", "ddp", resume=f"fsdp2/{CKPT}"),
    ],
    "bert": [
        sgd("bert-fsdp2", "fsdp2", network="bert", lora=NORMS),
        sgd("bert-fsdp", "fsdp", network="bert", lora=NORMS),
    ],
    "default": [sgd("user", "fsdp2", network="user", lora={})],
    "adamw": [Scenario("adamw-resumed", "fsdp2", lora=IN_PLACE, resume=f"adamw/{CKPT}")],
    "saved": [sgd("saved-fsdp2", "fsdp2", network="LLAMA", lora={})],
    "dora": [
        sgd("dora-ddp", "ddp", lora=DORA),
        sgd("dora-fsdp2", "fsdp2", lora=DORA),
        sgd("dora-fsdp", "fsdp", lora=DORA),
        sgd("dora-user", "fsdp2", network="user", lora=DORA),
        sgd("dora-fsdp2-from-ddp", "fsdp2", lora=DORA, resume=f"dora-ddp/{CKPT}"),
        sgd("dora-fsdp-from-fsdp2", "fsdp", lora=DORA, resume=f"dora-fsdp2/{CKPT}"),
    ],
    "dora-saved": [sgd("dora-saved-fsdp2", "fsdp2", network="LLAMA", lora=DORA)],
    "dora-half": [sgd("dora-half-fsdp2", "fsdp2", lora=DORA, trainer={"precision": "bf16-true"})],
    "half": [sgd("half-fsdp2", "fsdp2", lora={}, trainer={"precision": "bf16-true"})],
    "mixed": [sgd("mixed-fsdp2", "fsdp2", lora={}, trainer={"precision": "bf16-mixed"})],
    "clipped": [
        sgd(
            "clipped-fsdp2",
            "fsdp2",
            trainer={"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        )
    ],
}
LAST = [
    sgd("one-from-directory", resume=f"directory/{CKPT}"),
    sgd("one-from-fsdp2", resume=f"fsdp2/{CKPT}"),
    sgd("one-from-fsdp", resume=f"fsdp-directory/{CKPT}"),
    sgd("one-fsdp2-from-directory", "fsdp2", resume=f"directory/{CKPT}"),
]
ROUGHLY = {"half": 0.03, "dora-half": 0.003, "mixed": 0.03}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenarios")
    hugging_face("llama").save_pretrained(root / "llama")  # type: ignore[operator]
    run(root, 1, FIRST)
    run(root, 2, [scenario for scenarios in LAYOUTS.values() for scenario in scenarios])
    run(root, 1, LAST)
    return root


def run(root: Path, processes: int, scenarios: list[Scenario]) -> None:
    values = asked(scenarios)
    for value in values:
        value["network"] = value["network"].replace("LLAMA", str(root / "llama"))
    arguments = [str(root), processes, values]
    done = run_module("tests.strategies.scenarios", arguments, processes)
    errors = [path.read_text() for path in root.glob("*/error.txt")]
    assert done.returncode == 0, "\n".join(errors) or done.stderr[-3000:]


def result(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / name / "result.json").read_text())
    return found


CASES = [(base, other.name) for base, others in LAYOUTS.items() for other in others]
CASES += [("one", other.name) for other in [FIRST[1], *LAST]]


@pytest.mark.parametrize(("base", "other"), CASES)
def test_same_numbers(results: Path, base: str, other: str) -> None:
    expected, found = result(results, base), result(results, other)
    count = len(found["losses"])
    resumed = "from" in other or "resumed" in other
    assert count == (STEPS - SAVE_AT if resumed else STEPS)
    tolerance = ROUGHLY.get(base, 2e-6)
    assert found["losses"] == pytest.approx(expected["losses"][-count:], abs=tolerance)
    assert found["test"] == pytest.approx(expected["test"], abs=tolerance)
    if not resumed:
        assert found["test_of_checkpoint"] == pytest.approx(
            expected["test_of_checkpoint"], abs=tolerance
        )
        # With accumulation the checkpoint is that of the last step.
        moved = abs(found["test_of_checkpoint"] - found["test"])
        assert (moved > tolerance) == (base != "clipped")
    if base in ROUGHLY or base == "adamw":
        return
    before = torch.load(results / base / "merged.pt", weights_only=True)
    after = torch.load(results / other / "merged.pt", weights_only=True)
    assert before.keys() == after.keys() and not any(".lora." in name for name in after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=2e-6, rtol=1e-5, msg=name)


def test_units_are_what_was_asked_for(results: Path) -> None:
    assert "FSDPTransformerEncoderLayer" in result(results, "fsdp2")["classes"]
    assert "FSDPTransformerEncoderLayer" in result(results, "named")["classes"]
    assert "FSDPBertLayer" in result(results, "bert-fsdp2")["classes"]
    assert "FSDPLlamaDecoderLayer" in result(results, "saved-fsdp2")["classes"]
    assert "FSDPLoRAFactors" in result(results, "user")["classes"]
    assert "FullyShardedDataParallel" in result(results, "fsdp")["classes"]
    assert not any("LoRALinear" in name for name in result(results, "fsdp2")["classes"])


@pytest.mark.parametrize("name", ["fsdp2", "fsdp", "ddp"])
def test_files_hold_the_adapter_alone(results: Path, name: str) -> None:
    file = results / name / CKPT
    checkpoint = torch.load(file, weights_only=True)
    one = torch.load(results / "one" / CKPT, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(one["state_dict"])
    assert {t.device.type for t in checkpoint["state_dict"].values()} == {"cpu"}
    assert checkpoint["lightning_lora"]["optimizers"] == one["lightning_lora"]["optimizers"]
    ours, theirs = (c["optimizer_states"][0] for c in (checkpoint, one))
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        momentum = ours["state"][key]["momentum_buffer"]
        torch.testing.assert_close(momentum, state["momentum_buffer"], atol=1e-6, rtol=1e-5)


def test_directories_hold_the_adapter_alone(results: Path) -> None:
    folder = results / "directory" / CKPT
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["meta.pt", "part-00000.safetensors", "part-00001.safetensors"]
    parts = [load_file(path) for path in sorted(folder.glob("part-*"))]
    one = torch.load(results / "one" / CKPT, weights_only=True)
    state = sum(t.nbytes for t in one["state_dict"].values())
    sizes = [sum(t.nbytes for t in part.values()) for part in parts]
    # The trained parameters and a momentum of the same size, about half in each.
    assert sum(sizes) == 2 * state and min(sizes) > 0.8 * state


def test_a_directory_is_an_adapter_to_load(results: Path) -> None:
    state = {}
    for name in ("directory", "fsdp2"):
        model = Attention(dropout=0.0)
        load_adapter(nn.ModuleDict({"net": model}), results / name / CKPT, strict_base=False)
        state[name] = {key: value.clone() for key, value in model.state_dict().items()}
    for key in (key for key in state["fsdp2"] if ".lora." in key or key.startswith("head")):
        torch.testing.assert_close(state["directory"][key], state["fsdp2"][key])


def test_the_sharded_base_has_the_fingerprint_of_the_whole(results: Path) -> None:
    def fingerprint(name: str) -> str:
        checkpoint = torch.load(results / name / CKPT, weights_only=True)
        return str(checkpoint["lightning_lora"]["base"]["fingerprint"])

    assert fingerprint("saved") == fingerprint("saved-fsdp2")
    assert fingerprint("one") == fingerprint("fsdp2") == fingerprint("fsdp")
    assert fingerprint("saved") != fingerprint("one")
