"""Building the backends of a new epoch, away from the training thread so that nothing can hold that for long."""

import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm import gloo, nccl
from deadpool_megatron.comm.connections import GlooConnections
from deadpool_megatron.comm.inplace import Replacement, c10d
from deadpool_megatron.comm.reports import ReformError
from deadpool_megatron.comm.table import GroupRecord


@dataclass(frozen=True, slots=True)
class FormingPlan:
    """What to form: the groups of this rank in table order, and the rules."""

    epoch: int
    rank: int
    records: list[GroupRecord]
    digest: str
    deadline: float
    """On time.monotonic."""
    operation_timeout_s: float


def own_client(store: Any) -> Any:
    """Another connection to the same server. Takes a millisecond, or seconds: TCPStore looks up names for each new
    connection, and a lost packet to the name server costs its time-out (5 s seen)."""
    try:
        return store.clone()
    except (NotImplementedError, AttributeError, RuntimeError):
        return store  # stores without connections (HashStore) have no clone


class Forming(threading.Thread):
    """Forms one epoch. The training thread waits on `settled`; when an abort comes it just leaves this thread behind.

    An abandoned thread harms nobody: what it builds is under its own epoch's keys and dropped with it, it has its
    own connection to the store (a TCPStore client whose wait is blocked blocks all its users), and it ends at the
    deadline at the latest.
    """

    def __init__(self, plan: FormingPlan, store: Any, client: Any, connections: GlooConnections) -> None:
        """`client`: a connection to the store's server that is used by nobody else, or None to make one."""
        super().__init__(name=f"deadpool-forming-{plan.epoch}", daemon=True)
        self.settled = threading.Event()
        self.abandoned = False
        self.error: BaseException | None = None
        self.formed: list[tuple[GroupRecord, Replacement]] = []
        self.slowest: tuple[float, str] = (0.0, "")
        self._plan = plan
        self._store = store
        self.client = client
        self._connections = connections
        self._cuda_device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run(self) -> None:
        try:
            self._form()
        except Exception as error:  # noqa: BLE001 - thread boundary: handed to the training thread, whatever it is
            self.error = error
        finally:
            self.settled.set()

    def _left(self) -> float:
        left = self._plan.deadline - time.monotonic()
        if left <= 0 or self.abandoned:
            raise ReformError(f"epoch {self._plan.epoch}: deadline passed while forming")
        return left

    def _form(self) -> None:
        plan = self._plan
        client = self.client = self.client or own_client(self._store)
        usual_timeout = client.timeout
        client.set_timeout(timedelta(seconds=self._left()))
        store = c10d.PrefixStore(f"deadpool/epoch/{plan.epoch}", client)
        agreed = store.compare_set("table", "", plan.digest).decode()
        if agreed != plan.digest:
            raise ReformError(
                f"epoch {plan.epoch}: this rank ({plan.rank}) made other process groups than its peers (table digest "
                f"{plan.digest}, theirs {agreed}); start all ranks with the same flags"
            )
        devices: list[Any] = []
        for record in plan.records:
            begun = time.monotonic()
            kinds = record.backend_of_device
            if "gloo" in kinds.values() and not devices:
                devices = gloo.create_devices(self._connections)
            prefix = c10d.PrefixStore(f"{record.name}/", store)
            backends: list[tuple[list[str], Any, Any]] = []
            for kind in dict.fromkeys(kinds.values()):
                on = [device for device, name in kinds.items() if name == kind]
                backends.append((on, *self._build(record, kind, c10d.PrefixStore(f"{on[0]}/", prefix), devices)))
            default = "NCCL" if "nccl" in kinds.values() else "GLOO"
            default_type = getattr(c10d.ProcessGroup.BackendType, default)
            self.formed.append((record, Replacement(backends, prefix, default_type)))
            self.slowest = max(self.slowest, (time.monotonic() - begun, f"{record.desc} {record.name}"))
        client.set_timeout(usual_timeout)

    def _build(self, record: GroupRecord, kind: str, store: Any, devices: list[Any]) -> tuple[Any, Any]:
        group_rank = record.ranks.index(self._plan.rank)
        types = c10d.ProcessGroup.BackendType
        if kind == "gloo":
            return types.GLOO, gloo.build(
                record, store, group_rank, devices, self._left(), self._plan.operation_timeout_s
            )
        if kind == "nccl":
            device = record.bound_device
            if device is None and self._cuda_device is not None:
                device = torch.device("cuda", self._cuda_device)
            if device is not None:
                torch.cuda.set_device(device)
            return types.NCCL, nccl.build(record, store, group_rank, device)
        raise ReformError(
            f"group {record.desc} {record.name}: backend {kind!r} cannot be re-formed (gloo and nccl can)"
        )
