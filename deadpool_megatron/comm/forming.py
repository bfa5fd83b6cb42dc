"""Building the backends of a new epoch, away from the training thread so that nothing can hold that for long."""

import os
import threading
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm import nccl
from deadpool_megatron.comm.calls import Calls
from deadpool_megatron.comm.connections import GlooConnections, GlooDevice
from deadpool_megatron.comm.inplace import Replacement, bindings, c10d
from deadpool_megatron.comm.methods import Messages, Verdict, Word, decode_verdict, decode_words, encode, verdict
from deadpool_megatron.comm.quiet import Quiet
from deadpool_megatron.comm.reports import ReformError
from deadpool_megatron.comm.store_clients import answers, own_client
from deadpool_megatron.comm.table import GroupRecord, backend_of

_LOOK_EVERY_S = 0.05  # whether the epoch is over, while communicators are made


@dataclass(frozen=True, slots=True)
class FormingPlan:
    """What to form: the groups of this rank in table order, and the rules."""

    epoch: int
    rank: int
    records: list[GroupRecord]
    digest: str
    begun: float  # on time.monotonic, as is the deadline
    deadline: float
    operation_timeout_s: float
    cuda_device: int | None  # the training thread's
    calls: Calls  # know how groups have been used in ways that their sequence numbers do not tell


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
        aborts: nccl.Aborts,
    ) -> None:
        """`prepared`: a store, and a connection to its server that is used by nobody else. `abort_lock` is held by an
        abort that is at work: it looks for operations to end, and must not find those of the new epoch. `aborts`: for
        communicators that come to nothing."""
        super().__init__(name=f"deadpool-forming-{plan.epoch}", daemon=True)
        self.settled = threading.Event()
        self.ended = 0.0  # when it settled, on time.monotonic
        self.abandoned = False
        self.error: BaseException | None = None
        self.formed: list[tuple[GroupRecord, Replacement]] = []  # groups with new backends, yet to be moved in
        self.connections: dict[str, frozenset[int]] = {}  # new connections, by name of the group
        self.devices: frozenset[GlooDevice] = frozenset()  # the Gloo devices of the new backends
        self.verdicts: dict[str, Verdict] = {}  # on each group, by its name
        self.slowest: tuple[float, str] = (0.0, "")
        self.plan = plan
        self.store: Any = None
        self.client: Any = None
        self._make_store = store
        self._prepared = prepared
        self._connections = connections
        self._quiet = quiet
        self._abort_lock = abort_lock
        self._aborts = aborts

    def abandon(self) -> None:
        """Leave this thread behind."""
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

    def _left(self, what: str = "deadline passed while forming") -> float:
        left = self.plan.deadline - time.monotonic()
        if left <= 0 or self.abandoned:
            raise ReformError(f"epoch {self.plan.epoch}: {what}")
        return left

    def _form(self) -> None:
        plan = self.plan
        if not self._abort_lock.acquire(timeout=self._left()):
            raise ReformError(f"epoch {plan.epoch}: an abort is at work all the time")
        self._abort_lock.release()
        store, prepared = self._make_store(), self._prepared
        self.store = store
        ready = prepared is not None and prepared[0] is store and answers(prepared[1])
        client = self.client = prepared[1] if prepared is not None and ready else own_client(store)
        usual_timeout = client.timeout
        client.set_timeout(timedelta(seconds=self._left()))
        store = c10d.PrefixStore(f"deadpool/epoch/{plan.epoch}", client)
        agreed = store.compare_set("table", "", plan.digest).decode()
        if agreed != plan.digest:
            raise ReformError(
                f"epoch {plan.epoch}: this rank ({plan.rank}) made other process groups than its peers (table digest "
                f"{plan.digest}, theirs {agreed}); start all ranks with the same flags"
            )
        self.verdicts = self._agree(store)
        ended = [record for record in plan.records if self.verdicts[record.name].why]
        # Those that were left alone so far. Only these: an abandoned thread must not end what a later epoch made.
        self._connections.shutdown_only(frozenset().union(*(record.connections for record in ended)))
        devices: list[Any] = []  # torch's, for self.devices
        seen: set[tuple[int, int]] = set()  # connections on them
        for record in ended:
            begun = time.monotonic()
            if not devices and "gloo" in record.backend_of_device.values():
                devices, self.devices = create_devices(self._connections)
            self.formed.append((record, self._replacement(record, store, devices)))
            self.connections[record.name] = frozenset(self._connections.fresh(self.devices, seen))
            self.slowest = max(self.slowest, (time.monotonic() - begun, f"{record.desc} {record.name}"))
        self._connect()
        client.set_timeout(usual_timeout)

    def _connect(self) -> None:
        """Make the NCCL communicators that were there before, and what their members were connected by to one another.

        Communicators all at once: each has the whole time to form. And not in a pool: groups overlap, and a rank that
        keeps one back keeps its peers' others waiting. Then group by group, in the order of the table: messages go on
        streams of torch's choice, and two groups may have the same one.
        """
        groups = [
            (record, backend, self._device(record, devices[0]))
            for record, new in self.formed
            if len(record.ranks) > 1
            for devices, kind, backend in new.backends
            if kind == c10d.ProcessGroup.BackendType.NCCL
        ]
        connecting = [nccl.Connecting(*group) for group in groups if self.verdicts[group[0].name].used]
        exchanging = [exchange for group in groups if (exchange := self._exchange(*group)) is not None]
        try:
            for each in connecting:
                each.start()
            for each in connecting:
                self._until_over(each)
            for exchange in exchanging:
                exchange.start()
                self._until_over(exchange)
        except BaseException:
            self._aborts.start([backend for _, backend, _ in groups])
            raise

    def _exchange(self, record: GroupRecord, backend: Any, device: torch.device) -> nccl.Exchanging | None:
        """What makes the connections between members of a group, if there were any."""
        me = record.ranks.index(self.plan.rank)
        batched, alone = self.verdicts[record.name].peers(me, len(record.ranks), self._messages(record))
        return nccl.Exchanging(record, backend, device, me, batched, alone) if batched or alone else None

    def _until_over(self, each: nccl.FirstUse) -> None:
        name = f"{each.record.desc} {each.record.name}"
        while each.is_alive():
            each.join(min(_LOOK_EVERY_S, self._left(f"not all members of group {name} came")))
        if each.error is not None:
            raise ReformError(f"group {name}: {each.error}") from each.error
        self.slowest = max(self.slowest, (each.seconds, name))

    def _device(self, record: GroupRecord, kind: str) -> torch.device:
        if record.bound_device is not None or self.plan.cuda_device is None:
            return record.bound_device or torch.device(kind)
        return torch.device(kind, self.plan.cuda_device)

    def _agree(self, store: Any) -> dict[str, Verdict]:
        """The verdict on each group of this rank, the same on all members. Blocks until all have come."""
        records, rank = self.plan.records, self.plan.rank
        established = self._connections.established()
        words = {record.name: self._word(record, established) for record in records}
        store.set(f"words/{rank}", encode(words).decode())
        mine = [record for record in records if record.ranks[0] == rank]
        if others := sorted({member for record in mine for member in record.ranks} - {rank}):
            told = dict(zip(others, map(decode_words, self._get(store, [f"words/{r}" for r in others])), strict=True))
        else:
            told = {}
        told[rank] = words
        for record in mine:
            if missing := [member for member in record.ranks if record.name not in told[member]]:
                raise ReformError(f"group {record.desc} {record.name}: rank {missing[0]} has destroyed it, others not")
        verdicts = {record.name: verdict([told[member][record.name] for member in record.ranks]) for record in mine}
        for name, given in verdicts.items():
            store.set(f"verdict/{name}", encode(given).decode())
        names = [record.name for record in records if record.name not in verdicts]
        verdicts |= zip(
            names, map(decode_verdict, self._get(store, [f"verdict/{name}" for name in names])), strict=True
        )
        return verdicts

    def _get(self, store: Any, keys: list[str]) -> list[bytes]:
        store.set_timeout(timedelta(seconds=self._left()))
        return list(store.multi_get(keys)) if keys else []

    def _word(self, record: GroupRecord, established: AbstractSet[int]) -> Word:
        objection = self._quiet.against(record, established)
        operations = -1 if objection else self._quiet.operations(record)
        return Word(record.connected, operations, objection, self._used(record), self._messages(record))

    def _messages(self, record: GroupRecord) -> Messages:
        return self.plan.calls.messages(record.group) if record.real else Messages()

    def _used(self, record: GroupRecord) -> bool:
        """Its communicator was made by NCCL. Asks torch for what it reads without a lock: an abort may hold those."""
        if not record.real or "nccl" not in record.backend_of_device.values():
            return False
        if record.bound_device is not None:
            return True  # torch makes that one with the group
        collectives = backend_of(record, "nccl")._get_sequence_number_for_group()
        return collectives > 0 or id(record.group) in self.plan.calls.batched

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
            return types.GLOO, build_gloo(
                record, store, group_rank, devices, self._left(), self.plan.operation_timeout_s
            )
        if kind == "nccl":
            if self.plan.cuda_device is not None:
                torch.cuda.set_device(self._device(record, "cuda"))
            return types.NCCL, nccl.build(record, store, group_rank)
        raise ReformError(
            f"group {record.desc} {record.name}: backend {kind!r} cannot be re-formed (gloo and nccl can)"
        )


