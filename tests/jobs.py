"""Jobs under test: `deadpool_bench.harness.jobs` with what only tests look at, and training runs compared.

Every wait has a deadline. Whatever a test does, `Jobs.end` leaves none of the processes of its jobs behind.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deadpool_bench.harness import jobs
from deadpool_bench.harness.fork_server import ForkServer
from deadpool_bench.harness.forking import FORK_SERVER, fork_module
from deadpool_bench.harness.ports import free_ports
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.emulation import environment as emulated
from deadpool_megatron.jobs.descendants import Descendants
from deadpool_megatron.observe import LOGS
from fair_clock import CLOCK

__all__ = [
    "BRIDGE",
    "ENDED_BY",
    "EXAMPLE",
    "PACED",
    "PROVEN",
    "ROOT",
    "Job",
    "Jobs",
    "alone",
    "assert_same_checkpoint",
    "assert_same_training",
    "environment",
    "launch_flags",
    "set_pace",
    "survives",
    "torch_server",
    "undisturbed",
]

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "pretrain_gpt.py"
PACED = ROOT / "tests" / "pretrain_paced.py"
BRIDGE = ROOT / "tests" / "pretrain_bridge.py"
# By signal to a command: its exit code, and what the job says.
ENDED_BY = {signal.SIGINT: (Exit.INTERRUPTED, "interrupted"), signal.SIGTERM: (Exit.TERMINATED, "ended by SIGTERM")}
# Ten processes that import torch on two cores that others use too.
START_S = 180.0

_LINE = re.compile(r"iteration +(\d+)/ +\d+ \|(.*)")
# Flags, and workers a node, of the jobs that lost a node and were found equal to the undisturbed one, in this test.
PROVEN: list[tuple[list[str], int]] = []
_EXACT = (
    *("consumed samples", "learning rate", "lm loss", "grad norm", "loss scale", "number of skipped iterations"),
    *("load_balancing_loss", "z_loss", "mtp_1 loss"),
)


def set_pace(file: Path, seconds: object) -> None:
    """What a forward pass of `PACED` sleeps from now on. The file is there and whole at any time."""
    new = file.with_suffix(".new")
    new.write_text(str(seconds))
    new.replace(file)


def launch_flags(nodes: int, spares: int = 0, slots: int = 2) -> list[str]:
    """Options of `deadpool launch` for emulated nodes on this machine."""
    return [
        *["--local-nodes", str(nodes), "--spare-nodes", str(spares), "--nproc-per-node", str(slots)],
        "--emulate-cpu",
    ]


@functools.cache
def _directory() -> Path:
    """Of what a whole test run shares; it ends with it."""
    directory = Path(tempfile.mkdtemp(prefix="deadpool-"))
    atexit.register(shutil.rmtree, directory)
    return directory


@functools.cache
def torch_server() -> ForkServer:
    """A fork server with torch and without the emulation, for processes that are no job's."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "integration"), str(ROOT / "tests")])
    server = ForkServer(_directory() / "torch", os.environ | emulated() | {"PYTHONPATH": paths})
    atexit.register(server.end)
    return server


@functools.cache
def _fork_server(script: Path) -> ForkServer:
    """With what that script imports; one for all jobs of this test run, and ends with it."""
    server = ForkServer(_directory() / script.stem, environment(emulated()), script)
    atexit.register(server.end)
    return server


