"""Building the backends of a new epoch, away from the training thread so that nothing can hold that for long."""

import threading
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm import gloo, nccl
from deadpool_megatron.comm.connections import GlooConnections, GlooDevice
from deadpool_megatron.comm.inplace import Replacement, c10d
from deadpool_megatron.comm.methods import Word, against_keeping, pack_words, unpack_words
from deadpool_megatron.comm.quiet import Quiet
from deadpool_megatron.comm.reports import ReformError
from deadpool_megatron.comm.table import GroupRecord


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
        self.error: BaseException | None = None
        self.formed: list[tuple[GroupRecord, Replacement]] = []
        """Groups with new backends, yet to be moved in."""
        self.connections: dict[str, frozenset[int]] = {}
        """New connections, by name of the group."""
        self.devices: frozenset[GlooDevice] = frozenset()
        """The Gloo devices of the new backends."""
        self.why: dict[str, str] = {}
        """What stood against keeping each group, by its name; empty for those that are kept."""
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
        self.why = self._agree(store)
        ended = [record for record in plan.records if self.why[record.name]]
        # Those that were left alone so far. Only these: an abandoned thread must not end what a later epoch made.
        self._connections.shutdown_only(frozenset().union(*(record.connections for record in ended)))
        devices: list[Any] = []  # torch's, for self.devices
        seen: set[tuple[int, int]] = set()  # connections on them
        for record in ended:
            begun = time.monotonic()
            if not devices and "gloo" in record.backend_of_device.values():
                devices, self.devices = gloo.create_devices(self._connections)
            self.formed.append((record, self._replacement(record, store, devices)))
            self.connections[record.name] = frozenset(self._connections.fresh(self.devices, seen))
            self.slowest = max(self.slowest, (time.monotonic() - begun, f"{record.desc} {record.name}"))
        client.set_timeout(usual_timeout)

    def _agree(self, store: Any) -> dict[str, str]:
        """What stands against keeping each group of this rank, the same on all members. Blocks until all have come."""
        records, rank = self.plan.records, self.plan.rank
        established = self._connections.established()
        words = {record.name: self._word(record, established) for record in records}
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
        why = {record.name: against_keeping([told[member][record.name] for member in record.ranks]) for record in mine}
        for name, reason in why.items():
            store.set(f"why/{name}", reason)
        names = [record.name for record in records if record.name not in why]
        why |= zip(names, map(bytes.decode, self._get(store, [f"why/{name}" for name in names])), strict=True)
        return why

    def _get(self, store: Any, keys: list[str]) -> list[bytes]:
        store.set_timeout(timedelta(seconds=self._left()))
        return list(store.multi_get(keys)) if keys else []

    def _word(self, record: GroupRecord, established: AbstractSet[int]) -> Word:
        objection = self._quiet.against(record, established)
        return Word(record.connected, -1 if objection else self._quiet.operations(record), objection)

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
