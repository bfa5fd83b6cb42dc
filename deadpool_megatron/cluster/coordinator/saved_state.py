"""What a coordinator remembers beyond its own end: its state in the store, by part, each guarded by its leadership."""

from __future__ import annotations

import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from deadpool_megatron.cluster.store import Deposed, Guard, Store, StoreDamaged, StoreError
from deadpool_megatron.cluster.store.leadership import PLACE, STATE, Place

_SAY_AFTER_S: Final = 5.0
_PARTS: Final = ("now", "members", "layout")

_encoder = msgspec.msgpack.Encoder()


@contextmanager
def of_this_version() -> Iterator[None]:
    """In it a state is read that was written: raises StoreDamaged where it has not the shape that is expected."""
    try:
        yield
    except (LookupError, TypeError, ValueError, msgspec.MsgspecError, zlib.error) as err:
        raise StoreDamaged(
            "what was kept of the job that is under way is of another version of DeadPool, and cannot be read "
            f"({type(err).__name__}: {err}): go on with the version that it began with, or end all its processes and "
            "start it again, from what is durable (--deadpool-resume auto) or from Megatron's last checkpoint"
        ) from err


def read_state(store: Store) -> dict[str, Any] | None:
    """The state of the job that is under way, by part; None when there is none. Raises StoreError."""
    entries = {name: store.get(STATE + name) for name in _PARTS}
    with of_this_version():
        parts = {name: msgspec.msgpack.decode(zlib.decompress(e.value)) for name, e in entries.items() if e is not None}
    return parts if "now" in parts else None


class Memory:
    """Every write blocks until the store has it: what is decided while it does not answer is told to nobody.

    Raises Deposed when the leadership is over.
    """

    def __init__(self, store: Store, guard: Guard) -> None:
        self._store = store
        self._guard = guard
        self._written: dict[str, bytes] = {}
        self.writes = self.written_bytes = 0
        self.insists = True
        """What is decided waits until it is kept; False: for seconds only, since the user wants the end."""
        self._deposed = False

    def watch(self) -> None:
        """Look out for the end of this leadership, in the background: whoever holds its lease may have hung."""
        watch = self._store.watch(self._guard.key)

        def look() -> None:
            while not self._deposed:
                try:
                    entry = watch.next(60.0)
                except TimeoutError:
                    continue
                self._deposed = entry is None or entry.revision != self._guard.revision

        threading.Thread(target=look, name="deadpool-leadership", daemon=True).start()

    def check(self) -> None:
        """Raises Deposed once `watch` has seen the end."""
        if self._deposed:
            raise Deposed("the leadership is over")

    def begin(self, parts: Mapping[str, Any]) -> None:
        """Forget all, and put these. Whoever leads next goes on from them, also where nothing else comes. Raises
        StoreError."""
        self.clear()
        self._put(parts, lambda act: act())

    def write(self, parts: Mapping[str, Any]) -> None:
        """Put those parts that have changed, all at once. Values are JSON types."""
        self._put(parts, self._insist)

    def _put(self, parts: Mapping[str, Any], how: Callable[[Callable[[], int]], int]) -> None:
        values = {}
        for name, part in parts.items():
            value = zlib.compress(_encoder.encode(part), 1)
            if self._written.get(name) != value:
                self._written[name] = values[STATE + name] = value
        if values:
            how(lambda: self._store.put(values, guard=self._guard))
            self.writes += 1
            self.written_bytes += sum(map(len, values.values()))

    def read(self) -> dict[str, Any] | None:
        """What was written last, by part; None when there is no job under way. Waits for a store that does not answer.

        Raises StoreDamaged.
        """
        return self._insist(lambda: read_state(self._store), StoreDamaged)

    def clear(self) -> None:
        """Forget all. Raises StoreError."""
        self._store.delete(STATE, self._guard)
        self._written.clear()

    def publish_place(self, host: str, port: int, store_port: int, job_id: str, again: bool) -> None:
        """The coordinator listens. Raises StoreError, unless it does so ``again``: then it waits, as with decisions."""
        place = Place(host, port, store_port, self._guard.revision, job_id)

        def put() -> None:
            self._store.put({PLACE: _encoder.encode(place)}, guard=self._guard)

        if again:
            self._insist(put)
        else:
            put()

    def _insist[T](self, act: Callable[[], T], *ends: type[StoreError]) -> T:
        over: tuple[type[StoreError], ...] = (Deposed, *ends)
        begun, said = time.monotonic(), False
        while True:
            try:
                return act()
            except over:
                raise
            except StoreError as err:
                if not self.insists and time.monotonic() - begun > _SAY_AFTER_S:
                    raise
                if not said and time.monotonic() - begun > _SAY_AFTER_S:
                    said = True
                    print(f"deadpool: {err}; nothing is decided until it does", file=sys.stderr, flush=True)
                time.sleep(0.1)
