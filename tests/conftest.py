"""What all tests share: jobs, a full disk, and a limit for each test, at which every thread's stack is shown.

A test is limited to 180 seconds of `fair_clock`, or to its marker ``@pytest.mark.timeout(seconds)``; set-up and
tear-down count. At the limit it fails through an alarm. If the main thread does not come back to Python even then (it
is blocked in C), the whole test run is ended, since nothing else can free it.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

import evidence
from fair_clock import CLOCK
from jobs import PROVEN, Jobs

LIMIT_S = 180.0
# From the alarm to the end of the whole test run: time for the tear-down to end processes.
GRACE_S = 60.0
LOOK_S = 0.5

_real_stderr = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--evidence``; see `evidence`."""
    parser.addoption("--evidence", action="store_true", help="record which features survived a lost node")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Record what the test has shown, where that is asked for."""
    report: pytest.TestReport = yield
    if report.when == "setup":
        PROVEN.clear()
    elif report.when == "call" and item.config.getoption("evidence") and not report.skipped:
        evidence.note(report.nodeid, PROVEN if report.passed else [])
    return report


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


def _jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs in a directory of their own, ended with their test, or their module."""
    all_jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield all_jobs
    all_jobs.end()


jobs = pytest.fixture(_jobs, name="jobs")
module_jobs = pytest.fixture(_jobs, scope="module", name="module_jobs")


def limit_of(item: pytest.Item) -> float:
    """Seconds that this test may take."""
    marker = item.get_closest_marker("timeout")
    if marker is None:
        return LIMIT_S
    if len(marker.args) != 1 or marker.kwargs:
        raise pytest.UsageError(f"{item.nodeid}: write the marker as timeout(seconds)")
    return float(marker.args[0])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests may take longest come first: pytest-xdist hands them out in this order, and a long one that
    begins last would be waited for alone."""
    longest: dict[Path, float] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0.0), limit_of(item))
    items.sort(key=lambda item: -longest[item.path])


class Watchdog(threading.Thread):
    """Watches one test of the main thread."""

    def __init__(self, limit: float, stderr: int) -> None:
        super().__init__(name="test-limit", daemon=True)
        self._limit = limit
        self._stderr = stderr
        self._over = threading.Event()
        self._end = CLOCK.seconds() + limit
        self.start()

    def run(self) -> None:
        """Alarm the main thread at the limit, and end the test run if that does not help."""
        for limit in (self._end, self._end + GRACE_S):
            while CLOCK.seconds() < limit:
                # Fires only if this thread cannot run for so long: the main thread keeps the interpreter's lock in C.
                faulthandler.dump_traceback_later(self._limit + 10 * GRACE_S, exit=True, file=self._stderr)
                if self._over.wait(LOOK_S):
                    return
            if limit == self._end:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        faulthandler.dump_traceback(self._stderr, all_threads=True)
        os._exit(1)

    def end(self) -> None:
        """The test is over."""
        self._over.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()


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
    watchdog = Watchdog(limit, item.config.stash[_real_stderr])
    try:
        return (yield)
    finally:
        watchdog.end()
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with options as of mount(8); skips the test where that cannot be done."""
    where = tmp_path / "mounted"
    where.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(where)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system with {options} cannot be mounted here: {done.stderr.strip()}")
        return where

    yield mount
    if where.is_mount():
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Sets how large a file may become; beyond it a write fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
