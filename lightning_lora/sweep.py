"""A grid of fits, as in Tables 5 and 6 of LoRA (arXiv:2106.09685): each fit a process of its own.

A sweep is a folder with a folder for each run. A run is finished once its `result.json` is there;
what was interrupted goes on from its last checkpoint. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_lora.cli_paths import CHECKPOINTS, LAST, runs
from lightning_lora.errors import ConfigError
from lightning_lora.files import replacing_file
from lightning_lora.run_lock import holding, name_holder

RESULT, LOG, _REQUEST = "result.json", "log.txt", "request.json"
_LOCK = ".lock"
# Seconds for a fit to end by itself: Lightning does so after the batch.
_PATIENCE = 20.0
LORA = "lora"
# Without factors (r=0) the callback trains what else is set to train: the task's head alone, with
# all biases (arXiv:2106.10199), or the whole model, which the recipes hold as `model`.
BASELINES: dict[str, dict[str, str]] = {
    "linear_probe": {"lora.r": "0", "lora.bias": "none"},
    "bitfit": {"lora.r": "0", "lora.bias": "all"},
    "full": {"lora.r": "0", "lora.bias": "none", "lora.modules_to_save": "[model]"},
}
_SECTION = "lora."
_SEED = "seed_everything"
# Weights are what a sweep is not about.
_ALWAYS = {
    "lora.export_dir": "null",
    "lora.merge_on_fit_end": "false",
    "trainer.enable_progress_bar": "false",
}


@dataclass(frozen=True)
class Run:
    """A fit of the grid.

    Attributes:
        method: `"lora"` or the name of a baseline.
        settings: Its values of the keys that vary, by key.
        seed: Its seed.
        arguments: Every key of its command line with its value.
    """

    method: str
    settings: Mapping[str, str]
    seed: int
    arguments: Mapping[str, str]

    @property
    def label(self) -> str:
        """What it is called, without its seed.

        >>> Run("lora", {"lora.r": "8", "lora.target_modules": "qv"}, 1, {}).label
        'lora r=8 target_modules=qv'
        """
        short = (f"{key.rpartition('.')[-1]}={value}" for key, value in self.settings.items())
        return " ".join([self.method, *short])

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = re.sub(r"[^\w.=-]+", "_", f"{self.label} seed={self.seed}").strip("_")
        if len(words) <= 100:
            return words
        return f"{words[:90]}_{hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
        method: As of the run.
        settings: As of the run.
        seed: As of the run.
        metric: The metric that the best checkpoint was chosen by.
        mode: `"max"` or `"min"`.
        score: Its best value.
        scores: All validation metrics at that step.
        trained: How many parameters were trained.
        seconds: How long the fit took; of one that was resumed, the last part of it.
        error: What went wrong, of a run that failed.
    """

    method: str
    settings: Mapping[str, str]
    seed: int
    metric: str = ""
    mode: str = "max"
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    trained: int = 0
    seconds: float = 0.0
    error: str | None = None


def values_of(text: str) -> list[str]:
    """The values of a comma list; values that hold commas themselves are parted by semicolons.

    >>> values_of("1,2,4"), values_of("qv,attention"), values_of("[query,value]")
    (['1', '2', '4'], ['qv', 'attention'], ['[query,value]'])
    >>> values_of("qv;[query,value]")
    ['qv', '[query,value]']
    """
    if ";" in text:
        parts = text.split(";")
    elif text.lstrip().startswith(("[", "{", '"', "'")):
        parts = [text]
    else:
        parts = text.split(",")
    found = [part.strip() for part in parts]
    if not all(found):
        raise ConfigError(f"{text!r} has an empty value. Leave the comma out.")
    return list(dict.fromkeys(found))


def read_keys(arguments: Sequence[str]) -> dict[str, str]:
    """Keys and values of a command line `--KEY VALUE` or `--KEY=VALUE`.

    Raises:
        ConfigError: Something else is among them, or a key comes twice.
    """
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise ConfigError(f"{option!r} is no option. Give --KEY VALUE, as for fit.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{option} needs a value.")
            value = rest.pop(0)
        key = option.removeprefix("--")
        if key in found:
            raise ConfigError(f"{option} is given twice. Give its values as a list: 1,2,4.")
        found[key] = value
    return found