def create_devices(connections: GlooConnections) -> tuple[list[Any], frozenset[GlooDevice]]:
    """Gloo devices as torch itself would choose them (GLOO_SOCKET_IFNAME, else the address of the host name), and what
    they are to `connections`."""
    gloo = bindings.ProcessGroupGloo
    with connections.watching() as fresh:
        if names := os.environ.get("GLOO_SOCKET_IFNAME"):
            devices = [gloo.create_device(interface=name) for name in names.split(",") if name]
        else:
            devices = [gloo.create_default_device()]
    return devices, frozenset(fresh)


def build_gloo(
    record: GroupRecord, store: Any, rank: int, devices: list[Any], form_timeout_s: float, operation_timeout_s: float
) -> Any:
    """A connected ProcessGroupGloo of this group. Blocks until all members have come, `form_timeout_s` at most.

    Raises RuntimeError (torch's) on time-out or when a member is lost while connecting.
    """
    gloo = bindings.ProcessGroupGloo
    options = gloo._Options()
    options._devices = devices
    options._timeout = timedelta(seconds=form_timeout_s)
    backend = gloo(store, rank, len(record.ranks), options)
    set_operation_timeout(backend, operation_timeout_s)
    backend.options.global_ranks_in_group = list(record.ranks)
    backend.options.group_name = record.name
    backend._set_sequence_number_for_group()
    return backend


def set_operation_timeout(backend: Any, seconds: float) -> None:
    """Time-out of each later operation: the floor under everything that abort cannot free."""
    backend._set_default_timeout(timedelta(seconds=seconds))