def environment(extra: dict[str, str] | None = None, forked: bool = False, script: Path = EXAMPLE) -> dict[str, str]:
    """Of a command under test.

    Args:
        forked: emulated workers below it come from a fork server, where ``extra`` lets them. Not for what runs another
            Megatron, or in another network.
        script: whose imports that server has.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    extra = extra or {}
    server = {FORK_SERVER: str(_fork_server(script).address)} if forked and "PYTHONPATH" not in extra else {}
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)} | server | extra


class Job(jobs.Job):
    """One `deadpool launch` under test: a failure shows the ends of its logs; `fair_clock` has its deadlines."""

    clock = staticmethod(CLOCK.seconds)

    def __init__(
        self, run_dir: Path, launch: Sequence[str], script: Sequence[str], extra: dict[str, str] | None = None
    ) -> None:
        self.hash_file = Path(f"{run_dir}.hash.json")
        self.flags = list(script[1:])
        self.slots = int(launch[launch.index("--nproc-per-node") + 1]) if "--nproc-per-node" in launch else 1
        forked = "--emulate-cpu" in launch and not (Path(script[0]).parent / "megatron").exists()
        warm = BRIDGE if Path(script[0]) == BRIDGE else EXAMPLE
        super().__init__(run_dir, launch, script, environment(extra, forked, warm), run_dir.parent)

    def failed(self, what: str) -> NoReturn:
        """Fail the test."""
        raise AssertionError(f"the job of {self.run_dir}: {what}\n{self.log_tails()}")

    def hold(self, iteration: int | None) -> None:
        """Let a job that was started held go on, up to the begin of an iteration (from 0), or to its end."""
        set_pace(Path(self._environment["PACE_FILE"]), 0 if iteration is None else f"hold {iteration}")

    def arm(self, *faults: Sequence[Any], until: int | None = None) -> None:
        """Arm faults, each as of `inject`, in a job that was started held, and let it go on ``until`` an iteration."""
        self.until_event("started")
        for node, iteration, tick, *more in faults:
            self.inject(node, iteration, tick, *more)
        self.hold(until)

    def exact(self) -> list[tuple[int, dict[str, str], str | None]]:
        """Iteration, losses and grad norm as hexadecimal floats; a repeated iteration is there each time."""
        return [(e["iteration"], e["losses_hex"], e["grad_norm_hex"]) for e in self.events("iteration")]

    def hashes(self) -> dict[str, dict[str, str]]:
        """State hashes at the end, by rank and part."""
        hashes: dict[str, dict[str, str]] = json.loads(self.hash_file.read_text())["coordinates"]
        return hashes

    def printed(self, rank: int) -> dict[int, dict[str, str]]:
        """By iteration (from 1, as Megatron prints it) the exact parts of the lines of one coordinate; the last counts.

        A coordinate that moved goes on in the log of each spare that took it over, in the order of the epochs.
        """
        logs = self.run_dir / LOGS
        later = sorted(logs.glob(f"rank-{rank}.epoch-*.log"), key=lambda p: int(p.stem.rsplit("-", 1)[1]))
        paths = [logs / f"rank-{rank}.log", *later]
        return _printed("\n".join(p.read_text(errors="replace") for p in paths))

    def log_tails(self, count: int = 12) -> str:
        """The ends of all logs, for a failure's message."""
        parts = [f"launcher:\n{self.output[-3000:]}"]
        for path in sorted((self.run_dir / LOGS).glob("*.log")):
            if not path.is_symlink():
                parts.append(f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-count:]))
        return "\n".join(parts)[-12000:]

    def until(self, what: str, find: Callable[[], Any], deadline_s: float = START_S) -> Any:
        """Poll until ``find`` gives something; fails when the job ends first or the deadline passes."""
        return super().until(what, find, deadline_s)

    def until_event(self, name: str, epoch: int | None = None, deadline_s: float = START_S) -> dict[str, Any]:
        """The first event of a name (and epoch)."""

        def find() -> list[dict[str, Any]]:
            return [e for e in self.events(name) if epoch is None or e["epoch"] == epoch]

        return self.until(f"event {name} of epoch {epoch}", find, deadline_s)[0]  # type: ignore[no-any-return]

    def wait(self, deadline_s: float = START_S) -> int:
        """The exit code of the job."""
        return super().wait(deadline_s)

    def kill_everything(self) -> None:
        """SIGKILL for every process of the job at once: the machines are gone."""
        processes = self.processes()
        for each in processes:
            each.send_signal(signal.SIGSTOP)  # nobody gets to do anything between the first and the last
        for each in processes:
            each.kill()
        self.process.wait()
        self.until_gone(60)

    def finished(self, deadline_s: float = START_S) -> Job:
        """Wait for an end without error."""
        code = self.wait(deadline_s)
        assert code == 0, f"exit code {code}\n{self.log_tails()}"
        return self


