"""The run directory: ``status.json`` (rewritten atomically), ``events.jsonl`` (appended), ``logs/``, ``job.json``.

Each attempt begins with an empty one: what one before it has left goes to ``attempts/N``, a run directory too.

Only the coordinator writes status and events. ``job.json`` holds what `deadpool inject` and `deadpool status` need to
reach the job, the secret included, and is readable by its owner alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from deadpool_megatron.observe.narrative import paragraph
from deadpool_megatron.observe.recoveries import Story
from deadpool_megatron.observe.strict_json import strict_json
from deadpool_megatron.output import Aside

STATUS: Final = "status.json"
EVENTS: Final = "events.jsonl"
JOB: Final = "job.json"
LOGS: Final = "logs"
RECOVERIES: Final = "recoveries.log"
ERROR: Final = "error.json"
ATTEMPTS: Final = "attempts"
_THINNED: Final = frozenset({"iteration", "committed"})
_WHOLE: Final = 100_000  # of these that are written one by one; then every second one, as many fourths, and so on
_AROUND: Final = 4  # of them that are written after any other event, so that a recovery has what followed it
_COLUMNS: Final = 80
_AT_ONCE: Final = 1 << 16
_MOST_WAITING: Final = 16 << 20
_NODE_LOG: Final = 32 << 20
_PATIENCE_S: Final = 1.0
_SAY_AFTER_S: Final = 10.0
_LAST_S: Final = 10.0
_MOST_LINES: Final = 10_000  # of a node's log, that wait


class Thinned:
    """Which events of a long run are written: all but some of `_THINNED`."""

    def __init__(self) -> None:
        self._count = 0  # of `_THINNED`, written since `_every` was doubled
        self._every = 1
        self._around = 0
        self._held: dict[str, bytes] = {}  # of each kind the newest one, while it is left out

    def lines(self, event: str, iteration: int, line: bytes) -> list[bytes]:
        """The lines that are to be in the file with this one; none, where it is left out of it for now."""
        if event not in _THINNED:
            lines, self._held, self._around = [*self._held.values(), line], {}, _AROUND
            return lines
        self._held.pop(event, None)
        if self._around == 0 and iteration % self._every:
            self._held[event] = line
            return []
        self._around = max(0, self._around - 1)
        self._count += 1
        if self._count >= _WHOLE:
            self._count, self._every = 0, 2 * self._every
        return [line]


class RunDirectory:
    """Writer of a run directory. Raises OSError when it cannot be made.

    Afterwards nothing here raises: what cannot be written (a full disk, a directory that became read-only) is said once
    on stderr. Events wait until there is room, up to `_MOST_WAITING` bytes; then they are dropped and counted (event
    ``unwritten``). Status is written anew when it is due.

    Args:
        fresh: put an older run's files into ``attempts/N``; else go on with what is there.
        aside: write on a thread of its own. While the file system hangs nobody waits for that, and what is noted waits
            as for a full disk.
    """

    def __init__(self, path: str | Path, fresh: bool = True, aside: bool = False) -> None:
        self.path = Path(path).absolute()
        (self.path / LOGS).mkdir(parents=True, exist_ok=True)
        if fresh:
            self._put_away()
        self._own = os.urandom(4).hex()  # a coordinator of another container may have this one's process id
        self._events: int | None = None
        if fresh:
            self._open_events()  # else it may have become read-only: what is noted waits
        # Of events, not written yet; may begin in the middle of a line, or end one that a dead writer has left.
        self._waiting = bytearray(b"\n" if _is_cut(self.path / EVENTS) else b"")
        self._thinned = Thinned()
        self._dropped = 0
        self._newest: dict[str, bytes] = {}  # by file that is replaced as a whole, what is to be in it
        self._told: list[str] = []  # of recoveries, not written yet
        self._lock = threading.Lock()  # of all that waits; never held while anything is written
        self._aside = Aside("run directory", 1, _PATIENCE_S) if aside else None
        self._hangs = False
        self._failing: set[str] = set()  # files that could not be written the last time
        self._story = Story()
        self._job: dict[str, Any] = {}

    def _put_away(self) -> None:
        """The files of an attempt before this one, but for the secret of its job."""
        (self.path / JOB).unlink(missing_ok=True)
        old = [path for name in (STATUS, EVENTS, RECOVERIES, ERROR) if (path := self.path / name).exists()]
        if not old and not any((self.path / LOGS).iterdir()):
            return
        numbers = [int(path.name) for path in (self.path / ATTEMPTS).glob("*") if path.name.isdecimal()]
        to = self.path / ATTEMPTS / str(max(numbers, default=0) + 1)
        to.mkdir(parents=True)
        for path in [*old, self.path / LOGS]:
            path.rename(to / path.name)
        (self.path / LOGS).mkdir()

    def _open_events(self) -> int:
        if self._events is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._events = os.open(self.path / EVENTS, flags, 0o644)
        return self._events

    def event(self, event: str, **fields: Any) -> None:
        """Append one event with the wall-clock time ``t`` in unix seconds, to be read at once."""
        self.note(event, **fields)
        self.flush()

    def note(self, event: str, **fields: Any) -> None:
        """The same, to be read from the next `flush` on: thousands of nodes tell the same step within a second.

        Of a long run's iterations and commits not all are written (`_WHOLE`), so that the file stays small; the last
        one before any other event is, and those after it. After each recovery a paragraph on it goes to
        ``recoveries.log`` and to stderr.
        """
        record = {"t": time.time(), "event": event, **fields}
        line = strict_json(record).encode() + b"\n"
        with self._lock:
            for each in self._thinned.lines(event, fields.get("iteration", 0), line):
                if len(self._waiting) < _MOST_WAITING:
                    self._waiting += each
                else:
                    self._dropped += 1
        done = self._story.take(record)
        if done is not None:
            text = paragraph(done, len(self._story.recoveries), self._story)
            wrapped = textwrap.fill(text, _COLUMNS, break_long_words=False, break_on_hyphens=False)
            with self._lock:
                self._told.append(wrapped + "\n\n")
            done.steps.clear()  # of thousands of nodes, in thousands of recoveries; the events have them
            print(wrapped, file=sys.stderr, flush=True)
        if len(self._waiting) > _AT_ONCE and EVENTS not in self._failing:
            self.flush()

    def flush(self) -> None:
        """Write out all so far."""
        if self._aside is None:
            self._write_out()
            return
        if self._waiting or self._dropped or self._newest or self._told:
            self._aside.do(self._write_out)  # (where one waits to be done already, it takes all)
        if not self._hangs and self._aside.held_up_s > _SAY_AFTER_S:
            self._hangs = True
            print(f"deadpool: {self.path} does not answer; training goes on", file=sys.stderr)

    def status(self, status: dict[str, Any]) -> None:
        """Replace ``status.json`` in one step: a reader sees the old or the new one, never a part.

        Before the events that are noted from now on: who reads of one of them finds in it what it has led to.
        """
        self._renew(STATUS, status)

    def error(self, code: int, message: str) -> None:
        """Write ``error.json``, as torchrun writes the error of the first rank that failed."""
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        told = {"message": message.partition("\n")[0], "extraInfo": extra, "errorCode": code}
        self._renew(ERROR, {"message": told})

    def job(self, job: dict[str, Any], again: bool = False) -> None:
        """Write ``job.json``, for the owner's eyes only. Raises OSError: without it nobody can reach the job.

        ``again``: that is no reason to end a job that trains; it is tried again with each `status`.
        """
        self._job = job
        with self._trying(JOB) if again else contextlib.nullcontext():
            self._replace(JOB, _json(job), 0o600)

    def _renew(self, name: str, content: dict[str, Any]) -> None:
        text = _json(content)
        with self._lock:
            self._newest[name] = text
        self.flush()

    def _write_out(self) -> None:
        with self._lock:
            newest, self._newest = self._newest, {}
            told, self._told = self._told, []
            count = len(self._waiting)
        for name, text in newest.items():
            with self._trying(name):
                self._replace(name, text, 0o644)
        if STATUS in newest and JOB in self._failing:
            self.job(self._job, again=True)
        for recovery in told:
            with self._trying(RECOVERIES):
                self._append(recovery)
        with self._trying(EVENTS):
            self._write_events(count)

    def _write_events(self, count: int) -> None:
        """The first ``count`` bytes of what waits, and how many events had no room to."""
        while count:
            with self._lock:
                some = self._waiting[: min(count, _AT_ONCE)]
            written = self._write(some)
            count -= written
            with self._lock:
                del self._waiting[:written]
                if not count and self._dropped:
                    record = {"t": time.time(), "event": "unwritten", "lines": self._dropped}
                    self._dropped = 0
                    self._waiting += json.dumps(record).encode() + b"\n"
                    count = len(self._waiting)

    def _write(self, data: bytearray) -> int:
        """Some of it, to the events; how many bytes."""
        return os.write(self._open_events(), data)

    def _append(self, text: str) -> None:
        with open(self.path / RECOVERIES, "a") as f:
            f.write(text)

    def _replace(self, name: str, text: bytes, mode: int) -> None:
        temporary = self.path / f".{name}.{self._own}"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as f:
            f.write(text)
        os.replace(temporary, self.path / name)

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        """What only observes never ends training."""
        try:
            yield
        except OSError as err:
            if name not in self._failing:
                self._failing.add(name)
                why = err.strerror or type(err).__name__
                print(f"deadpool: {self.path / name} cannot be written: {why}; training goes on", file=sys.stderr)
        else:
            if name in self._failing:
                self._failing.discard(name)
                print(f"deadpool: {self.path / name} is written again", file=sys.stderr)

    def close(self) -> None:
        """Write out the last; a file system that hangs has some seconds."""
        self.flush()
        if (self._aside is None or self._aside.settle(_LAST_S)) and self._events is not None:
            os.close(self._events)


def _json(content: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"  # (twenty times as fast as json's)


def _is_cut(path: Path) -> bool:
    """Whether a file ends in the middle of a line."""
    if not path.exists():
        return False
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        return f.read(1) not in (b"", b"\n")


class NotWhole(Exception):
    """A file of a run directory is there and is not whole; the message is one line."""


def read_whole(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """What is written in one step: ``status.json`` or ``job.json``, with these keys. Raises OSError and NotWhole."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not content.keys() >= set(needed):
        raise NotWhole(f"{path} is not whole: was it copied while the job ran, or is it of another version?")
    return content


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """All events so far, oldest first; a last line that is still being written is left out."""
    try:
        text = (Path(run_dir) / EVENTS).read_text()
    except FileNotFoundError:
        return []
    return _parsed(text.split("\n")[:-1])


