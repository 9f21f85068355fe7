"""Where the API pages find the package as it is installed: with recipes/ and configs/ inside it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_ROOT = Path(__file__).parent
_INSIDE = ("recipes", "configs")
# Gone when the build ends, however it ends.
_PACKAGES = tempfile.TemporaryDirectory(prefix="lightning_lora_docs_")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> None:
    """Have mkdocstrings look where a folder of links makes the package up."""
    package = Path(_PACKAGES.name) / "lightning_lora"
    if not package.exists():
        package.mkdir()
        for entry in (_ROOT / "lightning_lora").iterdir():
            if entry.name not in _INSIDE:
                (package / entry.name).symlink_to(entry)
        for name in _INSIDE:
            (package / name).symlink_to(_ROOT / name)
    python = config.plugins["mkdocstrings"].config["handlers"].setdefault("python", {})
    python["paths"] = [_PACKAGES.name]
