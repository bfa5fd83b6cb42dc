"""Building the backends of a new epoch, away from the training thread so that nothing can hold that for long."""

import threading
import time
from collections.abc import Callable, Collection
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm import gloo, nccl, reconfigure
from deadpool_megatron.comm.connections import GlooConnections, GlooDevice
from deadpool_megatron.comm.inplace import Replacement, c10d, pointee
from deadpool_megatron.comm.methods import (
    NOT_USED,
    Decision,
    Word,
    decide,
    pack_decision,
    pack_words,
    unpack_decision,
    unpack_words,
)
from deadpool_megatron.comm.quiet import Quiet
from deadpool_megatron.comm.reports import ReformError
from deadpool_megatron.comm.table import GroupRecord, backend_of


@dataclass(frozen=True, slots=True)
class FormingPlan:
    """What to form: the groups of this rank in table order, and the rules."""

    epoch: int
    rank: int
    records: list[GroupRecord]
    digest: str
    begun: float
    """On time.monotonic, as is the deadline."""
    deadline: float
    operation_timeout_s: float
    reconfigures: bool
    """Whether torch's reconfigure is used where it can be."""
    occupied: list[Any]
    """Connections to the store that threads of earlier epochs may be blocked in."""
    cuda_device: int | None
    """The training thread's."""


def own_client(store: Any) -> Any:
    """Another connection to the same server. Takes a millisecond, or seconds: TCPStore looks up names for each new
    connection, and a lost packet to the name server costs its time-out (5 s seen)."""
    try:
        return store.clone()
    except (NotImplementedError, AttributeError, RuntimeError):
        return store  # stores without connections (HashStore) have no clone


