"""What a parked spare can have warm, so that taking over a coordinate costs only what depends on the coordinate."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
from torch.distributed import Store

from deadpool_megatron import comm, emulation
from deadpool_megatron.megatron.host import Host
from deadpool_megatron.vault import numa_node_of_device, numa_node_of_process

_KEY = "deadpool/job"
_PACKAGES = ("megatron", "torch", "transformer_engine", "apex", "numpy")
# Variables of the device, its kernels and communication: what a spare needs before its script sets all of them.
_DEVICE = (
    *("CUBLAS", "CUDA_", "CUDNN_", "FI_", "GLOO_", "KMP_", "MKL_", "NCCL_", "NVSHMEM_", "NVTE_", "OFI_", "OMP_"),
    *("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "UCX_"),
)
_SECRET = ("CREDENTIAL", "KEY", "PASS", "SECRET", "TOKEN")
_PARKED = timedelta(days=365)
_LOOK_S, _AGAIN_S = 5.0, 1.0  # between looks whether it is still there; until another try


def warm_up(script: str, host: Host) -> None:
    """Import what the script imports, bring up the device, and run once what is slow the first time."""
    _import_all(script)
    _bring_up(host)


class WarmUp:
    """That of a parked spare, with the environment of those that train.

    Where their loop sets variables before it brings up the device (`Host.brings_environment`), this one's device, with
    its allocator and NCCL, comes up when they are known and set: they are read then, and not again.

    Args:
        device: it may hold memory of its device; else the script brings that up when it takes over.
    """

    def __init__(self, script: str, host: Host, device: bool = True) -> None:
        self._script, self._host, self._device = script, host, device
        self._one_at_a_time = threading.Lock()  # imports of two threads could meet half-way
        self._taking_over = False

    def begin(self) -> None:
        """All that may be warm at once."""
        with self._one_at_a_time:
            _import_all(self._script)
            if not self._host.brings_environment:
                _bring_up(self._host, self._device)

    def learn(self, environment: Mapping[str, str]) -> bool:
        """What the loop of those that train has set; whether the device came up for it. From another thread."""
        with self._one_at_a_time:
            if self._taking_over or not self._host.brings_environment:
                return False
            for name, value in environment.items():
                os.environ.setdefault(name, value)  # as the loop does: what the launcher says comes first
            _bring_up(self._host, self._device)
            return True

    def end(self) -> None:
        """The take-over begins, once what is under way is done; the script does the rest in its own order."""
        with self._one_at_a_time:
            self._taking_over = True


def _import_all(script: str) -> None:
    _import_each(_imports_of(script))


def _import_each(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # the script may import it only under a condition
            importlib.import_module(name)


def _bring_up(host: Host, device: bool = True) -> None:
    """The device, NCCL with its first communicator, the optimizer's lazy import of torch._dynamo (3 s), a first
    backward pass, and what the host knows of."""
    device = device and torch.cuda.is_available()
    if device:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if torch.distributed.is_nccl_available() and not emulation.is_installed():
            comm.warm_up(torch.device("cuda", torch.cuda.current_device()))
    weight = torch.nn.Parameter(torch.zeros(8, 8, device="cuda" if device else "cpu"))
    optimizer = torch.optim.AdamW([weight])
    (weight @ weight).sum().backward()
    optimizer.step()
    host.warm_up()


def _imports_of(script: str) -> list[str]:
    """Modules the script imports at its top level."""
    names: list[str] = []
    for node in ast.parse(Path(script).read_bytes()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return names


def numa_node() -> int:
    """The NUMA node of this rank's device, once that is up, or of the processors this process is bound to; -1 when
    neither says one."""
    if torch.cuda.is_initialized() and not emulation.is_installed():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        at = [int(getattr(device, name, -1)) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
        node = numa_node_of_device(f"{at[0]:04x}:{at[1]:02x}:{at[2]:02x}.0") if min(at) >= 0 else -1
        if node >= 0:
            return node
    return numa_node_of_process()


class RunningJob(msgspec.Struct, frozen=True):
    """What spares are told of the job.

    Attributes:
        groups: the digest of the table of groups that its workers have made.
        begun: when it began, as `Host.begun`.
        environment: the variables that its loop has set; spares are told those of the device.
        modules: what a worker that trains has imported by now.
    """

    groups: str
    begun: float
    environment: dict[str, str]
    modules: list[str] = []


def _for_all_to_read(job: RunningJob) -> RunningJob:
    """What the rendezvous store may have of it, whoever writes there: anybody may read it, and write.

    A recipe's variables may be secrets (W&B's, Hugging Face's key). The script sets them itself when it takes over.
    """
    environment = {
        name: value
        for name, value in job.environment.items()
        if name.startswith(_DEVICE) and not any(word in name for word in _SECRET)
    }
    return msgspec.structs.replace(job, environment=environment, modules=list(filter(_is_packages, job.modules)))


def _is_packages(module: str) -> bool:
    return module.split(".")[0] in _PACKAGES


def _imported() -> list[str]:
    """Names of modules. A spare's other thread may still import some (`follow_job`): a copy is made in one step."""
    return sorted(name for name, module in sys.modules.copy().items() if module is not None)


def publish_job(store: Callable[[], Store], job: RunningJob) -> None:
    """Tell the spares of the job, and which modules this process has imported.

    A thread keeps it told, since the store forgets it when it is started again. ``store`` makes a client of its own.
    """
    text = msgspec.json.encode(_for_all_to_read(msgspec.structs.replace(job, modules=_imported()))).decode()

    def work() -> None:
        client: Store | None = None
        while True:
            with contextlib.suppress(RuntimeError):  # the server is away, or has moved
                if client is not None and client.check([_KEY]):
                    time.sleep(_LOOK_S)
                    continue
            with contextlib.suppress(RuntimeError):
                client = store()
                client.set(_KEY, text)
            time.sleep(_AGAIN_S)

    threading.Thread(target=work, name="deadpool-publish", daemon=True).start()


def follow_job(store: Callable[[], Store], learn: Callable[[RunningJob], None]) -> threading.Thread:
    """Import what the others have imported, in a thread, once it is known; ``learn`` is told before.

    ``store`` makes a client of its own.
    """

    def work() -> None:
        while True:
            with contextlib.suppress(RuntimeError):  # the server is away, or has moved
                job = _running_job(store(), _PARKED)
                break
            time.sleep(_AGAIN_S)
        learn(job)
        _import_modules(job)

    thread = threading.Thread(target=work, name="deadpool-warm", daemon=True)
    thread.start()
    return thread


def import_packages(script: str) -> None:
    """Import what the script imports at its top level of Megatron, torch and their kernels. Of its user's modules
    nothing: they may keep names that the hooks replace, or read what the environment says of a coordinate."""
    _import_each(filter(_is_packages, _imports_of(script)))


def import_what_trains(store: Store) -> None:
    """Import what workers that train have imported of these packages. Raises RuntimeError when the store does not tell
    in its time."""
    _import_modules(_running_job(store, store.timeout))


def _running_job(store: Store, within: timedelta) -> RunningJob:
    store.wait([_KEY], within)
    return _for_all_to_read(msgspec.json.decode(store.get(_KEY), type=RunningJob))


def _import_modules(job: RunningJob) -> None:
    for name in job.modules:
        if name not in sys.modules:
            # A module may refuse here what it accepted there (another platform, an option): then it stays cold.
            with contextlib.suppress(ImportError, RuntimeError, AttributeError):
                importlib.import_module(name)
