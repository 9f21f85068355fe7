"""What sharding costs: saving an adapter over bases of two sizes, loading a base onto two ranks.

    python -m benchmarks.sharding save
    python -m benchmarks.sharding load --layers 16

`save`: two ranks under FSDP2 with the same adapter over a small base and one ten times as large;
time, file and bytes over the network of a checkpoint, beside those of Lightning's own gathering
of the whole model. `load`: a Llama of random bf16 weights, written once; peak of the memory that a
rank allocates (RssAnon) and maps (RssFile) while the model is built and sharded, reading each
rank's part against loading it whole on each rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_lora import FSDP2Strategy, LoRACallback
from lightning_lora.pretrained import pretrained_on_meta

WAYS = {"save": ("adapter alone", "whole model"), "load": ("own part", "whole on each rank")}
ROUNDS = 7


class Block(nn.Module):
    """An adapted layer and a frozen one that makes the size."""

    def __init__(self, width: int, frozen: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.up = nn.Linear(width, frozen)
        self.down = nn.Linear(frozen, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.query(x))))
        return out


class Blocks(LightningModule):
    def __init__(self, frozen: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(256, frozen) for _ in range(8)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.blocks(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(4, 256), batch_size=2)


class Llama(LightningModule):
    def __init__(self, folder: str, way: str) -> None:
        super().__init__()
        self.folder, self.way = folder, way

    def configure_model(self) -> None:
        from transformers import AutoModelForCausalLM

        if self.way == "own part":
            self.net = pretrained_on_meta(AutoModelForCausalLM, self.folder)
        else:
            self.net = AutoModelForCausalLM.from_pretrained(self.folder).train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    configure_optimizers = Blocks.configure_optimizers

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randint(1000, (2, 16)), batch_size=1)


def trainer_for(callbacks: list[Any]) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=FSDP2Strategy(),
        callbacks=callbacks,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def network_bytes() -> int:
    """Bytes sent over the loopback interface."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if "lo:" in x)
    return int(line.split()[9])


def save(arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    """Fit for a step, then save again and again."""
    model = Blocks(arguments.frozen)
    lora = LoRACallback(r=8, target_modules=["query"], verbose=False, merge_on_fit_end=False)
    trainer = trainer_for([lora] if way == "adapter alone" else [])
    trainer.fit(model)
    path = Path(tempfile.gettempdir()) / "sharding-benchmark.ckpt"
    seconds, moved = [], []
    for _ in range(ROUNDS):
        trainer.strategy.barrier()
        before, start = network_bytes(), time.perf_counter()
        trainer.save_checkpoint(path)
        trainer.strategy.barrier()
        seconds.append(time.perf_counter() - start)
        moved.append(network_bytes() - before)
    return {
        "base MB": round(sum(p.numel() for p in model.parameters()) * 4 / 1e6),
        "ms": round(1000 * statistics.median(seconds), 1),
        "file MB": round(path.stat().st_size / 1e6, 2),
        "network MB": round(statistics.median(moved) / 1e6, 2),
    }


def load(arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    """Build and shard the model, and train for a step; sample the memory until the step begins."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()

    def memory() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        return {x.split(":")[0]: int(x.split()[1]) for x in lines if x.startswith(tuple(peaks))}

    def sample() -> None:
        while not done.is_set():
            for key, value in memory().items():
                peaks[key] = max(peaks[key], value)
            time.sleep(0.002)

    class Stop(LoRACallback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            done.set()

    model = Llama(arguments.folder, way)
    trainer = trainer_for([Stop(r=8, verbose=False, merge_on_fit_end=False)])
    before = memory()
    watcher = threading.Thread(target=sample)
    watcher.start()
    start = time.perf_counter()
    try:
        trainer.fit(model)
    finally:
        done.set()
    watcher.join()
    share = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[operator]
    return {
        "share MB": round(share / 1e6),
        "anonymous MB": round((peaks["RssAnon"] - before["RssAnon"]) / 1e3),
        "mapped MB": round((peaks["RssFile"] - before["RssFile"]) / 1e3),
        "seconds": round(time.perf_counter() - start, 1),
    }


def write_llama(folder: Path, layers: int) -> None:
    """Random bf16 weights, a file for each layer, without the model in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_lora.strategies.exporting import layer_of

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    places: dict[str, str] = {}
    for number, layer in enumerate(dict.fromkeys(map(layer_of, shapes))):
        names = [name for name in shapes if layer_of(name) == layer]
        tensors = {n: (torch.randn(shapes[n]) * 0.02).bfloat16() for n in names}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def worker(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = {"save": save, "load": load}[arguments.what](arguments, arguments.way)
    if torch.distributed.get_rank() == 0:
        Path(arguments.output).write_text(json.dumps(found))


def run(what: str, way: str, **settings: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "-m", "benchmarks.sharding", what, "--way", way]
        command += ["--output", output.name]
        for name, value in settings.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(Path(output.name).read_text())
    return found


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("what", choices=list(WAYS))
    options.add_argument("--layers", type=int, default=16, help="of the Llama")
    options.add_argument("--folder", help="where the Llama is, or is written")
    options.add_argument("--frozen", type=int, default=1024, help=argparse.SUPPRESS)
    options.add_argument("--way", help=argparse.SUPPRESS)
    options.add_argument("--output", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.way is not None:
        worker(arguments)
        return
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(arguments.folder or made)
        if arguments.what == "load" and not (folder / "config.json").exists():
            write_llama(folder, arguments.layers)
        sizes = [1024, 11500] if arguments.what == "save" else [None]
        for size in sizes:
            for way in WAYS[arguments.what]:
                settings = {"frozen": size} if size else {"folder": folder}
                rows.append({"way": way, **run(arguments.what, way, **settings)})
                print(rows[-1], flush=True)
    print("\n| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