class Forming(threading.Thread):
    """Forms one epoch. The training thread does other work meanwhile (it restores its state), then waits on `settled`;
    when an abort comes it just leaves this thread behind.

    An abandoned thread harms nobody: what it builds is under its own epoch's keys and dropped with it, it has its
    own connection to the store (a TCPStore client whose wait is blocked blocks all its users), and it ends at the
    deadline at the latest.
    """

    def __init__(
        self,
        plan: FormingPlan,
        store: Callable[[], Any],
        prepared: tuple[Any, Any] | None,
        connections: GlooConnections,
        quiet: Quiet,
        abort_lock: threading.Lock,
    ) -> None:
        """`prepared`: a store, and a connection to its server that is used by nobody else. `abort_lock` is held by an
        abort that is at work: it looks for operations to end, and must not find those of the new epoch."""
        super().__init__(name=f"deadpool-forming-{plan.epoch}", daemon=True)
        self.settled = threading.Event()
        self.ended = 0.0
        """When it settled, on time.monotonic."""
        self.abandoned = False
        self._abandoning = threading.Lock()
        self.error: BaseException | None = None
        self.formed: list[tuple[GroupRecord, Replacement]] = []
        """Groups with new backends, yet to be moved in."""
        self.reconfigured: list[GroupRecord] = []
        """Groups whose backends were told to reconfigure, the last of them perhaps without an answer yet."""
        self._meeting: Any = None  # the store that one meets in
        self.connections: dict[str, frozenset[int]] = {}
        """New connections, by name of the group."""
        self.devices: frozenset[GlooDevice] = frozenset()
        """The Gloo devices of the new backends."""
        self.decisions: dict[str, Decision] = {}
        self.slowest: tuple[float, str] = (0.0, "")
        self.plan = plan
        self.store: Any = None
        self.client: Any = None
        self._make_store = store
        self._prepared = prepared
        self._connections = connections
        self._quiet = quiet
        self._abort_lock = abort_lock

    def abandon(self) -> None:
        """Leave this thread behind. No further backend is told to reconfigure once this has returned."""
        with self._abandoning:
            self.abandoned = True
        self.settled.set()

    def run(self) -> None:
        try:
            self._form()
        except Exception as error:  # noqa: BLE001 - thread boundary: handed to the training thread, whatever it is
            self.error = error
        finally:
            self.ended = time.monotonic()
            self.settled.set()

    def _left(self) -> float:
        left = self.plan.deadline - time.monotonic()
        if left <= 0 or self.abandoned:
            raise ReformError(f"epoch {self.plan.epoch}: deadline passed while forming")
        return left

    def _form(self) -> None:
        plan = self.plan
        if not self._abort_lock.acquire(timeout=self._left()):
            raise ReformError(f"epoch {plan.epoch}: an abort is at work all the time")
        self._abort_lock.release()
        store, prepared = self._make_store(), self._prepared
        self.store = store
        client = self.client = prepared[1] if prepared is not None and prepared[0] is store else own_client(store)
        usual_timeout = client.timeout
        client.set_timeout(timedelta(seconds=self._left()))
        store = c10d.PrefixStore(f"deadpool/epoch/{plan.epoch}", client)
        agreed = store.compare_set("table", "", plan.digest).decode()
        if agreed != plan.digest:
            raise ReformError(
                f"epoch {plan.epoch}: this rank ({plan.rank}) made other process groups than its peers (table digest "
                f"{plan.digest}, theirs {agreed}); start all ranks with the same flags"
            )
        self.decisions = self._agree(store)
        ended = [record for record in plan.records if self.decisions[record.name].method != "kept"]
        # Those that were left alone so far. Only these: an abandoned thread must not end what a later epoch made.
        self._connections.shutdown_only(frozenset().union(*(record.connections for record in ended)))
        devices: list[Any] = []  # torch's, for self.devices
        seen: set[tuple[int, int]] = set()  # connections on them
        for record in ended:
            begun = time.monotonic()
            decision = self.decisions[record.name]
            if decision.method == "reconfigured":
                before: set[tuple[int, int]] = set()
                self._connections.fresh(record.devices, before)
                self._reconfigure(record, decision.handles)
                connections = self._connections.fresh(record.devices, before)
            else:
                if not devices and "gloo" in record.backend_of_device.values():
                    devices, self.devices = gloo.create_devices(self._connections)
                self.formed.append((record, self._replacement(record, store, devices)))
                connections = self._connections.fresh(self.devices, seen)
            self.connections[record.name] = frozenset(connections)
            self.slowest = max(self.slowest, (time.monotonic() - begun, f"{record.desc} {record.name}"))
        client.set_timeout(usual_timeout)

    def _reconfigure(self, record: GroupRecord, handles: tuple[str, ...]) -> None:
        timeout_s = self._left()
        with self._abandoning:  # past this, a later epoch takes the backend for spoilt and swaps it
            self._left()
            self.reconfigured.append(record)
            self._meeting = reconfigure.store_of(record.group)
            backend = backend_of(record, "gloo")
        reconfigure.reconfigure(backend, self.plan.epoch, handles, timeout_s)
        self._meeting = None

    def _agree(self, store: Any) -> dict[str, Decision]:
        """The method of each group of this rank, the same on all its members. Blocks until all members have come."""
        records, rank = self.plan.records, self.plan.rank
        established = self._connections.established()
        asked = self._stores_that_answer() if self.plan.reconfigures else set()
        words = {record.name: self._word(record, established, asked) for record in records}
        store.set(f"words/{rank}", pack_words(words))
        mine = [record for record in records if record.ranks[0] == rank]
        if others := sorted({member for record in mine for member in record.ranks} - {rank}):
            told = dict(zip(others, map(unpack_words, self._get(store, [f"words/{r}" for r in others])), strict=True))
        else:
            told = {}
        told[rank] = words
        for record in mine:
            if missing := [member for member in record.ranks if record.name not in told[member]]:
                raise ReformError(f"group {record.desc} {record.name}: rank {missing[0]} has destroyed it, others not")
        decisions = {record.name: decide([told[member][record.name] for member in record.ranks]) for record in mine}
        for name, decision in decisions.items():
            store.set(f"how/{name}", pack_decision(decision))
        names = [record.name for record in records if record.name not in decisions]
        decisions |= zip(names, map(unpack_decision, self._get(store, [f"how/{name}" for name in names])), strict=True)
        return decisions

    def _get(self, store: Any, keys: list[str]) -> list[bytes]:
        store.set_timeout(timedelta(seconds=self._left()))
        return list(store.multi_get(keys)) if keys else []

    def _word(self, record: GroupRecord, established: AbstractSet[int], stores: Collection[int]) -> Word:
        keeping = self._quiet.against(record, established)
        operations = self._quiet.operations(record) if not keeping else -1
        handle, reconfiguring = "", self._against_reconfiguring(record, stores)
        if not reconfiguring:
            handle = reconfigure.handle(backend_of(record, "gloo"))
        return Word(record.made, record.connected, operations, keeping, reconfiguring, handle)

    def _against_reconfiguring(self, record: GroupRecord, stores: Collection[int]) -> str:
        if not self.plan.reconfigures:
            return NOT_USED
        if not record.real:
            return "spare"
        if list(record.backend_of_device.values()) != ["gloo"] * len(record.backend_of_device):
            return "not Gloo alone"
        if record.spoilt:
            return "spoilt"
        if pointee(reconfigure.store_of(record.group)) not in stores:
            return "store gone"
        if self._quiet.busy(record):
            return "busy"  # its pool threads may stay blocked until the operation time-out, and it has no others
        return ""

    def _stores_that_answer(self) -> set[int]:
        """Addresses of the connections that this rank's groups meet through and that lead to this epoch's server."""
        occupied = {pointee(store) for store in self.plan.occupied}
        answering: set[int] = set()
        for record in self.plan.records:
            base = reconfigure.store_of(record.group)
            if not record.real or pointee(base) in answering | occupied:
                continue
            if reconfigure.same_server(base, reconfigure.base_store(self.client)):
                try:
                    base.add("deadpool/answering", 0)
                except RuntimeError:
                    continue
                answering.add(pointee(base))
        return answering

    def occupied(self) -> list[Any]:
        """Connections to the store that this thread may be blocked in."""
        if not self.is_alive():
            return []
        return [reconfigure.base_store(each) for each in (self.client, self._meeting) if each is not None]

    def _replacement(self, record: GroupRecord, store: Any, devices: list[Any]) -> Replacement:
        kinds = record.backend_of_device
        prefix = c10d.PrefixStore(f"{record.name}/", store)
        backends: list[tuple[list[str], Any, Any]] = []
        for kind in dict.fromkeys(kinds.values()):
            on = [device for device, name in kinds.items() if name == kind]
            backends.append((on, *self._build(record, kind, c10d.PrefixStore(f"{on[0]}/", prefix), devices)))
        default = "NCCL" if "nccl" in kinds.values() else "GLOO"
        return Replacement(backends, prefix, getattr(c10d.ProcessGroup.BackendType, default))

    def _build(self, record: GroupRecord, kind: str, store: Any, devices: list[Any]) -> tuple[Any, Any]:
        group_rank = record.ranks.index(self.plan.rank)
        types = c10d.ProcessGroup.BackendType
        if kind == "gloo":
            return types.GLOO, gloo.build(
                record, store, group_rank, devices, self._left(), self.plan.operation_timeout_s
            )
        if kind == "nccl":
            device = record.bound_device
            if device is None and self.plan.cuda_device is not None:
                device = torch.device("cuda", self.plan.cuda_device)
            if device is not None:
                torch.cuda.set_device(device)
            return types.NCCL, nccl.build(record, store, group_rank, device)
        raise ReformError(
            f"group {record.desc} {record.name}: backend {kind!r} cannot be re-formed (gloo and nccl can)"
        )
