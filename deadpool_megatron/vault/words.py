"""The 64-bit words that processes share: nothing in memory moves past an access to one of them.

A word announces bytes (``published``, ``end``, ``own_turn``) or takes them back (``turn``): its writer stores the
bytes, then the word; its reader loads the word, then the bytes, and to be sure that they were not overwritten
meanwhile, the word again. So four orders count: earlier stores before the word, the word before later stores, the
word before later loads, earlier loads before the word. x86-64 keeps them for plain accesses; aarch64 keeps none of
them, and a reader there may see the word and not the bytes. `Words` has a `fence` before and after each access, which
keeps all four.

Python has no fence, and there may be no compiler where this runs. `fence` releases a lock and acquires the same one
again, with nobody else near it:

* CPython's lock is a POSIX semaphore (``Python/thread_pthread.h``), later a ``PyMutex`` (``Python/lock.c``), whose
  compare-and-swap is sequentially consistent. glibc posts the semaphore with a release and takes it with an acquire
  (``nptl/sem_post.c``, ``nptl/sem_waitcommon.c``), whether the process has one thread or many. That is not so for a
  mutex: ``pthread_mutex_lock`` of a process with one thread is a plain store. POSIX has both calls among those that
  synchronize memory between threads of control, processes included (XBD 4.12).
* A release alone lets later accesses pass before it, an acquire alone lets earlier ones pass after it, so acquire and
  then release would order nothing. Release and then acquire does: all that is earlier comes before the release, the
  release before the acquire, and that before all that is later. The Arm architecture says so of STLXR or CASL
  followed by LDAXR or CASA (DDI 0487, B2.3, *barrier-ordered-before*: a Release followed in program order by an
  Acquire); Linux counts on it in its memory model (``tools/memory-model``, ``po-unlock-lock-po``).
* Memory is multi-copy atomic on both, so stores of other threads that this one has waited for (a copy by several
  threads, or by a device) are ordered as its own are.
* On x86-64 the same calls are LOCK instructions: full fences, which flush write-combining stores as well.

The lock is new each time: one that is shared could be held by a thread that has lost the interpreter, or by the very
one whose signal handler is running. A word is aligned and accessed by one instruction (`memoryview` of format ``Q``),
so none is ever seen half.
"""

from __future__ import annotations

from threading import Lock
from typing import Any


def fence() -> None:
    """Every load and store before the call comes before every one after it, as seen by any process. 0.2 us."""
    lock = Lock()
    lock.acquire()
    lock.release()
    lock.acquire()


class Words:
    """Words of shared memory, by index; each has one writer.

    Args:
        view: bytes, aligned to 8.
    """

    __slots__ = ("_view",)

    def __init__(self, view: memoryview) -> None:
        self._view: memoryview[Any] = view.cast("Q")

    def __getitem__(self, index: int) -> int:
        fence()
        value: int = self._view[index]
        fence()
        return value

    def __setitem__(self, index: int, value: int) -> None:
        fence()
        self._view[index] = value
        fence()

    def add(self, index: int, amount: int) -> None:
        """Add to a word, by its writer."""
        fence()
        self._view[index] += amount
        fence()

    def release(self) -> None:
        self._view.release()
