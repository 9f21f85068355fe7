"""Every claim about speed and memory that needs no pretrained weights, one after the other.

    python -m benchmarks.performance [--output FOLDER] [--quick]

Writes the tables as ``performance.md`` and the step times as ``step_time.png``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

DRAWN = ("ours", "PEFT", "PEFT, 16-bit factors", "full")
CLAIMS = {
    "Step time": ["step_time"],
    "Activations": ["activations"],
    "Checkpoints": ["checkpoint"],
    "Inference": ["inference"],
    "Injection": ["injection"],
    "Start-up": ["startup"],
}


def run(claim: list[str], quick: bool) -> str:
    """The output of one benchmark."""
    rounds = [] if claim[0] == "activations" or not quick else ["--rounds", "3"]
    command = [sys.executable, "-m", f"benchmarks.{claim[0]}", *claim[1:], *rounds]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def rows_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def draw(table: str, path: Path) -> None:
    """Step over floor by setting, a bar a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios: dict[str, dict[str, float]] = {}
    for setting, method, _, cell, _ in rows_of(table):
        if method in DRAWN:
            ratios.setdefault(method, {})[setting] = float(cell.split()[0])
    ratios = {method: ratios[method] for method in DRAWN if method in ratios}
    settings = list(ratios["ours"])
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    width = 0.8 / len(ratios)
    for number, (method, values) in enumerate(ratios.items()):
        places = [at + number * width for at, name in enumerate(settings) if name in values]
        axes.bar(places, [values[n] - 1 for n in settings if n in values], width, 1, label=method)
    labels = [name.replace(", ", ",\n") for name in settings]
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(settings))], labels, fontsize=8)
    axes.set_ylabel("step / frozen model")
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.legend(fontsize=8, ncols=len(ratios))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/performance"))
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that all run")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    parts = []
    for title, claim in CLAIMS.items():
        print(title, file=sys.stderr, flush=True)
        output = run(claim, options.quick)
        parts.append(f"## {title}\n\n    python -m benchmarks.{' '.join(claim)}\n\n{output}")
        if claim == ["step_time"]:
            draw(output, options.output / "step_time.png")
        (options.output / "performance.md").write_text("\n".join(parts))
    print((options.output / "performance.md").read_text())


if __name__ == "__main__":
    main()
