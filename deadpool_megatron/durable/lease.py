"""Whose a durable directory is: one job's at a time, for it removes what is old there.

::

    owner-000001.json    "ended": its job is over
    owner-000002.json    the owner: job, host, process, and a beat that it changes every `BEAT_S` seconds

The owner is the file with the highest number. A job becomes it by making the next one, which the file system, or its
server, lets one of them do. Nobody else changes an owner's file. So an owner that was frozen while another job took
the directory over cannot take it back by renewing: it finds a higher number than its own.

A number may follow one that has ended, whose job is the same (its coordinator was started again, here or on another
host), whose processes are dead on this very machine and were all of the job, or that nobody has renewed during a whole
watch of `WATCH_S` seconds. The watch goes by the taker's own clock and asks whether the file changes, so no two
machines' clocks are compared; a pause of the taker itself does not count. There is no lock of the file system's: those
end with a process here, and with a server's patience elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from deadpool_megatron.vault import process_alive, process_start

from .errors import DurableError
from .store import Store

BEAT_S: Final = 5.0
WATCH_S: Final = 30.0
LOOK_S: Final = 1.0
_END_S: Final = 2.0  # for the last word of an owner; a directory that hangs is left as it is
_NAME: Final = re.compile(r"owner-(\d{6})\.json")
_BYTES: Final = 1024  # of a file: always the same, so that renewing it never leaves part of an older one


class Owner(msgspec.Struct, frozen=True):
    """What an owner says of itself.

    ``machine`` is the boot and the process namespace that ``processes`` (id, start) are of; when all of them are gone
    the job is. None of them: it may go on elsewhere. Times are for people.
    """

    job: str
    host: str
    machine: str
    processes: tuple[tuple[int, int], ...]
    since: str
    renewed: str
    beat: int = 0
    ended: bool = False

    @property
    def dead(self) -> bool:
        """Whether its job is known to be gone, which can only be seen from the same machine."""
        here = self.machine == _machine() and bool(self.processes)
        return here and not any(process_alive(pid, start) for pid, start in self.processes)

    def __str__(self) -> str:
        return f"job {self.job} (host {self.host}, since {self.since}, renewed {self.renewed})"


class Taken(DurableError):
    """The directory is another job's."""

    def __init__(self, root: str, owner: Owner) -> None:
        super().__init__(
            f"--deadpool-durable-dir {root} belongs to {owner}; end that job, or give this one another directory"
        )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def this_process(job: str, launcher: int = 0) -> Owner:
    """An owner that is this process's job; ``launcher``: the process with which all of the job ends, 0 for none."""
    processes = [(pid, process_start(pid) or 0) for pid in (os.getpid(), launcher)] if launcher else []
    return Owner(job, socket.gethostname(), _machine(), tuple(processes), _now(), _now())


def _name(number: int) -> str:
    return f"owner-{number:06d}.json"


def _encode(owner: Owner) -> bytes:
    return msgspec.json.encode(owner).ljust(_BYTES - 1) + b"\n"


def _decode(data: bytes) -> Owner | None:
    try:
        return msgspec.json.decode(data, type=Owner)
    except msgspec.MsgspecError:
        return None  # read while it was written


def _numbers(store: Store) -> list[int]:
    return [int(match[1]) for name in store.files() if (match := _NAME.fullmatch(name))]


def _newest(store: Store) -> tuple[int, bytes] | None:
    """The highest number and what its file says. Raises OSError."""
    for number in sorted(_numbers(store), reverse=True):
        # A shared file system's list of names may be some seconds old.
        with contextlib.suppress(FileNotFoundError), contextlib.closing(store.open(_name(number))) as file:
            return number, file.read(_BYTES)
    return None


def check_owner(store: Store, job: str) -> None:
    """Raises `Taken` when the directory is another job's, OSError. For who is about to write or remove something."""
    found = _newest(store)
    owner = _decode(found[1]) if found is not None else None
    if owner is not None and owner.job != job:
        raise Taken(store.root, owner)


