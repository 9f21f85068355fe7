"""What the command line calls by name: bundled configs, runs and the checkpoints in them.

A run is a folder `OUTPUT_DIR/version_N` with `config.yaml`, `checkpoints/`, the logs and what was
exported. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lightning_lora.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last"
_VERSION = re.compile(r"version_(\d+)")


def bundled_configs() -> list[str]:
    """Return the names of the configs in the package, such as `quickstart`."""
    root = _config_root()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")
    )


def find_bundled(name: str) -> Path | None:
    """Return the bundled config of that name, or None.

    Args:
        name: Its whole name, `classification/mrpc`, or its last part where no other config has the
            same; `.yaml` and a leading `configs/` are allowed.

    Raises:
        ConfigError: If several configs end in that name; all are named.
    """
    known = bundled_configs()
    bare = name.removesuffix(".yaml").removeprefix("configs/")
    found = [bare] if bare in known else [c for c in known if c.rsplit("/", 1)[-1] == bare]
    if len(found) > 1:
        raise ConfigError(
            f"Several bundled configs are called {bare}: {', '.join(found)}. Give the whole name."
        )
    return _config_root() / f"{found[0]}.yaml" if found else None


def find_config(name: str) -> str:
    """Return the path of a config: a file of the user's, or a bundled one by its name.

    Raises:
        ConfigError: If there is neither, or the name stands for several bundled ones; what comes
            near is named. If the file cannot be read as text.
    """
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name} is no text in UTF-8: there is something else at byte {error.start}. Save "
                "it in that encoding."
            ) from error
        except OSError as error:
            raise ConfigError(f"{name} cannot be read: {error.strerror or error}.") from error
        return name
    bundled = find_bundled(name)
    if bundled is not None:
        return str(bundled)
    if Path(name).is_dir():
        raise ConfigError(f"{name} is a folder. Give a YAML file in it, or a bundled config.")
    folder = Path(name).parent
    files = [str(p) for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    raise ConfigError(
        f"There is no config file {name}{near_config(name, files)}, and no bundled config of that "
        f"name. Bundled are: {', '.join(bundled_configs())}."
    )


def near_config(name: str, files: Sequence[str] = ()) -> str:
    """Return `" (did you mean quickstart?)"` for the nearest bundled config or file, or nothing."""
    known = bundled_configs()
    whole = {full.rsplit("/", 1)[-1]: full for full in known}
    matches = difflib.get_close_matches(name, [*known, *files, *whole], n=1)
    return f" (did you mean {whole.get(matches[0], matches[0])}?)" if matches else ""


def complete_arguments(arguments: Sequence[str], subcommands: Sequence[str]) -> list[str]:
    """Replace names of configs by their paths, and find the config of a checkpoint's run.

    Args:
        arguments: The arguments as typed; the first is a subcommand.
        subcommands: The subcommands there are.

    Raises:
        ConfigError: If the subcommand or the config is missing or unknown.
    """
    subcommand, *rest = arguments
    if subcommand not in subcommands:
        matches = difflib.get_close_matches(subcommand, subcommands, n=1)
        raise ConfigError(
            f"Unknown subcommand {subcommand!r}"
            + (f" (did you mean {matches[0]!r}?)" if matches else "")
            + f". Start with one of {', '.join(subcommands)}; see lightning-lora --help."
        )
    completed, has_config, checkpoint = [subcommand], False, None
    position = 0
    while position < len(rest):
        option, equals, value = rest[position].partition("=")
        if option in ("--config", "-c", "--ckpt_path") and not equals:
            position += 1
            if position == len(rest):
                raise ConfigError(f"{option} needs a value.")
            value = rest[position]
        if option in ("--config", "-c"):
            completed += ["--config", find_config(value)]
            has_config = True
        elif option == "--ckpt_path":
            completed += ["--ckpt_path", value]
            checkpoint = value
        else:
            completed.append(rest[position])
        position += 1
    if not has_config and checkpoint is not None:
        run = run_of_checkpoint(Path(checkpoint))
        if run is not None and (run / CONFIG_FILE).is_file():
            # First, so that what was typed overrides it.
            completed[1:1] = ["--config", str(run / CONFIG_FILE)]
            has_config = True
    asks_only = {"-h", "--help"} & set(rest) or any("help" in option for option in rest)
    if not has_config and not asks_only and not any(o.startswith("--model") for o in rest):
        raise ConfigError(
            f"Which config? Give --config with a file or one of {', '.join(bundled_configs())}: "
            f"lightning-lora {subcommand} --config quickstart"
        )
    return completed


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint lies in, or None for one that lies elsewhere."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def runs(output_dir: Path) -> list[Path]:
    """Return the runs in an output folder, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _VERSION.fullmatch(path.name)]
    return sorted(found, key=_version_of)


def next_run(output_dir: Path) -> Path:
    """Return the folder of the next run; it is not made yet."""
    earlier = runs(output_dir)
    return output_dir / f"version_{_version_of(earlier[-1]) + 1 if earlier else 0}"


def find_checkpoint(wanted: str, output_dir: Path) -> Path:
    """Return the checkpoint meant by a path, or by `best` or `last` of the newest run.

    Raises:
        CheckpointError: If there is none; those that are there are named.
    """
    if wanted in ("best", LAST):
        for run in reversed(runs(output_dir)):
            path = run / CHECKPOINTS / f"{wanted}.ckpt"
            if path.exists():
                return path
        raise CheckpointError(
            f"There is no {wanted} checkpoint below {output_dir}. Run fit first, or give "
            "--ckpt_path a file."
        )
    path = Path(wanted).expanduser()
    if not path.exists():
        known = [*path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        known += [found for run in runs(output_dir) for found in (run / CHECKPOINTS).glob("*.ckpt")]
        listed = ", ".join(dict.fromkeys(str(found) for found in known)) or "none"
        raise CheckpointError(f"There is no checkpoint {wanted}. Found nearby: {listed}.")
    return path


def _config_root() -> Path:
    return Path(str(resources.files("lightning_lora.configs")))


def _version_of(run: Path) -> int:
    match = _VERSION.fullmatch(run.name)
    assert match is not None
    return int(match.group(1))
