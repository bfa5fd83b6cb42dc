"""A bench says how long it still takes where somebody sees it, and writes plain lines where nobody does."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deadpool_bench.progress import progress, say, step


def test_a_terminal_sees_how_much_is_done_and_what_is_left_below_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    with progress("kills", 4, Console(file=screen, force_terminal=True, width=100)):
        step()
        step(2)
        say("kill 3: 0.4 s")
    drawn = screen.getvalue()
    assert "kills" in drawn and "3/4" in drawn and "left" in drawn and "kill 3: 0.4 s" in drawn
    step()  # after the end: of nobody
    assert not capsys.readouterr().out


def test_a_file_gets_the_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with progress("kills", 4, Console(file=file)):
        step()
        say("kill 1: 0.4 s")
    assert not file.getvalue() and capsys.readouterr().err == "kill 1: 0.4 s\n"
