"""The promise: shards leave a node within the user's limits, and training's traffic goes first, but not for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deadpool_megatron.vault import SendPace, Vault, VaultFull

MIB = 1 << 20


class Time:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def vault() -> Iterator[Vault]:
    made = Vault(f"p{os.getpid()}", 0, limit_bytes=8 * MIB)
    yield made
    made.close()


def test_a_limit_spaces_what_is_sent(vault: Vault) -> None:
    vault.allocate_own(3, MIB, 100)
    arena = vault.arena(3, "own")
    assert arena is not None
    time = Time()
    pace = SendPace(10 * MIB, time.clock, time.sleep)
    for _ in range(21):
        with pace.sending(arena, MIB):
            pass
    assert time.now == pytest.approx(2.0)  # 20 MiB before the 21st began
    assert pace.sent(3)[0] == 21 * MIB and pace.sent(4) == (0, 0.0)


def test_sending_waits_for_quiet_links_a_while(vault: Vault) -> None:
    vault.allocate_own(0, MIB, 100)
    arena = vault.arena(0, "own")
    assert arena is not None
    time = Time()
    pace = SendPace(0.0, time.clock, time.sleep)
    with pace.sending(arena, MIB):
        assert time.now == 0.0
    arena.links_busy = True

    def quiet_at_last(seconds: float) -> None:
        time.now += seconds
        arena.links_busy = time.now < 0.1

    with SendPace(0.0, time.clock, quiet_at_last).sending(arena, MIB):
        assert 0.1 <= time.now < 0.11
    arena.links_busy = True  # and stays: the worker has died
    before = time.now
    with pace.sending(arena, MIB):
        assert 0.25 <= time.now - before < 0.26


def test_memory_beyond_the_limit_is_refused_by_its_flag(vault: Vault) -> None:
    vault.allocate_own(0, 2 * MIB, 100)
    with pytest.raises(VaultFull, match="--deadpool-host-memory"):
        vault.allocate_peer(1, 2 * MIB, 100)
    vault.drop(0)
    vault.allocate_peer(1, 2 * MIB, 100)
