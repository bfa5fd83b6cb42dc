"""`deadpool doctor`: is this machine, or this allocation, fit for a run? Each finding has the line that mends it."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import psutil

from deadpool_megatron.compat import UserError, check_version

State = Literal["ok", "warn", "fail"]
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_FILES: Final = 65536
_PROCESSES: Final = 4096
_CLOCK_S: Final = 0.5
_LOGIND_S: Final = 5.0
_LAST_SYSTEM_USER: Final = 999  # of whom logind removes nothing

# Settings of NCCL and torch that keep communicators from being aborted, or end survivors. Sources: torch
# ProcessGroupNCCL.hpp and .cpp (environment variables), NCCL's documentation of ncclCommAbort and of its variables.
# Name, what it has to be ("unset": 0 or empty will do, too), and what any other value leads to.
_FORBIDDEN: Final = (
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "torch's watchdog ends the survivors of an aborted communicator"),
    ("TORCH_NCCL_ENABLE_MONITORING", "0", "torch's monitor ends processes whose watchdog waits in an abort"),
    ("TORCH_NCCL_BLOCKING_WAIT", "unset", "a blocking wait is not left when communicators are aborted"),
    ("TORCH_NCCL_DUMP_ON_TIMEOUT", "0", "the dump of a time-out holds an abort up for a minute"),
    ("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0", "errors of an aborted communicator end the process"),
    ("NCCL_NVLS_ENABLE", "0", "NVLink SHARP buffers do not survive an abort"),
    ("NCCL_COLLNET_ENABLE", "unset", "SHARP's connections are gone with the communicator"),
    ("TORCH_GLOO_LAZY_INIT", "unset", "lazily connected Gloo groups can hang while they are re-formed"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found and, unless it is fine, the line that mends it."""

    what: str
    state: State
    found: str
    mend: str = ""


def check_environment(environ: Mapping[str, str]) -> list[Finding]:
    """Settings of NCCL, torch and Gloo that break the abort of communicators. Unset ones DeadPool sets itself."""
    out = [
        Finding(f"{name}={environ[name]}", "fail", why, f"unset {name}" if mend == "unset" else f"export {name}=0")
        for name, mend, why in _FORBIDDEN
        if name in environ and environ[name] not in (("0", "") if mend == "unset" else ("0",))
    ]
    return out or [Finding("NCCL and Gloo settings", "ok", "nothing that breaks the abort of communicators")]


