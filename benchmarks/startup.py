"""Time until the command line answers, over that of importing Lightning.

python -m benchmarks.startup [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.peers import machine

CLI = [sys.executable, "-m", "lightning_lora.cli"]
COMMANDS = {
    "import lightning.pytorch": [sys.executable, "-c", "import lightning.pytorch"],
    "lightning-lora --help": [*CLI, "--help"],
    "lightning-lora inspect --help": [*CLI, "inspect", "--help"],
    "lightning-lora fit --help": [*CLI, "fit", "--help"],
    "an error in a config": [*CLI, "fit", "--config", "quickstart", "--lora.rank", "3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            times[name].append(time.perf_counter() - start)
    print(f"{machine('cpu')}\n")
    print("| command | s | over importing Lightning |")
    print("| --- | --- | --- |")
    # The first round fills the file cache.
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, middle in medians.items():
        print(f"| {name} | {middle:.2f} | {middle / medians['import lightning.pytorch']:.2f} |")


if __name__ == "__main__":
    main()
