"""NCCL backends: abort from another thread, new ones with the old options. Written from torch's sources; see
docs/measurements for what of it was run on GPUs."""

import logging
import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm.inplace import bindings
from deadpool_megatron.comm.reports import CommunicatorError
from deadpool_megatron.comm.table import GroupRecord, backend_of

_log = logging.getLogger(__name__)

NCCL_ENVIRONMENT = {
    # An aborted communicator must not take the process with it: errors are handled here, not by the watchdog.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    # NCCL's guide: only a nonblocking communicator may be aborted while it does something, its initialisation included.
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",
    # No flight-recorder dump on time-out, and no minute of sleep in the watchdog to wait for one.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
    # Rings and trees are connected when the communicator is made, not when a collective first wants them: the training
    # thread would wait for peers there, deaf to an abort. It costs the memory of their buffers.
    "NCCL_RUNTIME_CONNECT": "0",
    # Re-forming with NVLS multicast objects of a dead peer is not possible.
    "NCCL_NVLS_ENABLE": "0",
}

# So long a lost peer may hold up a first use (`FirstUse`), which starts within torch's own time-out for NCCL; torch's
# own value is half an hour.
_READY_WITHIN = ("TORCH_NCCL_NONBLOCKING_TIMEOUT", "600")


def set_environment() -> None:
    """Put `NCCL_ENVIRONMENT` into this process's environment, whatever the job's script exports; the log has a line for
    what it overrides. Each NCCL group reads it when it is made."""
    for name, value in NCCL_ENVIRONMENT.items():
        before = os.environ.get(name, value)
        if before != value:
            _log.warning("%s=%s is overridden with %s: a communicator could not be aborted", name, before, value)
        os.environ[name] = value
    os.environ.setdefault(*_READY_WITHIN)


class Aborts:
    """Aborts of NCCL backends, each in a thread of its own, since serial ones can wait for one another across ranks.

    Never shutdown or destroy: those wait for peers. An abort frees kernels at once, then waits for all that was queued
    behind them and for the end of captured graphs, so it may take longer than anybody waits for it here.
    """

    def __init__(self) -> None:
        self._under_way: dict[int, threading.Thread] = {}

    def start(self, backends: list[Any]) -> list[threading.Thread]:
        """Abort these; those that are being aborted already go on. From any thread. Returns at once."""
        threads = []
        for backend in backends:
            thread = self._under_way.get(id(backend))
            if thread is None:
                thread = threading.Thread(target=self._abort, args=(backend,), name="deadpool-nccl-abort", daemon=True)
                self._under_way[id(backend)] = thread  # its argument keeps the backend alive, and the number taken
                thread.start()
            threads.append(thread)
        return threads

    def run(self, backends: list[Any], deadline: float) -> tuple[int, int]:
        """Abort these. Blocks until `deadline` (`time.monotonic`) at most. Returns (aborted, still at it)."""
        threads = self.start(backends)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in threads)
        return len(threads) - stuck, stuck

    def _abort(self, backend: Any) -> None:
        try:
            backend.abort()
        except RuntimeError as error:
            _log.warning("an NCCL communicator was not aborted: %s", error)
        finally:
            self._under_way.pop(id(backend), None)


def options_for(record: GroupRecord) -> Any:
    """Fresh ProcessGroupNCCL.Options with what the group's creator asked for: stream priority, config, time-out."""
    options = bindings.ProcessGroupNCCL.Options()
    asked = record.options
    if asked is not None:
        options.is_high_priority_stream = asked.is_high_priority_stream
        options.config = asked.config
    # Explicitly: torch writes into the options it is given (ProcessGroupNCCL::initNCCLComm), and those are copied here.
    options.config.blocking = 0
    options._timeout = record.timeout
    options.global_ranks_in_group = list(record.ranks)
    options.group_name = record.name
    return options


def check_kind(record: GroupRecord) -> None:
    """Raises CommunicatorError when what torch has made under the name of NCCL is not what can be re-formed."""
    kind = type(backend_of(record, "nccl"))
    if not issubclass(kind, bindings.ProcessGroupNCCL):
        raise CommunicatorError(
            f"group {record.desc} {record.name} has a {kind.__name__} in place of torch's ProcessGroupNCCL, which is "
            "neither aborted nor re-formed; set TORCH_DIST_USE_NCCL2=0 and unset TORCH_DISTRIBUTED_DEBUG"
        )


