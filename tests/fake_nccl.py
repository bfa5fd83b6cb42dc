"""ProcessGroupNCCL for tests without a GPU: on the CPU, but with NCCL's manners around a failure.

What torch's ProcessGroupNCCL.cpp and NCCLUtils.cpp, and NCCL's init.cc and prims_simple.h say, and what is done here:

* the communicator is made at the first use, and that waits for all members (`Manners.connecting`);
* so is what the first message between two members goes over, and that waits for both (`Manners.met`);
* an operation is only queued; the host waits for its numbers elsewhere (`synchronize`, for ``.item()`` on a device);
* ``abort()`` frees whoever waits for a peer at once, and goes on for seconds (`Manners.slow`): it drains kernels;
* what was under way when it came returns without an error, with garbage (NaN); what begins later raises;
* an abort does not see a communicator that is just being made: with ``config.blocking`` 1 there is no handle yet, else
  the thread that waits for it holds the lock (`NCCLComm::getNcclComm`). Nor does it free who waits for a peer's first
  message: that goes on asking a communicator that is gone (`NCCLComm::getAsyncError`).

Values travel over the store. `install` in a worker process, before any process group is made.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from deadpool_megatron.comm.inplace import bindings, c10d

LOOK_S = 0.001
Take = Callable[[torch.Tensor], torch.Tensor]  # what becomes of the rows that have come
_OPERATIONS = (
    "allreduce",
    "all_to_all_single",
    "alltoall_base",
    "send",
    "recv",
    "_start_coalescing",
    "_end_coalescing",
)


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
    met: list[str] = field(default_factory=list)
    """First messages that were begun: "group, in batches or alone, the two members"."""
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
    awaited: ClassVar[int] = 0  # threads that wait for them
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
        self._messages: Counter[str] = Counter()
        self._block: list[tuple[str, torch.Tensor, int]] | None = None  # what a batch has so far
        self._met: set[str] = set()
        self._stream: queue.SimpleQueue[tuple[list[str], torch.Tensor, Take]] = queue.SimpleQueue()
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
        self._connect()
        self._count += 1
        (tensor,) = tensors
        key = f"op/{self._count}"
        self._put(f"{key}/{self._rank}", tensor)
        self._queue([f"{key}/{rank}" for rank in range(self._size)], tensor, lambda rows: rows.sum(0))
        # As in ProcessGroupNCCL::collective: an operation that is not asynchronous gives no Work to wait for.
        return self._work(options) if options is not None and options.asyncOp else None

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Any, input_sizes: Any, options: Any = None
    ) -> Any:
        """Queue an all-to-all; its first one connects all members. Without sizes it is refused as torch does it."""
        if not output_sizes or not input_sizes:
            raise RuntimeError("NCCL Error 7: NCCL operation in progress")
        self._connect()
        self._count += 1
        for peer in range(self._size):
            self._meet("batched", peer)
        for peer, part in enumerate(input.split(list(input_sizes))):
            self._put(f"all/{self._count}/{self._rank}>{peer}", part)
        keys = [f"all/{self._count}/{peer}>{self._rank}" for peer in range(self._size)]
        self._queue(keys, output, torch.flatten)
        return self._work(options) if options is not None and options.asyncOp else None

    alltoall_base = all_to_all_single

    @property
    def supports_coalescing(self) -> bool:
        return True

    def _start_coalescing(self, device: Any = None) -> None:
        self._block = []

    def _end_coalescing(self, device: Any = None) -> Any:
        block, self._block = self._block or [], None
        self._connect()
        for _, _, peer in block:
            self._meet("batched", peer)
        for kind, tensor, peer in block:
            self._message(kind, "batched", tensor, peer)
        return self._work()

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        return self._one("send", tensors, peer)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        return self._one("recv", tensors, peer)

    def _one(self, kind: str, tensors: list[torch.Tensor], peer: int) -> Any:
        if self._block is not None:
            self._block.append((kind, tensors[0], peer))
            return None
        self._meet("alone", peer)
        self._message(kind, "alone", tensors[0], peer)
        return self._work()

    def _message(self, kind: str, how: str, tensor: torch.Tensor, peer: int) -> None:
        way = f"{how}/{self._rank}>{peer}" if kind == "send" else f"{how}/{peer}>{self._rank}"
        self._messages[way] += 1
        if kind == "send":
            self._put(f"{way}/{self._messages[way]}", tensor)
        else:
            self._queue([f"{way}/{self._messages[way]}"], tensor, lambda rows: rows[0])

    def _meet(self, how: str, peer: int) -> None:
        """The first message between two, in a batch or alone, waits for both: deaf to `abort`."""
        self._look()
        low, high = sorted((self._rank, peer))
        pair = f"{how} {low} {high}"
        if low == high or pair in self._met:
            return
        self._met.add(pair)
        self.manners.met.append(f"{self.group} {pair}")
        self._until_here(f"meet/{pair}", [low, high])

    def _work(self, options: Any = None) -> Any:
        return super().allreduce([torch.zeros(1)], *filter(None, [options]))

    def _look(self) -> None:
        if self._ended.is_set():
            raise dist.DistBackendError(f"NCCL communicator was aborted on rank {self._rank}.")

    def _put(self, key: str, tensor: torch.Tensor) -> None:
        self._store.set(key, ",".join(map(repr, tensor.double().flatten().tolist())))

    def _queue(self, keys: list[str], tensor: torch.Tensor, take: Take) -> None:
        with self._queued:
            FakeNccl.at_work += 1
        self._stream.put((keys, tensor, take))

    def _run(self) -> None:
        while True:
            keys, tensor, take = self._stream.get()
            if self._wait_for(keys):
                rows = [[float(x) for x in self._store.get(each).decode().split(",")] for each in keys]
                tensor.copy_(take(torch.tensor(rows, dtype=torch.float64)).reshape(tensor.shape))
            else:
                tensor.fill_(float("nan"))
            with self._queued:
                FakeNccl.at_work -= 1
                self._queued.notify_all()

    @classmethod
    def synchronize(cls) -> None:
        """The host waits for the device, as for ``.item()``."""
        with cls._queued:
            cls.awaited += 1
            cls._queued.wait_for(lambda: not cls.at_work)
            cls.awaited -= 1

    def _get_sequence_number_for_group(self) -> int:
        return self._count

    def _connect(self) -> None:
        self._look()
        if self._ready:
            return
        self.manners.connecting.append(self.group)
        while self.group in self.manners.stuck:
            threading.Event().wait(LOOK_S)
        self._until_here("connect", list(range(self._size)))
        self._ready = True
        self.manners.blocking.append(int(self._options.config.blocking))
        self.manners.connected.append(self.group)

    def _until_here(self, place: str, members: list[int]) -> None:
        """Until all of them have come; deaf to `abort`."""
        self._store.set(f"{place}/{self._rank}", b"1")
        while not self._store.check([f"{place}/{rank}" for rank in members]):
            threading.Event().wait(LOOK_S)

    def _wait_for(self, keys: list[str]) -> bool:
        while not self._store.check(keys):
            if self._ended.wait(LOOK_S):
                return False
        return not self._ended.is_set()


def install() -> Manners:
    """``backend="nccl"`` gives groups of this kind in this process from now on, for tensors on the CPU."""
    c10d.ProcessGroupNCCL = bindings.ProcessGroupNCCL = FakeNccl
    dist.Backend.backend_capability["nccl"] = ["cpu"]
    for name in _OPERATIONS:
        if native := getattr(bindings.ProcessGroup, name, None):
            setattr(bindings.ProcessGroup, name, _ours_first(native, name))
    FakeNccl.manners = Manners()
    return FakeNccl.manners


def _ours_first(native: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(native)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend = self._get_backend(torch.device("cpu"))
        ours = getattr(backend, name) if isinstance(backend, FakeNccl) else functools.partial(native, self)
        return ours(*args, **kwargs)

    return operation
