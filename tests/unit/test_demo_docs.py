"""The settings in docs/operations.md are those of config.py. Run as a script, this file writes them there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.config import DeadpoolConfig, unit, variable

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
BEGIN = "<!-- settings: written by tests/unit/test_demo_docs.py out of deadpool_megatron/config.py -->\n"
END = "<!-- end of settings -->\n"


def settings_table() -> str:
    """The settings as a Markdown table."""
    lines = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for f in fields(DeadpoolConfig):
        flag = "--deadpool" if f.name == "deadpool" else "--deadpool-" + f.name.replace("_", "-")
        choices = f.metadata["choices"]
        meaning = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        default = {"": "off", "False": "off", "True": "on"}.get(str(f.default), f"{f.default} {unit(f)}".strip())
        lines.append(f"| `{flag}` | `{variable(f)}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def test_documented_settings_are_those_there_are() -> None:
    text = OPERATIONS.read_text()
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert written == settings_table(), f"out of date: run python {Path(__file__).relative_to(OPERATIONS.parents[1])}"


def test_every_exit_code_is_documented() -> None:
    section = OPERATIONS.read_text().split("## Exit codes")[1].split("\n## ")[0]
    missing = [code.name for code in Exit if f"</a>{int(code)} |" not in section and f" {int(code)}, " not in section]
    assert not missing


if __name__ == "__main__":
    before, rest = OPERATIONS.read_text().split(BEGIN)
    OPERATIONS.write_text(before + BEGIN + settings_table() + END + rest.split(END)[1])