def make_grid(
    config: str, keys: Mapping[str, str], seeds: Sequence[int], baselines: Sequence[str]
) -> list[Run]:
    """All runs of a sweep: every combination of the values, with every seed.

    Args:
        config: Path of the config.
        keys: Keys with lists of values. Those of the section `lora` are for LoRA alone; a key with
            the name of a baseline in front (`full.model.learning_rate`) is for that one.
        seeds: The seeds.
        baselines: Names of `BASELINES` to compare with.

    Raises:
        ConfigError: A baseline is unknown, or a key is for one that is not asked for.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ConfigError(f"There is no baseline {unknown[0]}. There are {', '.join(BASELINES)}.")
    own = {key: key.partition(".")[0] for key in keys if key.partition(".")[0] in BASELINES}
    unused = [key for key, name in own.items() if name not in baselines]
    if unused:
        raise ConfigError(f"--{unused[0]} is for a baseline that --baselines does not name.")
    common = {key: value for key, value in keys.items() if key not in own}
    found = []
    for method in (LORA, *baselines):
        grid = {k: v for k, v in common.items() if method == LORA or not k.startswith(_SECTION)}
        prefix = f"{method}."
        if method != LORA:
            grid |= {k.removeprefix(prefix): keys[k] for k, name in own.items() if name == method}
        values = {key: values_of(text) for key, text in grid.items()}
        fixed = BASELINES.get(method, {})
        for combination in itertools.product(*values.values()):
            chosen = dict(zip(values, combination, strict=True))
            varied = {key: value for key, value in chosen.items() if len(values[key]) > 1}
            for seed in seeds:
                arguments = {"config": config, **chosen, **fixed, _SEED: str(seed), **_ALWAYS}
                found.append(Run(method, varied, seed, arguments))
    return found


def run_grid(
    grid: Sequence[Run], folder: Path, progress: Callable[[int, int, str], None]
) -> list[Result]:
    """Carry out the runs that are not finished, one after the other.

    Args:
        grid: The runs.
        folder: The folder of the sweep.
        progress: Called with how many runs are done, of how many, and what the next one is.

    Returns:
        The results, in the order of the grid; a run that failed has an error, and is carried out
        again by the next sweep.

    Raises:
        ConfigError: Another sweep is at work in the folder.
    """
    results = []
    try:
        with FileLock(folder / _LOCK, timeout=0):
            for number, run in enumerate(grid):
                progress(number, len(grid), f"{run.label} seed={run.seed}")
                results.append(finished(run, folder) or _carry_out(run, folder / run.name))
    except Timeout:
        raise ConfigError(
            f"Another sweep is at work in {folder}. Wait for it, or give another --output."
        ) from None
    return results


def finished(run: Run, folder: Path) -> Result | None:
    """The result of a run that was carried out with these very settings, or `None`."""
    file = folder / run.name / RESULT
    if not file.is_file() or _request(run) != _read(folder / run.name / _REQUEST):
        return None
    content = _read(file)
    return None if content is None else Result(**content)


def _carry_out(run: Run, folder: Path) -> Result:
    request = _request(run)
    folder.mkdir(parents=True, exist_ok=True)
    with holding(folder) as held:
        if _read(folder / _REQUEST) != request:
            _remove_runs(folder)
            (folder / RESULT).unlink(missing_ok=True)
        _write(folder / _REQUEST, request)
        start = time.monotonic()
        last = _last_checkpoint(folder)
        code = _fit(run, folder, last, held)
        if code and last is not None:
            # What cannot be resumed (a checkpoint cut short, say) begins anew.
            _remove_runs(folder)
            code = _fit(run, folder, None, held)
    seconds = time.monotonic() - start
    if code:
        return Result(run.method, run.settings, run.seed, error=_error(folder, code))
    from lightning_lora.sweep_results import read_result

    result = read_result(run, runs(folder)[-1], seconds)
    _write(folder / RESULT, asdict(result))
    # Optimizer states and weights of runs that are done take the room of the next ones.
    for checkpoint in (runs(folder)[-1] / CHECKPOINTS).glob(f"{LAST}*.ckpt"):
        checkpoint.unlink()
    return result


def _remove_runs(folder: Path) -> None:
    for earlier in runs(folder):
        shutil.rmtree(earlier)


def _fit(run: Run, folder: Path, checkpoint: Path | None, held: tuple[int, ...]) -> int:
    options = [part for key, value in run.arguments.items() for part in (f"--{key}", value)]
    options += ["--output_dir", str(folder)]
    if checkpoint is not None:
        options += ["--ckpt_path", str(checkpoint)]
    with (folder / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_lora.cli", "fit", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=held,
        )
        name_holder(held, process.pid)
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a fit whose sweep is ended."""
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_checkpoint(folder: Path) -> Path | None:
    found = [run / CHECKPOINTS / f"{LAST}.ckpt" for run in runs(folder)]
    return next((path for path in reversed(found) if path.is_file()), None)


def _error(folder: Path, code: int) -> str:
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    reason = said[-1].removeprefix("error: ") if said else "nothing was said"
    return f"exit code {code}: {reason}"


def _request(run: Run) -> dict[str, Any]:
    """What makes a run the one it is: its arguments, and what its config says."""
    digest = hashlib.blake2b(Path(run.arguments["config"]).read_bytes(), digest_size=16)
    return {"arguments": dict(run.arguments), "config": digest.hexdigest()}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(file: Path, content: Any) -> None:
    with replacing_file(file) as fresh:
        fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
