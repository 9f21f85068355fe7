"""The subcommands `lightning-lora inspect` and `diff`: what is in an adapter, and what differs.

The options are read without torch, so that `--help` and mistakes in them are answered at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lora.cli_configs import command_parser

INSPECT, DIFF = "inspect", "diff"
_MOST = 5


def run_inspect(arguments: Sequence[str]) -> None:
    """Carry out `inspect CKPT`.

    Args:
        arguments: What was typed after `inspect`.

    Raises:
        LightningLoRAError: The arguments are not understood, or there is no adapter.
    """
    parser = _parser(INSPECT, "What is in an adapter: base, settings, sizes, and how far it moved.")
    parser.add_argument("checkpoint", metavar="CKPT", help=_CKPT)
    options = parser.parse_args(arguments)
    from lightning_lora.adapters import read_adapter
    from lightning_lora.inspection import inspect_adapter

    found = inspect_adapter(read_adapter(options.checkpoint))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_inspection(found)


def run_diff(arguments: Sequence[str]) -> None:
    """Carry out `diff CKPT CKPT`.

    Args:
        arguments: What was typed after `diff`.

    Raises:
        LightningLoRAError: The arguments are not understood, or there is no adapter.
    """
    parser = _parser(DIFF, "What differs between two adapters: settings, layers, values.")
    parser.add_argument("first", metavar="CKPT", help=_CKPT)
    parser.add_argument("second", metavar="CKPT", help="the other one, likewise")
    options = parser.parse_args(arguments)
    from lightning_lora.adapters import read_adapter
    from lightning_lora.inspection import diff_adapters

    found = diff_adapters(read_adapter(options.first), read_adapter(options.second))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_difference(found)


_CKPT = "a checkpoint, a sharded folder, or a folder in PEFT format"


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = command_parser(name, description)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _print_inspection(found: Mapping[str, Any]) -> None:
    from lightning_lora.cli_tables import print_table
    from lightning_lora.names import listed, shortened

    print(f"{found['path']}: {found['form']}, {found['bytes']:,} bytes{_position(found)}")
    print(f"base      {_base(found['base'])}")
    settings = ", ".join(f"{k}={v}" for k, v in found["settings"].items() if v not in (None, False))
    print(f"settings  {settings}")
    sizes, layers = found["parameters"], found["layers"]
    print(f"trained   {sizes['factors']:,} in factors, {sizes['trained_whole']:,} in other tensors")
    names = shortened([row["layer"] for row in layers])
    if layers:
        print(f"layers    {len(layers)}, for instance {layers[0]['layer']}")
        print(f"most      {listed(names, _MOST)}")
    print_table(
        "Updates dW = s B A, those that moved most (rms of the elements) first",
        ("layer", "size", "r", "s", "|A|", "|B|", "|dW|", "rms", "largest", "effective rank"),
        [
            (
                name,
                f"{row['out_features']}x{row['in_features']}",
                str(row["r"]),
                *(f"{row[key]:.4g}" for key in ("scaling", "A_norm", "B_norm", "delta_norm")),
                f"{row['delta_rms']:.3g}",
                f"{row['spectral_norm']:.4g}",
                f"{row['effective_rank']:.1f}",
            )
            for name, row in zip(names, layers, strict=True)
        ],
    )
    print_table(
        "Other trained tensors",
        ("name", "shape", "norm"),
        [
            (row["name"], "x".join(map(str, row["shape"])), _number(row["norm"]))
            for row in found["other_tensors"]
        ],
    )
    for layer, reason in found["left_out"].items():
        print(f"Left out: {layer}: {reason}")
    _print_notes(found)


def _print_notes(found: Mapping[str, Any]) -> None:
    for note in found["notes"]:
        print(f"Note: {note}")


def _print_difference(found: Mapping[str, Any]) -> None:
    from lightning_lora.cli_tables import print_table
    from lightning_lora.names import listed, shortened

    for name, base, position in zip(
        (found["first"], found["second"]), found["bases"], found["positions"], strict=True
    ):
        print(f"{name}: on {_base(base)}{_position(position)}")
    if found["identical"]:
        print("All trained tensors and scalings are equal.")
    same = {True: "the same", False: "different", None: "not known to be the same"}
    print(f"The bases are {same[found['same_base']]}.")
    for key, (one, other) in found["settings"].items():
        print(f"  {key}: {one!r} -> {other!r}")
    for which in ("first", "second"):
        if found[f"only_{which}"]:
            print(f"Adapted by the {which} alone: {listed(found[f'only_{which}'])}")
    if found["identical"]:
        return
    rows = found["layers"]
    print_table(
        "Updates, those that differ most first",
        ("layer", "r", "|dW|", "|difference|", "relative", "cosine", "phi(1,1)"),
        [
            (
                name,
                " -> ".join(map(str, dict.fromkeys(row["r"]))),
                " -> ".join(f"{norm:.4g}" for norm in row["delta_norm"]),
                *(
                    _number(row[key])
                    for key in ("difference_norm", "relative_difference", "cosine", "phi_1_1")
                ),
            )
            for name, row in zip(shortened([r["layer"] for r in rows]), rows, strict=True)
        ],
    )
    print_table(
        "Other trained tensors",
        ("name", "norm", "|difference|"),
        [
            (
                row["name"],
                " -> ".join(map(_number, row["norm"])),
                _number(row["difference_norm"]),
            )
            for row in found["other_tensors"]
        ],
    )
    _print_notes(found)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _base(base: Mapping[str, Any]) -> str:
    if "fingerprint" not in base:
        return str(base["name_or_path"])
    size = f"{base['parameters']:,} parameters"
    return f"{base['name_or_path']} ({size}, fingerprint {base['fingerprint'][:12]})"


def _position(found: Mapping[str, Any]) -> str:
    known = [
        f"{key.replace('_', ' ')} {found[key]}" for key in ("epoch", "global_step") if key in found
    ]
    return f", {', '.join(known)}" if known else ""
