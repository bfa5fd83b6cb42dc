"""A worker's line to its agent: one control socket, one watcher thread, and what the training thread waits for.

::

    watcher thread                           training thread
    --------------                           ---------------
    recv Declare(e) -> closed, notify
                       on_declare(e)  ....>  blocked in a collective, comes out with an error or with garbage
                                             recover(): arrive, wait_generation, restore ...
    recv Form(e)    -> on_form(e)            (groups form beside it)
                       notify         ....>  goes on

The end of the control socket means that the agent is dead: this process must not train on, so it ends at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.output import Aside

_MAX_PACKET = 1 << 17
_PART = 1 << 16
_AGENT_LOST = 81
_ANSWER_S = 120.0
_LAST_WORDS_S = 1.0
_ROOM_S = 10.0  # longer than an agent that checksums is busy
_CLEAR_S = 3.0  # a GiB of a shard, which has two slots: five times what it takes


class EpochClosed(BaseException):
    """A newer epoch was declared while this rank was between two communications; unwinds to the recovery.

    Derives from BaseException so that no handler of the training script takes it for an error of its own.
    """


class Superseded(Exception):
    """A newer epoch has been declared; whatever was waited for will not come."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"epoch {epoch} has been declared")
        self.epoch = epoch


class Refused(Exception):
    """The agent refused a request; the message is one line for the user."""


