"""Time of a training step, ours and the peers', over the same model with everything frozen.

    python -m benchmarks.step_time [--settings NAME ...] [--rounds 15] [--tokens 512] [--device cpu]

A step is forward, backward and (fused) AdamW. The floor is the frozen model with gradients that
flow to its input, which is what no method can go below. Methods take turns, one step each in every
round; a ratio is the median over the rounds of the ratio within a round, with the quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import BERT_QV, METHODS, PROJECTIONS, available, bert, llama, machine
from lightning_lora.freezing import cast_frozen


@dataclass(frozen=True)
class Setting:
    """What one table row runs.

    Attributes:
        dtype: Of the base.
        autocast: Whether steps run under bf16 autocast.
        r: Rank.
        dropout: Of the adapter's input.
        model: ``"llama"`` (all linear layers) or ``"bert"`` (query and value).
        frozen_dtype: What our frozen matrices are cast to once.
    """

    dtype: torch.dtype = torch.float32
    autocast: bool = False
    r: int = 8
    dropout: float = 0.0
    model: str = "llama"
    frozen_dtype: torch.dtype | None = None


SETTINGS = {
    "fp32": Setting(),
    "bf16": Setting(torch.bfloat16),
    "autocast": Setting(autocast=True),
    "autocast, frozen_dtype": Setting(autocast=True, frozen_dtype=torch.bfloat16),
    "fp32, dropout": Setting(dropout=0.05),
    "bf16, dropout": Setting(torch.bfloat16, dropout=0.05),
    "fp32, r=64": Setting(r=64),
    "MiniLM q,v": Setting(model="bert"),
    "MiniLM q,v, dropout": Setting(model="bert", dropout=0.05),
}
Step = Callable[[], None]
# Rounds in which other processes took more than this share of a core are left out.
FOREIGN = 0.1


def build(method: str, setting: Setting, options: Any) -> Step:
    """A function that trains one step."""
    layers = options.layers
    model = bert(layers) if setting.model == "bert" else llama(layers, options.width)
    model = model.to(options.device, setting.dtype)
    targets = BERT_QV if setting.model == "bert" else PROJECTIONS
    METHODS[method](model, targets=targets, r=setting.r, dropout=setting.dropout)
    if method == "ours" and setting.frozen_dtype:
        cast_frozen(model, setting.frozen_dtype)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1024, (1, options.tokens), generator=generator).to(options.device)
    embedded = model.get_input_embeddings()(ids).detach()
    forward: Any = torch.compile(model) if options.compile else model

    def step() -> None:
        inputs = embedded.clone().requires_grad_(method == "frozen")
        with torch.autocast(options.device, torch.bfloat16, enabled=setting.autocast):
            loss = forward(inputs_embeds=inputs, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every round for each method, in an order that changes from round to round."""
    order, shuffler = list(steps), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    tried = 0
    while len(times[order[0]]) < rounds and tried < 10 * rounds:
        shuffler.shuffle(order)
        taken, foreign, began = {}, others(), time.perf_counter()
        for name in order:
            _wait(device)
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            taken[name] = time.perf_counter() - start
        busy = (others() - foreign) / (time.perf_counter() - began)
        tried += 1
        if tried > 2 and busy < FOREIGN:
            for name, seconds in taken.items():
                times[name].append(seconds)
    if tried > rounds + 2:
        print(f"{tried - 2 - len(times[order[0]])} disturbed rounds left out", file=sys.stderr)
    return times


def others() -> float:
    """CPU seconds that other processes have taken since the machine has started."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, path.read_text().split("\n")[0].split()[1:]
    )
    own = os.times()
    ticks = user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios within the rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, lower, upper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=available())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.layers} layers, {options.tokens} tokens; {machine(options.device)}\n")
    print("| setting | method | step ms | step / floor (quartiles) | ours / it |")
    print("| --- | --- | --- | --- | --- |")
    for name in options.settings:
        setting = SETTINGS[name]
        methods = [m for m in options.methods if "16-bit" not in m or setting.dtype.itemsize == 2]
        # All methods compile the same forward, and only so many times.
        torch.compiler.reset()
        with contextlib.redirect_stdout(sys.stderr):
            steps = {method: build(method, setting, options) for method in methods}
            times = measure(steps, options.rounds, options.device)
        for method in methods:
            middle, lower, upper = ratio(times[method], times["frozen"])
            mine = ratio(times["ours"], times[method])[0]
            print(
                f"| {name} | {method} | {1000 * statistics.median(times[method]):.1f} | "
                f"{middle:.3f} ({lower:.3f}-{upper:.3f}) | {mine:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
