"""The commands in the documentation: lines of indented and fenced blocks, continuation lines joined."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["PAGES", "ROOT", "blocks", "commands"]

ROOT = Path(__file__).resolve().parents[1]
# docs/architecture.md draws processes, and calls no commands.
_DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "architecture.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *_DOCS]


def blocks(page: Path) -> list[str]:
    """The code blocks of a page, without their indentation."""
    out: list[list[str]] = []
    fenced = inside = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
            inside = False
        elif fenced or line.startswith("    "):
            if not inside:
                out.append([])
            inside = True
            out[-1].append(line if fenced else line[4:])
        elif line.strip():
            inside = False
    return ["\n".join(lines).rstrip() + "\n" for lines in out]


def commands(page: Path, *programs: str) -> list[str]:
    """The commands of a page that call one of these programs, comments removed."""
    out = []
    for block in blocks(page):
        joined = re.sub(r"\\\n\s*", "", block)
        for line in joined.splitlines():
            line = re.sub(r"\s+#.*$", "", line).strip()
            if line.split(" ", 1)[0] in programs:
                out.append(line)
    return out
