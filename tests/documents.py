"""The code blocks of README.md, CONTRIBUTING.md and docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.commands import ROOT

_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\S*).*")
_MARK = re.compile(r"<!-- (?P<key>base|file|given|printed): (?P<value>\S+) -->")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_CONTINUED = re.compile(r"\\\n\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The page's path from the top of the repository.
        line: Number of its first line.
        language: What stands after the fence.
        text: The lines between the fences, without their common indentation.
        mark: What a comment before it says: `given`, what it takes for granted; `file`, the file
            that it is the text of; `base`, the config that it changes; `printed`, that the block
            above prints it. Else empty.
    """

    page: str
    line: int
    language: str
    text: str
    mark: dict[str, str]

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page}, line {self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a block for the shell, each on one line and without comments."""
        found = []
        for line in _CONTINUED.sub(" ", self.text).splitlines():
            found += [" ".join(_without_comment(part).split()) for part in line.split(" && ")]
        return [command for command in found if command]


def pages() -> list[str]:
    """The pages, by their paths from the top of the repository."""
    docs = (path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *sorted(docs)]


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in their order; all, or those in some languages."""
    found: list[Block] = []
    lines = read(page).splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.fullmatch(lines[number])
        if fence is None:
            number += 1
            continue
        end = number + 1
        while lines[end].strip() != "```":
            end += 1
        inner = [line.removeprefix(fence["indent"]) for line in lines[number + 1 : end]]
        found.append(
            Block(
                page,
                number + 2,
                fence["language"],
                "\n".join(inner) + "\n",
                dict(_MARK.findall(lines[number - 1])) if number else {},
            )
        )
        number = end + 1
    return [block for block in found if not languages or block.language in languages]


def arguments(command: str) -> list[str] | None:
    """What a command passes on to `lightning-lora`, also where a launcher starts it; or None."""
    words = shlex.split(command.replace("$(which lightning-lora)", "lightning-lora"))
    return words[words.index("lightning-lora") + 1 :] if "lightning-lora" in words else None


def links(page: str) -> list[str]:
    """The targets of a page's links that lie in the repository."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", read(page), flags=re.DOTALL)
    targets = [match["target"] for match in _LINK.finditer(prose)]
    return [target for target in targets if not re.match(r"\w+:", target)]


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, row by row, without its head."""
    section = read(page).split(f"# {heading}\n", 1)[1]
    rows = [line for line in section.split("\n#", 1)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]


def names(cell: str) -> list[str]:
    """The names in code font in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def _without_comment(text: str) -> str:
    return re.sub(r"(^|\s)#.*", "", text)


def resolve(page: str, target: str) -> Path:
    """The file that a link of a page points to."""
    return (ROOT / page).parent / target.split("#")[0]