def _printed(text: str) -> dict[int, dict[str, str]]:
    out: dict[int, dict[str, str]] = {}
    for number, rest in _LINE.findall(text):
        fields = dict(part.split(":", 1) for part in rest.split("|") if ":" in part)
        out[int(number)] = {k.strip(): v.strip() for k, v in fields.items() if k.strip() in _EXACT}
    return out


class Jobs:
    """All jobs of a test or a module."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._jobs: list[Job] = []

    def start(
        self,
        name: str,
        launch: Sequence[str],
        flags: Sequence[str],
        script: Path = EXAMPLE,
        deadpool: bool = True,
        extra: dict[str, str] | None = None,
        held: bool | str = False,
    ) -> Job:
        """Start a job; with ``deadpool`` its state hashes are written at the end.

        ``held``: it does not begin iteration 0 before `Job.arm` or `Job.hold` lets it; ``wait``: nor its script.
        """
        run_dir = self.directory / name
        if held:
            extra = {"PACE_FILE": f"{run_dir}.pace", "SCRIPT": str(script)} | (extra or {})
            script = PACED if script != BRIDGE else BRIDGE  # which paces itself
            set_pace(Path(extra["PACE_FILE"]), held if isinstance(held, str) else "hold 0")
        ours = ["--deadpool", "--deadpool-state-hash", f"{run_dir}.hash.json"] if deadpool else []
        job = Job(run_dir, launch, [str(script), *flags, *ours], extra)
        self._jobs.append(job)
        return job

    def end(self) -> None:
        """End all of them."""
        for job in self._jobs:
            job.end()


def undisturbed(
    launch: Sequence[str], flags: Sequence[str], script: Path = EXAMPLE, extra: Mapping[str, str] | None = None
) -> Job:
    """The run in which nothing happens, to compare with: made once in a test run for each set of flags."""
    return _undisturbed(tuple(launch), tuple(flags), script, tuple((extra or {}).items()))


@functools.cache
def _undisturbed(
    launch: tuple[str, ...], flags: tuple[str, ...], script: Path, extra: tuple[tuple[str, str], ...]
) -> Job:
    jobs = Jobs(_directory())
    name = f"undisturbed-{_undisturbed.cache_info().misses}"
    try:
        return jobs.start(name, launch, flags, script, extra=dict(extra)).finished()
    finally:
        jobs.end()


def alone(directory: Path, processes: int, flags: Sequence[str], script: Path = EXAMPLE) -> dict[int, dict[str, str]]:
    """The same script under the emulation and without us: what `Job.printed` gives, of the rank that prints."""
    descendants = Descendants()
    env = environment(emulated() | descendants.environment | {"WORLD_SIZE": str(processes)}, forked=True)
    env |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    server, out = env.pop(FORK_SERVER), directory / "alone.out"
    try:
        with out.open("wb") as file:
            ranks = [
                fork_module(
                    server,
                    "deadpool_megatron.emulation",
                    [str(script), *flags],
                    env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    directory=directory,
                )
                for rank in range(processes)
            ]
        while (codes := [rank.poll() for rank in ranks]) != [0] * processes:
            assert not any(codes), f"exit codes {codes}\n{out.read_text()[-6000:]}"
            time.sleep(0.02)
    finally:
        descendants.kill(10)
    return _printed(out.read_text())


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(value, dict):
        for key in value:
            yield from _leaves(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from _leaves(each, f"{name}/{i}")
    elif isinstance(value, io.BytesIO):
        yield from _leaves(torch.load(value, weights_only=False), name)
    elif isinstance(value, torch.Tensor):
        yield name, value.contiguous().view(-1).view(torch.uint8)
    else:
        yield name, pickle.dumps(value)


# Megatron fills its buckets up to a multiple of this many elements and never initialises what it adds.
_PADDING = 128


def assert_same_checkpoint(got: Path, want: Path) -> None:
    """Two of Megatron's ``torch_dist`` checkpoints hold the same, bit for bit.

    What may differ are the runs' flags, the padding of the optimizer's buckets, and the iteration that Megatron's rerun
    machine counts for its reports.
    """
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    contents: list[dict[str, Any]] = []
    for directory in (got, want):
        whole = Path(f"{directory}.pt")
        dcp_to_torch_save(directory, whole)
        leaves = _leaves(torch.load(whole, weights_only=False))
        contents.append({k: v for k, v in leaves if not k.endswith(("/args", "/current_iteration"))})
    mine, theirs = contents
    assert set(mine) == set(theirs)
    assert any("exp_avg" in name for name in mine) and any("rng_tracker" in name for name in mine)
    for name, value in theirs.items():
        if isinstance(value, bytes):
            assert mine[name] == value, name
        else:
            differing = int((mine[name] != value).sum())
            assert differing <= (4 * _PADDING if ".bucket_idx_" in name else 0), f"{name}: {differing} bytes differ"


def assert_same_training(got: Job, want: Job, iterations: int, rank: int, mute: frozenset[int] = frozenset()) -> None:
    """Losses, grad norms, printed lines and all state hashes equal, bit for bit.

    Args:
        rank: the coordinate whose log has Megatron's lines.
        mute: iterations (from 0) whose report may have died with the node that made it.
    """
    # The report of the last iteration before a loss may come when its epoch is over already: the record is not taken.
    mute |= {event["iteration"] - 1 for event in got.events("agreed")}
    expected = {iteration: exact for iteration, *exact in want.exact()}
    assert sorted(expected) == list(range(iterations)), "the undisturbed run is not complete"
    seen = {iteration for iteration, *_ in got.exact()}
    assert set(range(iterations)) - mute <= seen, f"iterations reported: {sorted(seen)}"
    for iteration, *exact in got.exact():
        assert exact == expected[iteration], f"iteration {iteration} differs"
    lines, wanted = got.printed(rank), want.printed(rank)
    assert wanted and all("lm loss" in v and "grad norm" in v and "learning rate" in v for v in wanted.values())
    assert lines == wanted
    hashes = got.hashes()
    assert hashes and hashes == want.hashes(), [
        (coordinate, part)
        for coordinate, parts in want.hashes().items()
        for part, digest in parts.items()
        if hashes.get(coordinate, {}).get(part) != digest
    ]
    if any(event["lost"] for event in got.events("declared")) and got.events("resumed"):
        plain = "--yaml-cfg" not in getattr(got, "flags", ["--yaml-cfg"])  # what a file says is not read here
        PROVEN.append((got.flags, got.slots) if plain else (want.flags, want.slots))


def survives(
    jobs: Jobs,
    name: str,
    flags: Sequence[str],
    *lost: tuple[int, int, int],
    nodes: int = 2,
    slots: int = 1,
    script: Path = EXAMPLE,
    extra: Mapping[str, str] | None = None,
    mute: frozenset[int] | None = None,
) -> tuple[Job, Job]:
    """A run on nodes of so many processes, with a spare for each one that is lost, ends as the undisturbed one. Both.

    Args:
        lost: node, iteration and tick, one after the other.
        mute: see `assert_same_training`; None: the iteration before each loss.
    """
    want = undisturbed(launch_flags(nodes, 0, slots), flags, script, extra)
    launch = launch_flags(nodes + len(lost), len(lost), slots)
    job = jobs.start(re.sub(r"\W+", "-", name), launch, flags, script, extra=dict(extra or {}), held=True)
    job.arm(*lost)
    job.finished()
    assert [event["lost"] for event in job.events("declared")] == [[node] for node, _, _ in lost]
    iterations = int(flags[flags.index("--train-iters") + 1])
    if mute is None:
        mute = frozenset(iteration - 1 for _, iteration, _ in lost)
    assert_same_training(job, want, iterations, rank=nodes * slots - 1, mute=mute)
    return job, want
