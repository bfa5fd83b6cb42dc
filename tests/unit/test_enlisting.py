"""What is waited for is said soon: an endpoint may be misspelt, and nobody watches a silent terminal for minutes."""

from __future__ import annotations

import socket

import pytest

from deadpool_megatron.launcher import enlisting
from deadpool_megatron.launcher.plan import LaunchError


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_name_that_does_not_resolve_is_told_of_within_seconds_and_tried_to_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, told_at = Clock(), []

    def lookup(*args: object) -> object:
        told_at.append((clock.now, len(capsys.readouterr().err.splitlines())))
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(enlisting, "time", clock)
    monkeypatch.setattr(enlisting.socket, "getaddrinfo", lookup)
    with pytest.raises(LaunchError, match="--rdzv-endpoint node-o: Name or service not known"):
        enlisting.resolve("node-o", 300.0, lambda: False)
    lines = [at for at, count in told_at if count]
    assert 10.0 <= lines[0] <= 11.0 and len(lines) == 5, lines
    assert clock.now >= 300.0