class Lease:
    """This job's ownership of a directory. `keep` renews it from a thread of its own: a disk may hang.

    Args:
        number: of its file; 0 for a coordinator that goes on with its job: the first `renew` makes the next one.
    """

    def __init__(self, store: Store, number: int, owner: Owner) -> None:
        self.lost: Taken | None = None
        self._store = store
        self._number = number
        self._owner = owner
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def renew(self) -> bool:
        """Say once more that the job lives; False when the directory is this coordinator's no more. Raises OSError."""
        found = _newest(self._store)
        number, newest = (0, None) if found is None else (found[0], _decode(found[1]))
        if number > self._number and newest is None:
            return True  # somebody is writing it
        if number >= self._number and newest is not None and newest.job != self._owner.job:
            self.lost = Taken(self._store.root, newest)  # (the same number: it was quicker to make it)
            self._over.set()
            return False
        if number > self._number != 0:
            self._over.set()  # this coordinator's own successor
            return False
        self._owner = msgspec.structs.replace(self._owner, beat=self._owner.beat + 1, renewed=_now())
        if number == self._number != 0:
            self._store.overwrite(_name(number), _encode(self._owner))
        else:  # not made yet, or somebody has emptied the directory
            self._number = self._number or number + 1
            self._store.claim(_name(self._number), _encode(self._owner))
        return True

    def keep(self) -> None:
        """Renew it until `end`. What the disk refuses is tried again a beat later."""

        def run() -> None:
            while not self._over.wait(BEAT_S):
                with contextlib.suppress(OSError):
                    self.renew()

        self._thread = threading.Thread(target=run, name="durable-lease", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The job is over: the next one need not watch."""
        if self._over.is_set():
            return
        self._over.set()

        def run() -> None:
            if self._thread is not None:
                self._thread.join()
            self.resign()

        last = threading.Thread(target=run, name="durable-lease-end", daemon=True)
        last.start()
        last.join(_END_S)

    def resign(self) -> None:
        """Say that the job is over, if the directory is still its own. Blocks for the disk."""
        with contextlib.suppress(OSError):
            if self.renew():
                ended = msgspec.structs.replace(self._owner, ended=True)
                self._store.overwrite(_name(self._number), _encode(ended))


def take(
    store: Store,
    me: Owner,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Make the directory this job's. Blocks for the watch if it must.

    Args:
        say: told once, in a line, what is waited for.

    Raises:
        Taken: its owner lives; OSError.
    """
    taking = Taking(store, me, say, clock())
    while (lease := taking.look(clock())) is None:
        sleep(LOOK_S)
    return lease


class Taking:
    """A job makes a directory its own, one look after the other; nothing is written before that is allowed."""

    def __init__(self, store: Store, me: Owner, say: Callable[[str], None], now: float) -> None:
        self._store = store
        self._me = me
        self._say = say
        self._seen: tuple[int, bytes] | None = None
        self._watched, self._at = 0.0, now

    def look(self, now: float) -> Lease | None:
        """Call every `LOOK_S` seconds until it is this job's. Raises `Taken` when its owner lives, OSError."""
        store = self._store
        self._watched, self._at = self._watched + min(now - self._at, 2 * LOOK_S), now
        found = _newest(store)
        number, owner = (0, None) if found is None else (found[0], _decode(found[1]))
        free = found is None or (owner is not None and (owner.ended or owner.job == self._me.job or owner.dead))
        if free or (found == self._seen and self._watched >= WATCH_S):
            if store.claim(_name(number + 1), _encode(self._me)) and (_newest(store) or (0,))[0] == number + 1:
                for old in _numbers(store):
                    if old < number:  # the one before stays: who was about to follow it must not find a gap
                        store.remove_file(_name(old))
                return Lease(store, number + 1, self._me)
            self._seen = None
        elif found != self._seen:
            if found is not None and self._seen is not None and found[0] == self._seen[0] and owner is not None:
                raise Taken(store.root, owner)
            if self._seen is None and owner is not None:
                line = f"--deadpool-durable-dir {store.root} belongs to {owner}: does it live? Up to {WATCH_S:g} s tell"
                self._say(line)
            self._seen, self._watched = found, 0.0
        return None
