"""What an iteration leaves behind is told and printed only while its epoch lasts: later it may be made of garbage."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.recovery import Session


class Over(Exception):
    """The epoch has ended."""


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], None], socket.socket]:
    """Of the rank that prints, what ends its epoch, and the agent's end of its line."""
    pytest.importorskip("megatron.core")
    from deadpool_megatron.megatron.lm import MegatronLM
    from deadpool_megatron.megatron.once import Once

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup(ours.fileno())  # stays open for ever: a session that loses its agent ends the process
    ended: list[bool] = []

    def check() -> None:
        if ended:
            raise Over

    monkeypatch.setattr(MegatronLM, "args", {"log_interval": 1})
    made = Once(MegatronLM(), Session(theirs.detach(), lambda epoch: None, lambda epoch: None), check, 1, 2, 0)
    return made, lambda: ended.append(True), ours


def test_a_line_is_printed_and_told_while_the_epoch_lasts_and_never_after_it(
    once: tuple[Any, Callable[[], None], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import training

    each, end, agent = once
    printed: list[str] = []
    monkeypatch.setattr(training, "print_rank_last", printed.append)
    with each.quiet_if(False):
        training.print_rank_last("lm loss: 5.5")
    each.tell("log", 1)
    assert r.decode_from_worker(agent.recv(1 << 17)) == r.SideEffect(0, 1, 0, 1, "log")
    with pytest.raises(Over), each.quiet_if(False):
        end()  # while upstream reads the numbers
        training.print_rank_last("lm loss: nan")
    with pytest.raises(Over):
        each.tell("log", 2)
    agent.setblocking(False)
    with pytest.raises(BlockingIOError):
        agent.recv(1)
    assert printed == ["lm loss: 5.5"]
    training.print_rank_last("upstream's own again")
    assert len(printed) == 2
