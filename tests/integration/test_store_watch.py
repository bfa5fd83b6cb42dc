"""The rendezvous store, torch's own in a process of its own, is asked whether it answers."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deadpool_megatron.launcher import rendezvous
from deadpool_megatron.launcher.rendezvous import StoreWatch, ask
from waiting import until

_STORE = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.fixture
def store() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _STORE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_LEAST_S", 0.0)


def test_a_store_that_answers_is_left_alone_and_one_that_hangs_is_ended(
    store: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = store
    assert len(ask(port, 60.0)) == 8, "this torch's store understands the question"
    asked: list[int] = []
    watch = StoreWatch(process, port, 1.5)
    try:
        for _ in range(15):  # longer than it would be waited for
            asked.append(len(ask(port, 60.0)))
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.4)
        assert not watch.why
        process.send_signal(signal.SIGSTOP)
        until(lambda: process.poll() is not None, "the end of the store")
        assert process.returncode == -signal.SIGKILL and "has not answered for" in watch.why
    finally:
        watch.end()
    assert process.stdout is not None and not process.stdout.read(), "it has nothing to complain of"


def test_a_store_that_has_not_answered_yet_is_waited_for(store: tuple[subprocess.Popen[str], int]) -> None:
    process, port = store
    process.send_signal(signal.SIGSTOP)
    watch = StoreWatch(process, port, 0.2)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3.0)
        assert not watch.why
    finally:
        watch.end()