def build(record: GroupRecord, store: Any, rank: int) -> Any:
    """A ProcessGroupNCCL for this group, without a communicator. Blocks for nobody."""
    backend = bindings.ProcessGroupNCCL(store, rank, len(record.ranks), options_for(record))
    backend._set_sequence_number_for_group()
    if record.bound_device is not None:
        backend.bound_device_id = record.bound_device
    return backend


# Of the streams that torch hands out, 32 for each priority, round and round: communicators have those of priority 0 and
# of the highest, copies of snapshots -1. Two first uses behind one another on a stream would wait for peers where they
# are the other way round.
_PRIORITY = -2


class FirstUse(threading.Thread):
    """Does with one backend, now and away from the training thread, what waits for other members the first time.

    An abort does not free it: torch waits for a communicator that is made with the lock held that an abort needs
    (NCCLComm::getNcclComm), and for connections to a peer that are made by asking the communicator, also one that is
    gone (NCCLComm::getAsyncError). So it ends with its members, or is left behind until TORCH_NCCL_NONBLOCKING_TIMEOUT,
    in the second case with a processor kept busy.

    `seconds` is how long it took; `error` what came of it, if not what was wanted.
    """

    def __init__(self, record: GroupRecord, backend: Any, device: torch.device) -> None:
        super().__init__(name=f"deadpool-nccl-{type(self).__name__.lower()}-{record.name}", daemon=True)
        self.record, self.backend = record, backend
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._device = device

    def run(self) -> None:
        begun = time.monotonic()
        try:
            self._on_stream()
        except Exception as error:  # noqa: BLE001 - thread boundary: handed to the thread that forms
            self.error = error
        finally:
            self.seconds = time.monotonic() - begun

    def _on_stream(self) -> None:
        if self._device.type != "cuda":
            self._use()
            return
        # On a stream of its own, or the training thread's would wait for a peer that is lost meanwhile.
        stream = torch.cuda.Stream(self._device, priority=_PRIORITY)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            self._use()
            stream.synchronize()

    def _use(self) -> None:
        raise NotImplementedError


class Connecting(FirstUse):
    """Makes the communicator, with a one-element all-reduce, as a first use would.

    Not with `eager_connect_single_device`, unless the group was made so (it has a bound device): after that torch runs
    sends and receives outside of batches over the group's communicator, one after the other, where it made one for each
    pair before (ProcessGroupNCCL::pointToPoint).
    """

    def _use(self) -> None:
        if self.record.bound_device is not None:
            self.backend.eager_connect_single_device(self._device)
        options = bindings.AllreduceOptions()
        # On the current stream, and without a Work: that could not be waited for, since its epoch is yet to begin.
        options.asyncOp = False
        self.backend.allreduce([torch.zeros(1, device=self._device)], options)


class Exchanging(FirstUse):
    """Makes connections between pairs of members, by one element each way: those that all-to-alls and batches use over
    the group's communicator, and the communicators that torch makes for pairs outside of batches."""

    def __init__(
        self, record: GroupRecord, backend: Any, device: torch.device, me: int, batched: list[int], alone: list[int]
    ) -> None:
        """`me`, and the members to be connected with in a batch, and alone: ranks in the group, in order."""
        super().__init__(record, backend, device)
        self._me, self._batched, self._alone = me, batched, alone

    def _use(self) -> None:
        works = []
        if self._batched:
            self.backend._start_coalescing()
            for peer in self._batched:
                self._send(peer)
                self._receive(peer)
            works.append(self.backend._end_coalescing())
        # One pair after the other, each of its members with the same begun: all ranks agree on the order of pairs.
        for peer in self._alone:
            both = [self._send, self._receive]
            works += [each(peer) for each in (both if self._me < peer else reversed(both))]
        for work in works:
            if work is not None:
                work.synchronize()  # by the stream; a wait would see that the epoch is yet to begin

    def _send(self, peer: int) -> Any:
        return self.backend.send([torch.zeros(1, device=self._device)], peer, 0)

    def _receive(self, peer: int) -> Any:
        return self.backend.recv([torch.empty(1, device=self._device)], peer, 0)


def warm_up(device: torch.device) -> None:
    """Load NCCL, look at the machine's topology and run a first kernel, with a communicator of this rank alone. What
    goes wrong is in the log: it shows again, and matters then, when the first real communicator is made."""
    set_environment()
    alone = GroupRecord("deadpool-warm-up", (0,), "warm-up", "nccl", {"cuda": "nccl"}, timedelta(minutes=1))
    backend = build(alone, bindings.HashStore(), 0)
    connecting = Connecting(alone, backend, device)
    connecting.run()
    backend.abort()
    if connecting.error is not None:
        _log.warning("NCCL could not be warmed up: %s", connecting.error)
