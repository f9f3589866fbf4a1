"""The fenced blocks of the pages: which commands and snippets they show, and which of them cannot run in a test."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))),
        *sorted((ROOT / "src").rglob("README.md")),
    )
}
MARK = r"(?:<!-- (?P<word>runs|file): (?P<mark>.+?) -->\n+)?"
BLOCK = re.compile(rf"^{MARK}(?P<fence>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S)
SHOWN = re.compile(r"\$ ((?:.*\\\n)*.*)\n?((?:(?!\$ ).*\n?)*)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page, line: Where it begins.
        language: Of its fence: `bash`, `console`, `python`, or what is not run.
        text: What is between the fences.
        skipped: Why it is not run, from `<!-- runs: no, REASON -->` in front of it.
        file: Where a reader would save it, from `<!-- file: NAME -->`; commands of the page then find it there.
    """

    page: str
    line: int
    language: str
    text: str
    skipped: str | None = None
    file: str | None = None

    @property
    def count(self) -> int:
        """Commands of a block of the shell, or one snippet."""
        if self.language == "python":
            return 1
        return len({"bash": commands, "console": sessions}.get(self.language, lambda text: [])(self.text))


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page in their order.

    Raises:
        ValueError: If a mark is neither `runs: no, REASON` nor `file: NAME`.
    """
    text = PAGES[page]
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("fence")) + 1
        skipped = file = None
        if found["word"] == "runs":
            skipped = re.fullmatch(r"no, (.+)", found["mark"])
            if skipped is None:
                raise ValueError(f"{page}:{line}: a block is marked as <!-- runs: no, REASON -->")
            skipped = skipped[1]
        elif found["word"] == "file":
            file = found["mark"]
        yield Block(page, line, found["language"], found["text"], skipped, file)


def commands(text: str) -> list[str]:
    """The commands of a block of the shell; a quoted text and lines that end in a backslash go on in the next line."""
    found, open_one = [], ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        open_one += line
        try:
            words = shlex.split(open_one, comments=True)
        except ValueError:  # a quotation that is not closed yet
            open_one += "\n"
            continue
        found += [open_one] if words else []
        open_one = ""
    return found


def sessions(text: str) -> list[tuple[str, str]]:
    """Commands behind a dollar sign, each with what is shown as its output."""
    return [(found[1], found[2]) for found in SHOWN.finditer(text)]
