"""One transfer at a time goes into the own arena of a rank: the newest; what an older epoch brings never lands."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from deadpool_megatron.vault import Deadlines, StaleEpoch, Vault, VaultError, Version, fetch
from deadpool_megatron.vault.errors import Refused
from deadpool_megatron.vault.intake import Intakes

SECRET = bytes(32)


def test_the_newest_cuts_off_the_one_before_and_waits_for_it() -> None:
    intakes, shut = Intakes(), threading.Event()
    older = intakes.begin(3, 1, 60.0)
    older.add(shut.set)
    began = threading.Event()
    thread = threading.Thread(target=lambda: (intakes.begin(3, 2, 60.0), began.set()))
    thread.start()
    while not shut.is_set():
        assert not began.is_set(), "it waits for the one before to leave"
    with pytest.raises(StaleEpoch), older:
        older.check()
    thread.join()
    assert began.is_set()
    intakes.begin(4, 1, 0.0)  # of another rank


def test_an_older_epoch_begins_nothing_once_a_newer_one_has() -> None:
    intakes = Intakes()
    intakes.begin(3, 2, 0.0)
    with pytest.raises(StaleEpoch):
        intakes.begin(3, 1, 0.0)


def test_who_does_not_leave_in_time_keeps_the_next_one_out() -> None:
    intakes = Intakes()
    intakes.begin(3, 1, 0.0)
    with pytest.raises(Refused):
        intakes.begin(3, 2, 0.0)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A vault that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_new_epoch_ends_a_fetch_that_waits_for_bytes(silent: socket.socket) -> None:
    vault = Vault(f"i{os.getpid()}", 0)
    errors: list[VaultError] = []

    def bring() -> None:
        try:
            fetch(vault, SECRET, silent.getsockname(), 3, 0, Version(0, 5), Deadlines(connect=3600.0, idle=3600.0))
        except VaultError as err:
            errors.append(err)

    thread = threading.Thread(target=bring)
    thread.start()
    with silent.accept()[0]:
        vault.set_epoch(1)
        thread.join()
    assert errors
    vault.close()
