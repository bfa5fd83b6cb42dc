"""One step of the kit: its time, its checks, and the file that has all it saw."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from deadpool_bench.paths import ROOT, importing
from deadpool_megatron.jobs.descendants import Descendants

LIMIT_S: Final = 540.0
_CLOSE_S: Final = 25.0  # of the limit: what runs is ended, and the verdict is written
_GRACE_S: Final = 8.0
_LOOK_S: Final = 0.2
# Every rank a host of its own to NCCL. Up to 2.29 it refuses two ranks on a device only if host hash and bus id are
# equal (init.cc), and this variable replaces the hash (misc/utils.cc). They meet over sockets, as between nodes.
_SITE: Final = """\
import os
if "DEADPOOL_NODE" in os.environ:
    os.environ.setdefault("NCCL_HOSTID", f"node-{os.environ['DEADPOOL_NODE']}-{os.environ.get('LOCAL_RANK', '0')}")
"""


class StepOver(Exception):
    """The time of the step is over."""


@dataclass
class Step:
    """What the code of a step works with.

    Attributes:
        number: of the step.
        dry: without a GPU.
        out: directory for what is kept.
        scratch: directory that goes with the step.
        checks: names and results so far.
    """

    number: int
    dry: bool
    out: Path
    scratch: Path
    end: float
    checks: dict[str, bool] = field(default_factory=dict)
    _figures: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file of this step's records."""
        return self.out / f"step-{self.number}.jsonl"

    def record(self, kind: str, **what: Any) -> None:
        """Append one record; it is on file when this returns."""
        line = json.dumps({"kind": kind, "dry": self.dry, "at": time.time(), **what})
        with self.path.open("a") as file:
            file.write(line + "\n")

    def check(self, name: str, passed: bool, figure: str, **what: Any) -> None:
        """One thing that this step proves, or does not. ``figure`` is what a reader sees."""
        self.checks[name] = passed
        self._figures.append(f"{name}: {figure}")
        self.record("check", name=name, passed=passed, figure=figure, **what)
        print(f"{'ok ' if passed else 'BAD'} {name}: {figure}", flush=True)

    def verdict(self, over: str) -> bool:
        """Write and print the end of the step; ``over`` says why it has ended early, and it has failed then."""
        passed = bool(self.checks) and all(self.checks.values()) and not over
        figures = [over] if over else self._figures or ["nothing was checked"]
        self.record("verdict", passed=passed, figure="; ".join(figures))
        print(f"{'PASS' if passed else 'FAIL'} {'; '.join(figures)}", flush=True)
        return passed

    def left_s(self) -> float:
        """Seconds of the step that are left."""
        return self.end - time.monotonic()

    def command(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        limit_s: float,
        line: Callable[[str], None] | None = None,
        look: Callable[[], None] | None = None,
    ) -> int | None:
        """Run a command, with all it starts, for ``limit_s`` seconds at most; its exit code, None when it was ended.

        Its output is added to the step's log; ``line`` gets each line of it, ``look`` is called now and then.
        """
        mine = Descendants()
        log = self.out / f"step-{self.number}.log"
        end = time.monotonic() + min(limit_s, self.left_s())
        with log.open("a") as out:
            out.write(f"\n== {' '.join(arguments)}\n")
            out.flush()
            begin = out.tell()
            process = subprocess.Popen(
                list(arguments),
                env=importing({**os.environ, **environment, **mine.environment}),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            with log.open(errors="replace") as seen:
                seen.seek(begin)
                for _ in iter(lambda: process.poll() is None and time.monotonic() < end, False):
                    _read(seen, line)
                    if look:
                        look()
                    time.sleep(_LOOK_S)
                ended = process.poll() is None
                if ended:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_GRACE_S)
                _read(seen, line)
            return None if ended else process.returncode
        finally:
            mine.kill(_GRACE_S)
            process.wait()
            if look:
                look()


def _read(seen: Any, line: Callable[[str], None] | None) -> None:
    """Hand on the lines that are whole by now."""
    while True:
        at = seen.tell()
        text = seen.readline()
        if not text.endswith("\n"):
            seen.seek(at)
            return
        if line:
            line(text.rstrip("\n"))


def shared_device(step: Step, ranks: int) -> dict[str, str]:
    """Environment for jobs of which ``ranks`` nodes of one worker share the device; emulated when dry."""
    if step.dry:
        return {"CUDA_VISIBLE_DEVICES": ""}
    site = step.scratch / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(["0"] * ranks),
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
        "NCCL_MAX_CTAS": "2",
        "NCCL_IB_DISABLE": "1",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def _machine() -> dict[str, Any]:
    """What this machine is."""
    import torch
    import torch.distributed as dist

    out: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "shm_gib": round(shutil.disk_usage("/dev/shm").total / (1 << 30), 1),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        out |= {"card": device.name, "device_gib": round(device.total_memory / (1 << 30), 1)}
        if dist.is_nccl_available():
            out["nccl"] = str(dist.ProcessGroupNCCL.get_runtime_nccl_version())
        query = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.current,pcie.link.width.current"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
            out["driver, PCIe generation, lanes"] = done.stdout.strip()
    return out


def _source() -> str:
    """The commit that runs here; empty where there is no git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()
    return ""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def over(signum: int, frame: object) -> None:
        raise StepOver

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_step(number: int, code: Callable[[Step], None], dry: bool, out: Path, limit_s: float = LIMIT_S) -> int:
    """Run the code of one step within its time; the exit code, 0 when it has passed."""
    begun = time.monotonic()
    machine = _machine()
    if not dry and "card" not in machine:
        print("FAIL no CUDA device here; --dry rehearses the step without one", flush=True)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"deadpool-kit-{number}-", ignore_cleanup_errors=True) as scratch:
        step = Step(number, dry, out.resolve(), Path(scratch), begun + limit_s - _CLOSE_S)
        over = ""
        try:
            with _alarm(step.left_s()):
                step.record("begin", machine=machine, source=_source(), limit_s=limit_s)
                code(step)
        except StepOver:
            over = f"its {limit_s:.0f} s are over; checked until then: {', '.join(step.checks) or 'nothing'}"
        except Exception as err:  # noqa: BLE001 - the boundary of the step: whatever it was, the verdict is written
            over = f"{type(err).__name__}: {err}"
        return int(not step.verdict(" ".join(over.split())))