class Session:
    """The worker's end of the protocol.

    Args:
        control_fd: the inherited SOCK_SEQPACKET socket.
        on_declare: called from the watcher thread with each new epoch; it aborts the communicators. The training thread
            can know of the epoch before: an abort frees it at once, and may take seconds more.
        on_form: called from the watcher thread with the newest epoch when every rank has arrived in it; it begins to
            form the groups and must return soon.
        epoch: in which this worker begins; not 0 when the start of the job had to begin anew.

    Attributes:
        armed: faults to be injected in this worker's iterations.
        hold: where everybody is to wait for the next epoch (a planned move), if anywhere.
    """

    def __init__(
        self, control_fd: int, on_declare: Callable[[int], None], on_form: Callable[[int], None], epoch: int = 0
    ) -> None:
        self._socket = socket.socket(fileno=control_fd)
        self._on_declare = on_declare
        self._on_form = on_form
        self._standing_by: int | None = None
        self._news = threading.Condition()
        self._declared: r.Declare | None = None
        self._rendezvous: r.Address | None = None
        self._generation: r.Generation | None = None
        self._take_over: r.TakeOver | None = None
        self._formed = -1
        self._all_finished = -1
        self._arena: r.ArenaGranted | r.ArenaRefused | None = None
        self.armed: tuple[r.Fault, ...] = ()
        self.hold: r.Hold | None = None
        self._told_to_wait = 0.0
        self._agent_reads = True
        self._on_arm: Callable[[r.Fault], None] = lambda fault: None
        self.is_waiting: Callable[[], bool] = lambda: False
        self.on_check: Callable[[r.Check], None] = lambda order: None
        self.on_exit_notice: Callable[[], None] = lambda: None
        self.on_replaced: Callable[[list[int]], None] = lambda ranks: None
        self.declared_epoch = epoch
        self.joined_epoch = epoch
        threading.Thread(target=self._watch, name="deadpool-watcher", daemon=True).start()

    # ---- the watcher thread

    def _watch(self) -> None:
        while True:
            try:
                packet = self._socket.recv(_MAX_PACKET)
            except OSError:
                packet = b""
            if not packet:
                _leave(_AGENT_LOST, "deadpool: the agent of this node is gone; this worker ends")
            self._take(r.decode_to_worker(packet))

    def _take(self, record: r.WorkerTold) -> None:
        if isinstance(record, r.Where):
            self.tell(r.Whereabouts(record.query, self.is_waiting()))
            return
        if isinstance(record, r.Check):
            _attempt(self.on_check, record)
            return
        if isinstance(record, r.ExitNotice):
            _attempt(self.on_exit_notice)
            return
        if isinstance(record, r.Declare) and record.epoch > self.declared_epoch:
            with self._news:
                self._declared = record
                self._rendezvous = record.rendezvous or self._rendezvous
                self.declared_epoch = record.epoch
                self._news.notify_all()
            _attempt(self.on_replaced, record.replaced)
            _attempt(self._on_declare, record.epoch)
            if (rank := self._standing_by) is not None:
                self.tell(r.Arrived(record.epoch, rank, None))
        elif isinstance(record, r.Declare) and record.epoch == self.declared_epoch:
            _attempt(self.on_replaced, record.replaced)  # a worker of this node has ended since, and is replaced too
        elif isinstance(record, r.Form) and record.epoch == self.declared_epoch:
            _attempt(self._on_form, record.epoch)
        with self._news:
            match record:
                case r.Generation():
                    self._generation = record
                case r.Form():
                    self._formed = record.epoch
                case r.TakeOver():
                    self._take_over = record
                case r.AllFinished():
                    self._all_finished = record.epoch
                case r.ArenaGranted() | r.ArenaRefused():
                    self._arena = record
                case r.Arm():
                    self.armed = (*self.armed, record.fault)
                    self._on_arm(record.fault)
                case r.Hold():
                    self.hold = record
                case r.KeepWaiting():
                    self._told_to_wait = time.monotonic()
                case r.Stop():
                    # Only a worker that its agent has not started is told; the others are ended by signal.
                    _leave(record.code)
            self._news.notify_all()

    # ---- the training thread

    @property
    def closed(self) -> bool:
        """True once an epoch newer than the one this worker takes part in has been declared. Cheap."""
        return self.declared_epoch > self.joined_epoch

    @property
    def rendezvous(self) -> tuple[str, int] | None:
        """Where the store of the newest epoch's process groups listens, if it is another place than at the start."""
        where = self._rendezvous
        return (where.host, where.port) if where is not None else None

    def call_on_arm(self, on_arm: Callable[[r.Fault], None]) -> None:
        """``on_arm`` is called with each fault that is armed, those that came before this call included."""
        with self._news:
            self._on_arm = on_arm
            for fault in self.armed:
                on_arm(fault)

    def tell(self, record: msgspec.Struct) -> None:
        """Send one record to the agent; it is in the kernel when this returns.

        An agent that reads nothing for long does not stop training: news that the next of their kind take the place of
        are dropped then.
        """
        points.reach_record("worker", record)
        packet = r.encode(record)
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            if isinstance(record, r.Iteration | r.SideEffect):
                self._try_to_send(packet)
            else:
                self._socket.send(packet)

    def _try_to_send(self, packet: bytes) -> None:
        for _ in range(2):
            with contextlib.suppress(BlockingIOError):
                self._socket.send(packet, socket.MSG_DONTWAIT)
                self._agent_reads = True
                return
            if not self._agent_reads:
                return
            room = select.poll()
            room.register(self._socket, select.POLLOUT)
            self._agent_reads = bool(room.poll(_ROOM_S * 1000))

    def step(self, step: r.Step, epoch: int, number: int = 0, changed: int = 0, numa: int = -1) -> None:
        """Tell the agent that this worker has reached a step."""
        points.reach(f"step.{step}")
        self.tell(r.WorkerStep(step, epoch, number, changed, numa))

    def wait_take_over(self) -> r.TakeOver:
        """Park until this worker is given a coordinate."""
        with self._news:
            while self._take_over is None:
                self._news.wait()
            return self._take_over

    def begin(self, epoch: int) -> None:
        """This worker begins with the job, in this epoch, and was parked before."""
        with self._news:
            self.declared_epoch = max(self.declared_epoch, epoch)
            self.joined_epoch = epoch

    def wait_declared(self, deadline_s: float) -> r.Declare | None:
        """The newest epoch this worker has not joined; None when none was declared within ``deadline_s`` seconds."""
        return self._declared if self.wait_newer(self.joined_epoch, deadline_s) else None

    def wait_generation(self, epoch: int) -> r.Generation:
        """The generation agreed in ``epoch``. Raises Superseded."""
        with self._news:
            while True:
                self._check(epoch)
                if self._generation is not None and self._generation.epoch == epoch:
                    return self._generation
                self._news.wait()

    def stand_by(self, rank: int) -> None:
        """This worker, a spare, has arrived in every epoch from now on, whatever its training thread does.

        Its groups are not real yet, so there is nothing to come out of, and they may be formed beside that thread's
        work. Until `arrive`.
        """
        self._standing_by = rank
        self.tell(r.Arrived(self.declared_epoch, rank, None))

    def arrive(self, epoch: int, rank: int, live: int | None, live_epoch: int = 0) -> None:
        """Tell the agent that the training thread is out of its step; the live state as in `records.Arrived`."""
        self._standing_by = None
        self.tell(r.Arrived(epoch, rank, live, live_epoch))

    def wait_form(self, epoch: int) -> None:
        """Until every rank has arrived in ``epoch``, so that its groups form. Raises Superseded."""
        with self._news:
            while self._formed != epoch:
                self._check(epoch)
                self._news.wait()

    def wait_all_finished(self, epoch: int) -> None:
        """Until every coordinate has finished training. Raises Superseded."""
        with self._news:
            while self._all_finished < epoch:
                self._check(epoch)
                self._news.wait()

    def wait_newer(self, epoch: int, deadline_s: float) -> bool:
        """Until an epoch newer than ``epoch`` is declared; False when the deadline passes.

        Time in which the agent has no coordinator, so that nobody can declare, does not count.
        """
        begun = time.monotonic()
        with self._news:
            while self.declared_epoch <= epoch:
                left = max(begun, self._told_to_wait) + deadline_s - time.monotonic()
                if left <= 0:
                    return False
                self._news.wait(left)
            return True

    def refuse(self, agreed: r.Generation, why: Exception, deadline_s: float) -> bool:
        """The copy that was handed out cannot be used: tell so, and wait for a newer epoch. False when none comes."""
        self.tell(r.Unreadable(agreed.epoch, agreed.generation, agreed.version_epoch, str(why)[:500]))
        return self.wait_newer(agreed.epoch, deadline_s)

    def describe(self, rank: int, data: bytes) -> None:
        """Tell the agent what job this is, in parts that a packet can hold."""
        parts = max(1, -(-len(data) // _PART))
        for part in range(parts):
            self.tell(r.Described(rank, part, parts, data[part * _PART : (part + 1) * _PART]))

    def request_arena(
        self,
        rank: int,
        unique_bytes: int,
        small_bytes: int,
        numa: int = -1,
        layout: str = "",
        deadline_s: float | None = None,
    ) -> str:
        """The path of this rank's arena in the vault. Arguments as of `ArenaRequest`. Raises Refused, with one line.

        Without a deadline it has as long as the agent may take to clear the memory of all workers of its node.
        """
        if deadline_s is None:
            workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            deadline_s = _ANSWER_S + _CLEAR_S * workers * unique_bytes / (1 << 30)
        with self._news:
            self._arena = None
        self.tell(r.ArenaRequest(rank, unique_bytes, small_bytes, numa, layout))
        with self._news:
            answer = self._news.wait_for(lambda: self._arena, deadline_s)
        if answer is None:
            raise Refused(f"the agent did not give rank {rank} its memory within {deadline_s:g} s")
        if isinstance(answer, r.ArenaRefused):
            raise Refused(answer.message)
        return answer.path

    def _check(self, epoch: int) -> None:
        if self.declared_epoch > epoch:
            raise Superseded(self.declared_epoch)


def _leave(code: int, words: str = "") -> NoReturn:
    """At once, also where whoever reads what this process prints is gone, or reads nothing."""

    def say() -> None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            if words:
                print(words, file=sys.stderr, flush=True)

    Aside("last words", 1, _LAST_WORDS_S).do(say)
    os._exit(code)


def _attempt(call: Callable[..., None], *args: Any) -> None:
    """In the watcher thread: without it this worker would be deaf. What fails here the training thread does itself."""
    try:
        call(*args)
    except Exception:  # noqa: BLE001 - see above
        traceback.print_exc()