def check_machine(shm_directory: str, vault_bytes: int) -> Iterator[Finding]:
    """All checks of this machine alone.

    Args:
        shm_directory: where the vaults go.
        vault_bytes: bytes this node's vault will take; 0: not known.
    """
    yield from _versions()
    yield _shared_memory(shm_directory, vault_bytes)
    yield check_logout(shm_directory, os.getuid())
    yield from _limits()
    yield _clock()
    yield _ports()
    yield _name()
    yield from _devices()
    yield from check_environment(os.environ)


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 12)
    yield Finding("Python", "ok" if fine else "fail", python, "" if fine else "install Python 3.12 or newer")
    for name, least in (("torch", (2, 11)), ("megatron-core", None)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            mend = f"pip install {name}" if least else "pip install megatron-core (or put a checkout on PYTHONPATH)"
            yield Finding(name, "fail" if least else "warn", "not installed", mend)
            continue
        if least is not None:
            numbers = tuple(int(x) for x in version.split("+")[0].split(".")[:2])
            good = numbers >= least
            mend = "" if good else f"pip install 'torch>={least[0]}.{least[1]}'"
            yield Finding(name, "ok" if good else "fail", version, mend)
            continue
        try:
            check_version(version)
        except UserError as err:
            yield Finding(name, "fail", str(err), "pip install 'megatron-core>=0.19,<0.20'")
        else:
            yield Finding(name, "ok", version)


def _gib(n: float) -> str:
    return f"{n / _GIB:.1f} GiB" if n >= _GIB else f"{n / _MIB:.0f} MiB"


def _shared_memory(directory: str, need: int) -> Finding:
    what = f"shared memory {directory}"
    if not os.access(directory, os.W_OK | os.X_OK):
        return Finding(what, "fail", "does not exist or cannot be written to", "name another with --shm-directory")
    stat = os.statvfs(directory)
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    found = f"{_gib(free)} free of {_gib(total)}"
    size = max(need + need // 8, 1) // _GIB + 1
    memory = psutil.virtual_memory().total
    if need > memory:
        wanted = f"the vault needs {_gib(need)}, and this machine has {_gib(memory)} of memory"
        return Finding(what, "fail", wanted, "use machines with more, or less --deadpool-redundancy (deadpool plan)")
    if need > free:
        return Finding(
            what, "fail", f"{found}; the vault needs {_gib(need)}", f"mount -o remount,size={size}G {directory}"
        )
    if not need and free < memory // 4:
        mend = f"mount -o remount,size={memory // 2 // _GIB}G {directory} (in a container: --shm-size)"
        return Finding(what, "warn", f"{found}: less than a quarter of this machine's {_gib(memory)}", mend)
    if _filesystem(directory) not in ("tmpfs", "ramfs", "hugetlbfs", ""):
        return Finding(what, "warn", f"{found}, on {_filesystem(directory)}: a disk, not memory", "use /dev/shm")
    return Finding(what, "ok", found)


def check_logout(directory: str, uid: int) -> Finding:
    """Whether logind unlinks the files of a user in /dev/shm when the last session of that user ends (RemoveIPC).

    What is mapped stays; workers that are started anew and drains find no vault then.
    """
    what = "shared memory at logout"
    if uid <= _LAST_SYSTEM_USER or not os.path.realpath(directory).startswith("/dev/shm"):
        return Finding(what, "ok", "stays")
    if _logind("RemoveIPC") != "yes":
        return Finding(what, "ok", "stays, or no logind is here")
    if _logind("Linger", str(uid)) == "yes":
        return Finding(what, "ok", "stays: this user lingers")
    return Finding(
        what, "warn", f"logind removes the files of user {uid} in {directory} when the last session of that user ends",
        f"loginctl enable-linger {uid} (or RemoveIPC=no in /etc/systemd/logind.conf)",
    )  # fmt: skip


def _logind(value: str, *user: str) -> str:
    """What logind says, of itself or of a user; empty where there is none."""
    try:
        asked = ["loginctl", "show-user", *user, f"--property={value}", "--value"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=_LOGIND_S).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _filesystem(directory: str) -> str:
    best = ("", "")
    path = os.path.realpath(directory)
    for part in psutil.disk_partitions(all=True):
        mount = part.mountpoint.rstrip("/")
        if (path == mount or path.startswith(mount + "/")) and len(mount) >= len(best[0]):
            best = (mount, part.fstype)
    return best[1]


def _limits() -> Iterator[Finding]:
    for what, number, least, flag in (
        ("open files (ulimit -n)", resource.RLIMIT_NOFILE, _FILES, "n"),
        ("processes (ulimit -u)", resource.RLIMIT_NPROC, _PROCESSES, "u"),
    ):
        soft, _ = resource.getrlimit(number)
        good = soft == resource.RLIM_INFINITY or soft >= least
        shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        yield Finding(what, "ok" if good else "warn", shown, "" if good else f"ulimit -{flag} {least}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or not _has_gpu():
        found = "unlimited" if soft == resource.RLIM_INFINITY else f"{_gib(soft)} (only asked for with GPUs)"
        yield Finding("locked memory (ulimit -l)", "ok", found)
    else:
        yield Finding(
            "locked memory (ulimit -l)", "warn", f"{_gib(soft)}: vaults cannot be pinned for fast copies",
            "ulimit -l unlimited (or /etc/security/limits.d: * - memlock unlimited)",
        )  # fmt: skip


def _clock() -> Finding:
    """Does the kernel say that the clock is kept right (adjtimex)? Only times in logs need it: deadlines do not."""
    import ctypes

    class Timex(ctypes.Structure):
        _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_byte * 252))

    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(Timex(0)))
    if state < 0:
        return Finding("clock", "warn", "the kernel does not say if it is synchronised", "timedatectl set-ntp true")
    if state == 5:  # TIME_ERROR: STA_UNSYNC
        return Finding(
            "clock", "warn", "not synchronised: times in logs of several nodes will not fit together",
            "timedatectl set-ntp true (or start chronyd)",
        )  # fmt: skip
    return Finding("clock", "ok", "synchronised, says the kernel")


def _ports() -> Finding:
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return Finding("ports", "warn", "the range of ports cannot be read", "")
    good = high - low >= 8192
    mend = "" if good else "sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
    return Finding("ports", "ok" if good else "warn", f"{low} to {high} for connections", mend)


def _name() -> Finding:
    """A slow name service makes every connection of torch's TCPStore slow: it looks peers up in reverse."""
    name = socket.gethostname()
    start = time.monotonic()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return Finding("host name", "warn", f"{name} has no address", f"echo '<address> {name}' >> /etc/hosts")
    socket.getfqdn(address)
    took = time.monotonic() - start
    if took > _CLOCK_S:
        return Finding(
            "host name", "warn", f"{name}: looking it up takes {took:.1f} s; each connection pays it",
            f"echo '{address} {name}' >> /etc/hosts",
        )  # fmt: skip
    return Finding("host name", "ok", f"{name} is {address}")


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _devices() -> Iterator[Finding]:
    if not _has_gpu():
        yield Finding("GPUs", "warn", "none: only --emulate-cpu works here", "run on a machine with GPUs")
        return
    import torch

    count = torch.cuda.device_count()
    yield Finding(
        "GPUs", "ok" if count else "fail", f"{count} visible to torch", "" if count else "nvidia-smi; check the driver"
    )


def show_findings(findings: Iterator[Finding] | list[Finding], write: Callable[[str], None]) -> int:
    """Write each finding as it comes, 80 columns wide; returns how many are not fine enough to start."""
    import textwrap

    failed = warned = 0
    for f in findings:
        failed += f.state == "fail"
        warned += f.state == "warn"
        head = f"{f.state:<4}  {f.what:<26} "
        for line in textwrap.wrap(f.found, 80, initial_indent=head, subsequent_indent=" " * 33):
            write(line)
        if f.mend:
            write(f"{'':33}mend: {f.mend}")
    verdict = "not fit for a run" if failed else "fit for a run"
    write(f"{verdict}: {failed} to mend, {warned} to look at")
    return failed
