"""What all tests share: jobs, and a limit on the time of each test, at which every thread's stack is shown.

A test is limited to 180 seconds, or to its marker ``@pytest.mark.timeout(seconds)``; set-up and tear-down count. At the
limit it fails through an alarm. If the main thread does not come back to Python even then (it is blocked in C), the
whole test run is ended, since nothing else can free it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from jobs import Jobs

LIMIT_S = 180.0
# From the alarm to the end of the whole test run: time for the tear-down to end processes.
GRACE_S = 60.0

_real_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real stderr: while a test runs, descriptor 2 is pytest's. Take Ctrl-C as from a terminal."""
    config.stash[_real_stderr] = os.dup(2)
    # A shell that starts pytest in the background makes it ignore Ctrl-C, and the commands under test after it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give it back."""
    if _real_stderr in config.stash:
        os.close(config.stash[_real_stderr])
        del config.stash[_real_stderr]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Jobs of one test, ended with it."""
    all_jobs = Jobs(tmp_path)
    yield all_jobs
    all_jobs.end()


def limit_of(item: pytest.Item) -> float:
    """Seconds that this test may take."""
    marker = item.get_closest_marker("timeout")
    if marker is None:
        return LIMIT_S
    if len(marker.args) != 1 or marker.kwargs:
        raise pytest.UsageError(f"{item.nodeid}: write the marker as timeout(seconds)")
    return float(marker.args[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run one test under its limit."""
    if item.config.getoption("usepdb"):
        return (yield)
    limit = limit_of(item)

    def too_long(number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(2, all_threads=True)  # captured: shown with the failure
        pytest.fail(f"took more than its {limit:g} seconds; the stacks of all threads are in its stderr", pytrace=True)

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(limit + GRACE_S, exit=True, file=item.config.stash[_real_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