def _parsed(lines: Iterable[str | bytes]) -> list[dict[str, Any]]:
    """Without those that a writer could not finish: it died, or the disk was full."""
    out = []
    for line in lines:
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return out


class EventTail:
    """Reads the events of a run as they are written, each once; starts anew when a new run takes the directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / EVENTS
        self.inode = 0  # of the run's file; another one is another run's
        self._position = 0
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """What has come since the last call; a last line that is still being written comes with the next one."""
        try:
            with open(self._path, "rb") as f:
                inode = os.fstat(f.fileno()).st_ino
                if inode != self.inode:
                    self.inode, self._position, self._rest = inode, 0, b""
                f.seek(self._position)
                self._rest += f.read()
                self._position = f.tell()
        except FileNotFoundError:
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return _parsed(lines)


def follow_events(run_dir: str | Path, alive: Any, poll_s: float = 0.05) -> Iterator[dict[str, Any]]:
    """Events as they are written, until ``alive()`` is false and no more are there. For displays."""
    tail = EventTail(run_dir)
    while True:
        last = not alive()
        yield from tail.read()
        if last:
            return
        time.sleep(poll_s)


class NodeLog:
    """Writer of what one agent sees of its own node: ``node-N.jsonl``, of bounded length.

    The events have what concerns the whole job; here is what would be too much for them: every shard's snapshot and its
    way to the peer. Both have the same shape (``t`` in unix seconds, ``event``, further fields). What a full or
    read-only disk has no room for is lost.

    Args:
        limit: bytes; then it becomes the ``.old`` one.
        aside: write on a thread of its own, and nobody waits for it; what is too much to wait for a file system that
            hangs is lost.
    """

    def __init__(self, directory: str | Path, node: int, limit: int = _NODE_LOG, aside: bool = False) -> None:
        self._aside = Aside("node log", _MOST_LINES) if aside else None
        self.path = Path(directory) / f"node-{node}.jsonl"
        self._limit = limit
        self._node = node
        self._file: TextIO | None = None

    def write(self, event: str, **fields: Any) -> None:
        """Append one line; ``t`` is now unless given."""
        line = strict_json({"t": time.time(), "event": event, "node": self._node, **fields})
        if self._aside is None:
            self._append(line)
        else:
            self._aside.do(lambda: self._append(line))

    def _append(self, line: str) -> None:
        try:
            if self._file is None:
                self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open for the life of the agent
            self._file.write(line + "\n")
            if self._file.tell() > self._limit:
                self._end()
                os.replace(self.path, f"{self.path}.old")
        except OSError:
            return  # a log that cannot be written must not end a node

    def close(self) -> None:
        """Close the file; one that hangs has some seconds."""
        if self._aside is None or self._aside.settle(_LAST_S):
            self._end()

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def read_node_logs(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """All lines of all nodes of a run that are whole, node after node, each in order of time."""
    logs = Path(run_dir) / LOGS
    for path in sorted(logs.glob("node-*.jsonl")):
        for part in (Path(f"{path}.old"), path):
            if part.exists():
                yield from _parsed(part.read_text(errors="replace").splitlines())
