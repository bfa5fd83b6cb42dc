"""A self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
img { width: 100%; height: auto; } pre { background: #f6f6f6; padding: 0.8em; overflow-x: auto; font-size: 12.5px; }
table { border-collapse: collapse; margin: 0.6em 0; } td, th { padding: 2px 12px 2px 0; text-align: left;
 border-bottom: 1px solid #eee; vertical-align: top; } td.n, th.n { text-align: right;
 font-variant-numeric: tabular-nums; }
p.note { color: #666; }
"""


class Page:
    """Collects parts; `text` is the whole page."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section begins."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str, note: bool = False) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def plain(self, text: str) -> None:
        """Text as a terminal shows it."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def raw(self, html: str) -> None:
        """HTML made here, such as `figures.as_image` gives."""
        self._parts.append(html)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> None:
        """A table; ``numbers`` are the columns set flush right."""

        def cells(tag: str, row: Sequence[str]) -> str:
            return "".join(
                f"<{tag}{' class=n' if i in numbers else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row)
            )

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        self._parts.append(f"<table><tr>{cells('th', header)}</tr>{body}</table>")

    @property
    def text(self) -> str:
        """The page."""
        return (
            f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(self._title)}</title>"
            f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )
