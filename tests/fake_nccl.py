"""ProcessGroupNCCL for tests without a GPU: on the CPU, but with NCCL's manners around a failure.

What torch's ProcessGroupNCCL.cpp and NCCLUtils.cpp, and NCCL's init.cc and prims_simple.h say, and what is done here:

* the communicator is made at the first use, and that waits for all members (`Manners.connecting`);
* an operation is only queued; the host waits for its numbers elsewhere (`synchronize`, for ``.item()`` on a device);
* ``abort()`` frees whoever waits for a peer at once, and goes on for seconds (`Manners.slow`): it drains kernels;
* what was under way when it came returns without an error, with garbage (NaN); what begins later raises;
* an abort does not see a communicator that is just being made: with ``config.blocking`` 1 there is no handle yet, else
  the thread that waits for it holds the lock (`NCCLComm::getNcclComm`).

Values travel over the store. `install` in a worker process, before any process group is made.
"""

from __future__ import annotations

import functools
import queue
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from deadpool_megatron.comm.inplace import bindings, c10d

LOOK_S = 0.001
FOR_EVER = timedelta(days=1)


@dataclass
class Manners:
    """How all communicators of this process behave from now on, and what happened in them."""

    slow: threading.Event | None = None
    """An abort returns only when it is set."""
    stuck: set[str] = field(default_factory=set)
    """Names of groups in whose communicator this rank does not take part, until it is taken out of here."""
    connecting: list[str] = field(default_factory=list)
    """Names of groups whose communicator began to be made, in order."""
    connected: list[str] = field(default_factory=list)
    eager: list[str] = field(default_factory=list)
    """Those made by ``eager_connect_single_device``."""
    blocking: list[int] = field(default_factory=list)
    """``config.blocking`` of each that was made."""
    aborted: list[str] = field(default_factory=list)


class FakeNccl(bindings.ProcessGroupGloo):  # type: ignore[misc]
    """One group's backend. The Gloo backend under it has one rank and does nothing."""

    Options = bindings.ProcessGroupNCCL.Options
    manners: ClassVar[Manners] = Manners()
    _queued: ClassVar[threading.Condition] = threading.Condition()
    at_work: ClassVar[int] = 0  # operations that are queued or under way
    _alive: ClassVar[list[FakeNccl]] = []  # pybind knows a Python object only as long as somebody holds it

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        gloo = bindings.ProcessGroupGloo._Options()
        gloo._devices = [bindings.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo._threads = 1
        super().__init__(bindings.HashStore(), 0, 1, gloo)
        self._store, self._rank, self._size, self._options = store, rank, size, options
        self._ended = threading.Event()
        self._ready = False
        self._count = 0
        self._stream: queue.SimpleQueue[tuple[str, torch.Tensor]] = queue.SimpleQueue()
        self._alive.append(self)
        threading.Thread(target=self._run, name="fake-nccl-stream", daemon=True).start()

    @property
    def options(self) -> Any:
        return self._options

    @property
    def group(self) -> str:
        """torch's name of the group that it is made for."""
        return str(self._options.group_name)

    def _set_sequence_number_for_group(self) -> None: ...

    def _is_initialized(self) -> bool:
        return self._ready

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.manners.eager.append(self.group)
        self._connect()

    def abort(self) -> None:
        self._ended.set()
        self.manners.aborted.append(self.group)
        if self.manners.slow is not None:
            self.manners.slow.wait()

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> Any:
        """Queue a sum; no error comes of an abort later, only numbers that are none."""
        if self._ended.is_set():
            raise dist.DistBackendError(f"NCCL communicator was aborted on rank {self._rank}.")
        self._connect()
        self._count += 1
        (tensor,) = tensors
        key = f"op/{self._count}"
        self._store.set(f"{key}/{self._rank}", ",".join(map(repr, tensor.double().flatten().tolist())))
        with self._queued:
            FakeNccl.at_work += 1
        self._stream.put((key, tensor))
        # As in ProcessGroupNCCL::collective: an operation that is not asynchronous gives no Work to wait for.
        asynchronous = options is not None and options.asyncOp
        return super().allreduce([torch.zeros(1)], options) if asynchronous else None

    def _run(self) -> None:
        while True:
            key, tensor = self._stream.get()
            keys = [f"{key}/{rank}" for rank in range(self._size)]
            if self._wait_for(keys):
                rows = [[float(x) for x in self._store.get(each).decode().split(",")] for each in keys]
                tensor.copy_(torch.tensor(rows, dtype=torch.float64).sum(0).reshape(tensor.shape))
            else:
                tensor.fill_(float("nan"))
            with self._queued:
                FakeNccl.at_work -= 1
                self._queued.notify_all()

    @classmethod
    def synchronize(cls) -> None:
        """The host waits for the device, as for ``.item()``."""
        with cls._queued:
            cls._queued.wait_for(lambda: not cls.at_work)

    def _get_sequence_number_for_group(self) -> int:
        return self._count

    def _connect(self) -> None:
        if self._ready:
            return
        self.manners.connecting.append(self.group)
        never = threading.Event()  # deaf to `abort`
        while self.group in self.manners.stuck:
            never.wait(LOOK_S)
        self._store.set(f"connect/{self._rank}", b"1")
        keys = [f"connect/{rank}" for rank in range(self._size)]
        while not self._store.check(keys):
            never.wait(LOOK_S)
        self._ready = True
        self.manners.blocking.append(int(self._options.config.blocking))
        self.manners.connected.append(self.group)

    def _wait_for(self, keys: list[str]) -> bool:
        while not self._store.check(keys):
            if self._ended.wait(LOOK_S):
                return False
        return not self._ended.is_set()


def install() -> Manners:
    """``backend="nccl"`` gives groups of this kind in this process from now on, for tensors on the CPU."""
    c10d.ProcessGroupNCCL = bindings.ProcessGroupNCCL = FakeNccl
    dist.Backend.backend_capability["nccl"] = ["cpu"]
    native = bindings.ProcessGroup.allreduce

    @functools.wraps(native)
    def allreduce(self: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        backend = self._get_backend(torch.device("cpu"))
        if isinstance(backend, FakeNccl):
            return backend.allreduce(tensors, *args, **kwargs)
        return native(self, tensors, *args, **kwargs)

    bindings.ProcessGroup.allreduce = allreduce
    FakeNccl.manners = Manners()
    return FakeNccl.manners
