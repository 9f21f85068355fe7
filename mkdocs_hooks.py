"""What the API pages need: the package as installed, and docstrings as their parser takes them.

`recipes/` and `configs/` lie inside the installed package, and beside it in the repository.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import event_priority

_ROOT = Path(__file__).parent
_INSIDE = ("recipes", "configs")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
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


class Examples(griffe.Extension):
    """Has `Example:` read as `Examples:`, the one name of such a section that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section in an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub("Examples:", obj.docstring.value)
