"""All process groups of this process, as one thing that can be aborted and re-formed in place.

    training thread            watcher thread             a standby, elsewhere
    ---------------            --------------             --------------------
    all_reduce(...).wait       abort()                    groups made with the fake backend
      ... blocked ...            poison, end connections
    <- CommunicatorAborted       force what stays blocked
                          begin_reform(epoch, store)      begin_reform(epoch, store)
    (restores its state)    new backends form             (builds its model)
    reform(epoch, store)  <------- same epoch ------->    reform(epoch, store)
      they move in, in place       (abort() here ends     (same groups, same order)
                                    it too)
    all_reduce(...)                                       all_reduce(...)

Ranks never renumber; every object that captured a ProcessGroup goes on working, because the ProcessGroup stays and
only its backend changes. To a collective over Gloo a look at one flag is added, when it is waited for. Over NCCL two
are (`calls`), and NCCL's thread for each launch of a nonblocking communicator, which an abort needs.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from deadpool_megatron.comm import nccl
from deadpool_megatron.comm.calls import Calls
from deadpool_megatron.comm.connections import GlooConnections
from deadpool_megatron.comm.forming import Forming, FormingPlan, set_operation_timeout
from deadpool_megatron.comm.inplace import InPlace, Replacement, c10d
from deadpool_megatron.comm.quiet import Quiet
from deadpool_megatron.comm.reports import AbortReport, CommunicatorError, GroupReport, ReformError, ReformReport
from deadpool_megatron.comm.store_clients import own_client
from deadpool_megatron.comm.table import (
    Create,
    GroupRecord,
    GroupTable,
    backend_of,
    no_rendezvous,
    pretend,
    watch_groups,
)
from deadpool_megatron.comm.waits import Poison, Waits

_log = logging.getLogger(__name__)

_ABORT_DEADLINE_S = 2.0
_ABORTED = "epoch {}: aborted while forming"
_QUIET_S = 0.25  # how long quiet groups are left alone while the training thread is still at work
_INSIDE_S = 0.25  # a thread is inside of NCCL for microseconds, unless it makes a communicator
_ABORT_GRACE_S = 0.1  # waits that end by themselves after their connections do so within 10 ms, more on a busy machine


class Communicators:
    """All process groups of this process. Made once per process by `install`, before torch.distributed starts."""

    _installed: ClassVar["Communicators | None"] = None

    def __init__(self, *, standby: bool, keep: bool, form_timeout_s: float, operation_timeout_s: float) -> None:
        """Use `install`."""
        self.epoch = 0
        self._standby = standby
        self._form_timeout_s = form_timeout_s
        self._operation_timeout_s = operation_timeout_s
        self._poison = Poison()
        self._waits = Waits(self._poison)
        self._calls = Calls(self._poison)
        self._aborts = nccl.Aborts()
        self._table = GroupTable()
        self._connections = GlooConnections()
        self._quiet = Quiet(self._waits.release, self._connections, keep)
        self._in_place = InPlace()
        self._abort_lock = threading.Lock()
        self._state_lock = threading.Lock()  # poison, forming; held for moments only
        self._forming: Forming | None = None
        self._forming_epoch = 0
        self._over = -1  # `abort` has named this epoch: it must not begin to form any more
        self._left = threading.Event()  # the training thread is out of the broken epoch
        self._prepared: tuple[Store, Store] | None = None  # the caller's store, our own connection to the same server
        self._cuda_device: int | None = None

    @classmethod
    def install(
        cls, *, standby: bool, keep: bool = True, form_timeout_s: float = 20.0, operation_timeout_s: float = 30.0
    ) -> "Communicators":
        """Take charge of every process group that this process will make.

        Args:
            standby: this process is a spare: `init_process_group` and `new_group` meet nobody and make groups with
                torch's fake backend; `reform` gives the same objects real ones.
            keep: leave groups as they are that lost nobody and have nothing under way; else every epoch re-forms all.
            form_timeout_s: limit of one `reform`.
            operation_timeout_s: time-out of each Gloo operation once its group is formed: the floor under what abort
                cannot free. NCCL groups keep their own.

        Raises CommunicatorError when called twice or after groups were made.
        """
        if cls._installed is not None:
            raise CommunicatorError("Communicators.install was called before in this process; use that object")
        if dist.is_initialized():
            raise CommunicatorError("process groups exist: call Communicators.install before init_process_group")
        self = cls(standby=standby, keep=keep, form_timeout_s=form_timeout_s, operation_timeout_s=operation_timeout_s)
        self._waits.install()
        watch_groups(self._on_group, lambda: self._standby)
        if standby:
            no_rendezvous(lambda: self._standby)
        cls._installed = self
        if not self._in_place.exact:
            _log.warning("torch %s: backends cannot be exchanged, dead ones stay in memory", torch.__version__)
        if not self._waits.can_force:
            _log.warning("torch %s: waits cannot be forced, half-sent messages block until time-out", torch.__version__)
        _log.info(
            "communicators: torch %s, exchange %s, quiet groups are kept: %s",
            torch.__version__,
            self._in_place.exact,
            self._quiet.available,
        )
        return self

    # -- what everybody may ask ------------------------------------------------------------------------------------

    @property
    def poisoned(self) -> bool:
        """True from `abort` until a `reform` succeeds. One attribute read."""
        return self._poison.set

    def is_waiting(self) -> bool:
        """A thread of this process is inside `Work.wait`, or makes an NCCL communicator. From any thread."""
        return self._waits.anybody or self._calls.anybody

    def table_digest(self) -> str:
        """Hash of the table of groups. Must be equal on all ranks and on the spare before they re-form."""
        return self._table.digest()

    def groups(self) -> list[GroupRecord]:
        """The living groups that this rank is a member of, in order of creation. For logs and tests."""
        return self._table.members(c10d._world.pg_map)

    # -- creation --------------------------------------------------------------------------------------------------

    def _on_group(self, record: GroupRecord, create: Create) -> Any:
        if self._poison.set:
            raise self._poison.error()
        if torch.cuda.is_available():
            self._cuda_device = torch.cuda.current_device()  # the training thread's: forming may begin in another
        if "nccl" in record.backend_of_device.values():
            nccl.set_environment()
            self._calls.guard(c10d.ProcessGroup)
        with self._connections.watching() as devices:
            group = create()
        if record.real and record.group is not None and "nccl" in record.backend_of_device.values():
            nccl.check_kind(record)
        record.devices, record.connections = frozenset(devices), frozenset(self._connections.of(devices))
        record.connected = self.epoch
        self._table.add(record)
        formed = record.real and record.group is not None and "gloo" in record.backend_of_device.values()
        if formed and record.timeout.total_seconds() > self._operation_timeout_s:
            # Only now, not for the forming itself: ranks may come minutes apart at start.
            set_operation_timeout(backend_of(record, "gloo"), self._operation_timeout_s)
        return group

    # -- abort -----------------------------------------------------------------------------------------------------

    def abort(self, epoch: int | None = None, *, left: bool = False) -> AbortReport:
        """End all communication of this process, from any thread; also a `reform` under way.

        Every operation blocked in `Work.wait`, and every later one on any group, raises CommunicatorAborted (a blocked
        one may raise torch's own error for the lost connection instead). Idempotent. Returns after 2 s at most, over
        Gloo nearly always within milliseconds. One of NCCL frees kernels at once and then drains what was queued behind
        them: it goes on in threads of its own, and who restores state waits for the device. With `epoch`, does nothing
        if a later epoch is current or forming, and no epoch up to that one begins to form any more.

        Groups in which nothing is under way keep their connections, so that `reform` may keep them, unless the
        training thread does not come out: then they are ended too, 0.25 s later.

        Args:
            left: the training thread says that it is out of the broken epoch: it begins no operation before `reform`.
        """
        begun = time.monotonic()
        deadline = begun + _ABORT_DEADLINE_S
        with self._state_lock:
            if epoch is not None:
                self._over = max(self._over, epoch)
            if epoch is not None and max(self.epoch, self._forming_epoch) > epoch:
                return AbortReport(self._poison.set, 0, 0, 0, 0, 0, 0, 0, 0.0)
            if self._standby:  # its groups are not real yet, and it may be building its model on them
                if self._forming is not None:
                    self._forming.abandon()
                return AbortReport(False, 0, 0, 0, 0, 0, 0, 0, 0.0)
            already, self._poison.set = self._poison.set, True
            if left:
                self._left.set()
            if self._forming is not None:
                self._forming.abandon()
        if not self._abort_lock.acquire(timeout=_ABORT_DEADLINE_S):
            return AbortReport(already, 0, 0, 0, 0, 0, 0, 0, time.monotonic() - begun)
        try:
            established = self._connections.established()
            quiet = [record for record in self._records() if not self._quiet.against(record, established)]
            if quiet and not already and not self._left.is_set():
                ends = threading.Thread(
                    target=self._end_quiet_too, args=[self._left], name="deadpool-abort", daemon=True
                )
                ends.start()
            closed = self._connections.shutdown(frozenset().union(*(record.connections for record in quiet)))
            backends = self._backends("nccl")
            if backends and self._calls.wait_outside(_INSIDE_S):
                _log.warning(
                    "a thread stays inside of NCCL, perhaps while a communicator is made: aborted all the same"
                )
            aborted, stuck = self._aborts.run(backends, deadline)
            found, forced, inside = self._waits.clear_out(self._backends("gloo"), _ABORT_GRACE_S, deadline)
        finally:
            self._abort_lock.release()
        report = AbortReport(
            already, closed, len(quiet), found, forced, inside, aborted, stuck, time.monotonic() - begun
        )
        _log.info("communicators of epoch %d aborted: %s", self.epoch, report)
        return report

    def _end_quiet_too(self, left: threading.Event) -> None:
        """The training thread may begin operations on a quiet group and wait for them in C++, where it cannot see
        that the epoch is over."""
        if left.wait(_QUIET_S):
            return
        with self._abort_lock:  # `reform` waits for it
            with self._state_lock:
                if left.is_set():
                    return
            closed = self._connections.shutdown()
            deadline = time.monotonic() + _ABORT_DEADLINE_S
            found, forced, stuck = self._waits.clear_out(self._backends("gloo"), _ABORT_GRACE_S, deadline)
        text = "still at work: quiet groups ended too (%d connections, %d waits, %d forced, %d stuck)"
        _log.info(text, closed, found, forced, stuck)

    def _records(self) -> list[GroupRecord]:
        """`groups`, from any thread."""
        alive = dict(c10d._world.pg_map)
        return [record for record in list(self._table.records) if record.group in alive]

    def _backends(self, kind: str) -> list[Any]:
        """The real backends of this kind; from any thread."""
        return [
            backend_of(record, kind)
            for record in self._records()
            if record.real and kind in record.backend_of_device.values()
        ]

    def begin(self) -> None:
        """A standby that has made no group yet becomes a process like others: its groups are real from the first on.

        Raises CommunicatorError when it has made some.
        """
        if self._table.records:
            raise CommunicatorError("a standby that has made process groups joins the others by reform, not by begin")
        self._standby = False

    def prepare(self, store: Store) -> None:
        """Connect to the store's server now, so that a later `reform` with this store need not. Optional; call it
        once at start (any thread; may block for seconds on a slow name server). `reform` keeps it up from then on."""
        self._prepared = (store, own_client(store))

    # -- re-form ---------------------------------------------------------------------------------------------------

    def begin_reform(self, epoch: int, store: Store | Callable[[], Store]) -> None:
        """Begin to form all groups for `epoch`, in a thread of its own; `reform` with this epoch goes on from there.

        Any thread may call, on every rank, once the training threads of all ranks are out of the broken epoch. Returns
        at once. The training thread may do what needs no communication meanwhile: restore its state, or (a spare)
        build its model on groups that are not real yet.

        Raises ReformError when there are no groups, the epoch is not a new one, or `abort` has named it or a later one.
        """
        if epoch <= max(self.epoch, self._forming_epoch):
            raise ReformError(
                f"epoch {epoch}: not after {max(self.epoch, self._forming_epoch)}; each try needs a new one"
            )
        if not dist.is_initialized():
            raise ReformError("there are no process groups: torch.distributed is not initialized")
        if self._forming is not None:
            self._clear_away(self._forming)  # of an epoch that was over before its groups were needed
        with self._state_lock:
            self._left.set()
        if not self._poison.set and not self._standby:
            self.abort()  # nobody may go on with the old connections
        records = self.groups()
        if all(set(record.backend_of_device.values()) == {"gloo"} for record in records):
            self._waits.at_most(self._operation_timeout_s)
        begun = time.monotonic()
        plan = FormingPlan(
            epoch=epoch,
            rank=dist.get_rank(),
            records=records,
            digest=self.table_digest(),
            begun=begun,
            deadline=begun + self._form_timeout_s,
            operation_timeout_s=self._operation_timeout_s,
            cuda_device=self._cuda_device,
            calls=self._calls,
        )
        prepared, self._prepared = self._prepared, None
        make = store if callable(store) else lambda: store
        forming = Forming(plan, make, prepared, self._connections, self._quiet, self._abort_lock, self._aborts)
        with self._state_lock:
            if epoch <= self._over:
                self._prepared = prepared
                raise ReformError(_ABORTED.format(epoch))
            self._forming, self._forming_epoch = forming, epoch
        forming.start()

    def reform(self, epoch: int, store: Store | Callable[[], Store]) -> ReformReport:
        """Form all groups again, in place, for `epoch`. Every rank of WORLD calls it, on its training thread.

        Args:
            epoch: higher than any before, equal on all ranks.
            store: TCPStore client of a server outside of the training processes, or what makes one (called in a thread
                of its own). Used through a connection of its own (see `prepare`); all keys are under the epoch.

        Blocks until the groups are formed, `form_timeout_s` from its beginning (`begin_reform`) at most. Raises
        ReformError when that passes, a peer is lost, the tables differ or `abort` is called meanwhile; the groups stay
        poisoned then, and the next call needs a higher epoch.
        """
        if self._forming is None or self._forming.plan.epoch != epoch:
            self.begin_reform(epoch, store)
        forming = self._forming
        assert forming is not None
        plan = forming.plan
        try:
            forming.settled.wait(max(0.0, plan.deadline - time.monotonic()))
            needed = time.monotonic()
            self._check(forming, epoch)
            if self.table_digest() != plan.digest:
                raise ReformError(f"epoch {epoch}: this rank made other process groups while they were formed")
            c10d._world.pg_coalesce_state.clear()  # an exception in a coalescing block leaves its entry behind
            self._move_all_in(forming)
        except BaseException:
            self._clear_away(forming)
            raise
        self._prepared = (forming.store, forming.client)
        seconds, name = forming.slowest
        report = ReformReport(
            epoch,
            tuple(
                GroupReport(f"{record.desc} {record.name}", forming.verdicts[record.name].why)
                for record in plan.records
            ),
            forming.ended - plan.begun + time.monotonic() - needed,
            name,
            seconds,
        )
        _log.info("communicators: %s", report)
        return report

    def _move_all_in(self, forming: Forming) -> None:
        """The new epoch begins. Raises ReformError when it is over already."""
        epoch = forming.plan.epoch
        donors: list[Any] = []
        dead: list[Any] = []
        try:
            for record, new in forming.formed:
                dead += [backend_of(record, kind) for kind in set(record.backend_of_device.values())]
                donors.append(self._move_in(record, new))
                record.connected, record.connections = epoch, forming.connections[record.name]
                record.devices = forming.devices
            with self._state_lock:
                self._check(forming, epoch)
                self._forming = None
                self.epoch = epoch
                self._standby = False
                self._left = threading.Event()  # a late thread of the broken epoch looks at the one that is set
                self._poison.set = False
        finally:
            dead += [backend for _, new in forming.formed for _, _, backend in new.backends]
            donors.clear()  # only now, and not as the last owner: see retire
            forming.formed = []
            retire(dead)

    def _clear_away(self, forming: Forming) -> None:
        """What came to nothing: whatever it has built is dropped, and nobody uses its connection again."""
        forming.abandon()
        with self._state_lock:
            if self._forming is forming:
                self._forming = None
        retire([backend for _, new in forming.formed for _, _, backend in new.backends])
        forming.formed = []
        if forming.store is not None:  # the connection may be blocked in a wait of the thread left behind
            threading.Thread(target=self.prepare, args=(forming.store,), name="deadpool-store", daemon=True).start()

    def _check(self, forming: Forming, epoch: int) -> None:
        if forming.abandoned:
            raise ReformError(_ABORTED.format(epoch))
        if forming.error is not None:
            raise ReformError(f"epoch {epoch}: forming failed: {forming.error}") from forming.error
        if not forming.settled.is_set():
            raise ReformError(f"epoch {epoch}: not all peers came within {self._form_timeout_s:g} s")

    def _move_in(self, record: GroupRecord, new: Replacement) -> Any:
        group = record.group
        if not record.real:
            group.bound_device_id = record.bound_device
        donor = self._in_place.replace(group, new, fresh_group=not record.real)
        record.real = True
        pretend(record, new.store)
        group._set_group_name(record.name)  # these two live in the backend
        group._set_group_desc(record.desc)
        return donor


def retire(backends: list[Any]) -> None:
    """Let go of backends, in a thread. Dead ones end here: a Gloo backend's end waits for its threads, and one of
    those may wait for the operation time-out. As the last owner, the Python object of a *backend* ends it without
    the GIL; the Python object of a *group* would hold the GIL all that time."""

    def drop() -> None:
        while backends:
            backends.pop()

    threading.Thread(target=drop, name="deadpool-retire", daemon=True).start()
