"""The baseline torchft: the same model in its replica groups, one of them killed at a random moment, and its way back.

Each replica group is one process (`torchft_pretrain`), so only data parallelism is replaced. One lighthouse and
one spare, or none and a replica that comes later, all on this machine. Everything is measured from the rows that the
replicas write, one for each attempt at an iteration.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from deadpool_bench.baselines.torchft_pretrain import ROWS
from deadpool_bench.changes import Change
from deadpool_bench.kills import RECOVER_S, START_S
from deadpool_bench.progress import say
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.launcher.processes import end_with_parent

_POLL_S: Final = 0.02
_END_S: Final = 10.0
_HERE: Final = Path(__file__).parent
_SIZES: Final = ("tensor-model", "pipeline-model", "context", "expert-model")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """Times of torchft's lighthouse, in milliseconds; ``gloo_s`` is what its process group waits for an operation."""

    name: str
    join_timeout: int
    quorum_tick: int
    heartbeat_timeout: int
    gloo_s: int

    def flags(self) -> list[str]:
        """Of `torchft_lighthouse.py`."""
        each = ("join-timeout", self.join_timeout), ("quorum-tick", self.quorum_tick)
        named = [*each, ("heartbeat-timeout", self.heartbeat_timeout)]
        return [text for name, value in named for text in (f"--{name}", str(value))]

    def directory(self, what: str, turn: int) -> str:
        """Name of a job's directory."""
        return "-".join([what, *self.name.replace(",", "").split(), str(turn)])


# The defaults are those of the command torchft_lighthouse and of ProcessGroupGloo in 0.2.0. When a replica dies, one of
# the others can be left waiting in gloo for one that has given up already, and only the time-out of gloo ends that.
SETTINGS: Final = (
    Settings("defaults", 60_000, 100, 5_000, 60),
    Settings("heartbeat 1 s, gloo 2 s", 60_000, 100, 1_000, 2),
)


@dataclass(frozen=True, slots=True)
class Outage:
    """One replica killed. Times are seconds from it; ``iteration_s`` is the run's own median.

    ``quorum_s``: until the last replica had its first quorum without the dead one. ``first_iteration_s``: until all
    that train had completed the first iteration in it. ``lost_iterations``: iterations whose work no
    replica kept. ``participants``: replicas that train afterwards.
    """

    settings: str
    version: str
    replica: int
    iteration: int
    quorum_s: float
    first_iteration_s: float
    iteration_s: float
    lost_iterations: int
    participants: int

    @property
    def disturbance_s(self) -> float:
        """Kill to first completed iteration, beyond the normal time of that iteration."""
        return self.first_iteration_s - self.iteration_s

    def breakdown(self) -> dict[str, float]:
        """Seconds each part took, from the one before it."""
        return {"new quorum": self.quorum_s, "first iteration in it": self.first_iteration_s - self.quorum_s}


def check_torchft(options: argparse.Namespace) -> None:
    """Raise ValueError, one line, when the options ask for what cannot be measured with torchft here."""
    if options.torchft < 0:
        raise ValueError(f"--torchft {options.torchft}: 0 or more kills")
    if not options.torchft:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for size in _SIZES:
        parser.add_argument(f"--{size}-parallel-size", default="1")
    try:
        given, _ = parser.parse_known_args(options.arguments)
    except argparse.ArgumentError as err:
        raise ValueError(f"--torchft: {err}") from None
    for name, value in vars(given).items():
        if value != "1":
            flag = name.replace("_", "-")
            raise ValueError(f"--torchft: torchft replaces only the data-parallel dimension here: --{flag} must be 1")
    if options.nproc_per_node != 1:
        raise ValueError("--torchft: each of its replicas is one process here: --nproc-per-node must be 1")
    if options.active_nodes < 2:
        raise ValueError(f"--torchft: --active-nodes {options.active_nodes}: 2 or more")
    if not options.emulate_cpu:
        raise ValueError("--torchft: it runs on CPUs here: --emulate-cpu is needed")
    if importlib.util.find_spec("torchft") is None:
        raise ValueError("--torchft: torchft is not installed: pip install 'torchft>=0.2'")


def _version() -> str:
    """Version of the installed torchft, released or nightly."""
    names = importlib.metadata.packages_distributions().get("torchft", ["torchft"])
    return importlib.metadata.version(names[0])


# ---- what the rows say


def _moments(rows: Iterable[Row]) -> dict[int, float]:
    """Unix seconds at which each step was complete in all replicas that train."""
    done: dict[int, dict[int, Row]] = {}
    for row in rows:
        if row["committed"] and row["place"] is not None:
            done.setdefault(row["step"], {})[row["replica"]] = row
    return {
        step: max(row["t"] for row in by.values())
        for step, by in sorted(done.items())
        if len(by) >= max(row["participants"] for row in by.values())
    }


def usual_seconds(rows: Iterable[Row]) -> float:
    """Median seconds of the last three iterations. Raises ValueError when there are fewer than four."""
    ends = [*_moments(rows).values()][-4:]
    if len(ends) < 4:
        raise ValueError("fewer than four iterations")
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def measured(rows: Sequence[Row], moment: float, victim: int, settings: str, version: str) -> Outage | None:
    """The kill of ``victim`` at ``moment`` (Unix seconds); None until the first iteration after it is complete.

    An iteration that was under way counts as the first one only when it was done in a quorum without the victim.
    """
    before = [row for row in rows if row["t"] <= moment and row["committed"]]
    size = before[-1]["replicas"]
    after = [row for row in rows if row["quorum"] > moment and row["replicas"] < size and row["replica"] != victim]
    moments = _moments(after)
    if not moments:
        return None
    step, end = next(iter(moments.items()))
    participants = next(row["participants"] for row in after if row["committed"] and row["step"] == step)
    joined: dict[int, float] = {}
    for row in after:
        joined.setdefault(row["replica"], row["quorum"])
    return Outage(
        settings,
        version,
        victim,
        max(row["step"] for row in before) + 1,
        max(joined.values()) - moment,
        end - moment,
        usual_seconds(before),
        _thrown_away([row for row in rows if moment < row["t"] <= end and row["replica"] != victim], size),
        participants,
    )


def _thrown_away(rows: Sequence[Row], size: int) -> int:
    """Iterations whose work no survivor kept. One that only some could commit is given to the others by torchft."""
    kept = {row["step"] for row in rows if row["committed"] and row["replicas"] == size}
    thrown = Counter((row["step"], row["replica"]) for row in rows if not row["committed"] and row["step"] not in kept)
    most: dict[int, int] = {}
    for (step, _), count in thrown.items():
        most[step] = max(count, most.get(step, 0))
    return sum(most.values())


def regroupings(rows: Sequence[Row], moment: float, victim: int) -> list[Change]:
    """The loss of ``victim`` at ``moment`` (Unix seconds), which no spare made good, and the return of a replica.

    In between there have to be some iterations without it, and some with all replicas at the end.
    """
    before = [row for row in rows if row["t"] <= moment and row["committed"]]
    was = before[-1]["participants"]
    later = [row for row in rows if row["quorum"] > moment and row["replica"] != victim]
    narrow = _moments(row for row in later if row["replicas"] < was)
    healing = _moments(row for row in later if row["replicas"] == was and row["participants"] < was)
    wide = _moments(row for row in later if row["participants"] == was)
    first, last, again = min(narrow.values()), max(narrow.values()), min(wide.values())
    paces = [statistics.median(b - a for a, b in itertools.pairwise(each.values())) for each in (narrow, wide)]
    lost = [
        _thrown_away([row for row in rows if begin < row["t"] <= end and row["replica"] != victim], size)
        for begin, end, size in ((moment, first, was), (last, again, was))
    ]
    # Iterations with those that were there count while a replica comes, and so does their time.
    meanwhile = len([t for t in healing.values() if last < t < again]) * paces[0]
    return [
        Change("shrunk", was - 1, was, first - moment, paces[0], lost[0]),
        Change("grown", was, was - 1, again - last - meanwhile, paces[1], lost[1]),
    ]


# ---- the job


class _Job:
    """A lighthouse and replicas, each ended by its id, whatever happens. A context manager."""

    def __init__(self, directory: Path, options: argparse.Namespace, settings: Settings, replicas: int) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []
        self.replicas: dict[int, subprocess.Popen[bytes]] = {}
        try:
            least = ["--min-replicas", str(options.active_nodes if replicas > options.active_nodes else 1)]
            least += settings.flags()
            lighthouse = self._start("lighthouse", [str(_HERE / "torchft_lighthouse.py"), *least])
            url = f"http://127.0.0.1:{self._port(lighthouse)}"
            common = ["--replicas", str(replicas), "--active", str(options.active_nodes), "--lighthouse", url]
            common += ["--gloo-timeout", str(settings.gloo_s), "--directory", str(directory)]
            self._common = [*common, options.script, *options.arguments]
            for number in range(replicas):
                self.add(number)
        except BaseException:
            self.end()
            raise

    def add(self, number: int) -> None:
        """Start a replica."""
        emulation = ["-m", "deadpool_megatron.emulation", str(_HERE / "torchft_pretrain.py")]
        self.replicas[number] = self._start(f"replica-{number}", [*emulation, "--replica", str(number), *self._common])

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self._directory / f"{name}.log", "wb") as log:
            started = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE if name == "lighthouse" else subprocess.DEVNULL,
                stdout=subprocess.PIPE if name == "lighthouse" else log,
                stderr=log,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
                start_new_session=True,  # Ctrl-C reaches only the bench, which then ends all
                preexec_fn=partial(end_with_parent, signal.SIGKILL),
            )
        self._started.append(started)
        return started

    def _port(self, lighthouse: subprocess.Popen[bytes]) -> int:
        assert lighthouse.stdout is not None
        ready, _, _ = select.select([lighthouse.stdout], [], [], START_S)
        line = lighthouse.stdout.readline().strip() if ready else b""
        if not line.isdigit():
            self.failed("torchft's lighthouse did not start")
        return int(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.end()

    def failed(self, what: str) -> NoReturn:
        """Raises JobError."""
        raise JobError(f"torchft's job of {self._directory}: {what}; see its logs")

    def rows(self) -> list[Row]:
        """All complete rows of all replicas, oldest first."""
        out: list[Row] = []
        for path in self._directory.glob(ROWS.format("*")):
            text = path.read_text()
            out += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return sorted(out, key=lambda row: float(row["t"]))

    def until(self, what: str, find: Callable[[], Any], deadline_s: float) -> Any:
        """Poll until ``find`` gives something. Raises JobError when a replica ends first or the deadline passes."""
        end = time.monotonic() + deadline_s
        while not (found := find()):
            for number, process in self.replicas.items():
                if process.poll() is not None:
                    self.failed(f"replica {number} ended ({process.returncode}) before {what}")
            if time.monotonic() > end:
                self.failed(f"no {what} within {deadline_s:g} s")
            time.sleep(_POLL_S)
        return found

    def kill(self, number: int) -> float:
        """SIGKILL for a replica, which is taken off the list; returns the wall-clock time of it."""
        victim = self.replicas.pop(number)
        moment = time.time()
        victim.kill()
        return moment

    def end(self) -> None:
        """Kill and reap everything that was started."""
        for process in self._started:
            process.kill()  # nothing when it has been reaped
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _steady(job: _Job, steps: int) -> list[Row]:
    """All rows, once there are as many complete iterations in a quorum of everybody; empty before."""
    rows = job.rows()
    full = [row for row in rows if row["replicas"] == len(job.replicas)]
    return rows if len(_moments(full)) >= steps else []


def outage(options: argparse.Namespace, base: Path, name: str, settings: Settings) -> Outage:
    """One job with one spare; a random replica that trains is killed at a random moment of an iteration.

    Args:
        name: of the job's directory; the moment and the victim follow from it and ``options.seed``.

    Raises:
        JobError: torchft's job does not start, or does not go on after the kill.
    """
    rng = random.Random(f"{options.seed}-{name}")
    version = _version()
    with _Job(base / name, options, settings, options.active_nodes + 1) as job:
        job.until("iterations of all replicas", partial(_steady, job, 1), START_S)
        done = len(_moments(job.rows()))
        rows = job.until("four more iterations", partial(_steady, job, done + 4), RECOVER_S)
        last = max(_moments(rows))
        training = sorted(row["replica"] for row in rows if row["step"] == last and row["place"] is not None)
        victim = rng.choice(training)
        time.sleep(rng.uniform(0.0, usual_seconds(rows)))
        moment = job.kill(victim)

        def found() -> Outage | None:
            return measured(job.rows(), moment, victim, settings.name, version)

        out: Outage = job.until("iteration after the kill", found, RECOVER_S)
    say(f"{name}: replica {victim}, disturbance {out.disturbance_s:.3f} s")
    return out


def regrouping(options: argparse.Namespace, base: Path, name: str, settings: Settings) -> list[Change]:
    """One job without a spare, which loses a random replica at a random moment of an iteration and gets one later.

    Arguments and exceptions are those of `outage`.
    """
    rng = random.Random(f"{options.seed}-{name}")
    with _Job(base / name, options, settings, options.active_nodes) as job:
        rows = job.until("iterations of all replicas", partial(_steady, job, 4), START_S)
        victim = rng.choice(sorted(job.replicas))
        time.sleep(rng.uniform(0.0, usual_seconds(rows)))
        moment = job.kill(victim)

        def iterations(participants: int) -> bool:
            after = [row for row in job.rows() if row["quorum"] > moment and row["replica"] != victim]
            return len(_moments(row for row in after if row["participants"] == participants)) >= 4

        job.until("iterations without it", partial(iterations, options.active_nodes - 1), RECOVER_S)
        job.add(options.active_nodes)
        job.until("iterations with another one", partial(iterations, options.active_nodes), RECOVER_S)
        found = regroupings(job.rows(), moment, victim)
    say(f"{name}: {', '.join(f'{each.event} {each.first_iteration_s:.3f} s' for each in found)}")
    return found


def show_outages(found: Sequence[Outage]) -> None:
    """Print a table, at most 80 columns, of medians for each of the settings."""
    print(f"\ntorchft {found[0].version} (s): medians; lost: iterations whose work was thrown away, mean")
    columns = (
        ("disturb.", 9),
        ("most", 8),
        ("first", 8),
        ("quorum", 8),
        ("one it.", 8),
        ("lost", 6),
        ("train", 6),
        ("n", 3),
    )
    print(f"{'settings':<23}" + "".join(f"{name:>{width}}" for name, width in columns))
    for name in dict.fromkeys(o.settings for o in found):
        rows = [o for o in found if o.settings == name]

        def middle(field: str, rows: list[Outage] = rows) -> float:
            return float(statistics.median(getattr(o, field) for o in rows))

        lost = statistics.mean(o.lost_iterations for o in rows)
        print(
            f"{name:<23}{middle('disturbance_s'):>9.3f}{max(o.disturbance_s for o in rows):>8.3f}"
            f"{middle('first_iteration_s'):>8.3f}{middle('quorum_s'):>8.3f}{middle('iteration_s'):>8.3f}"
            f"{lost:>6.2f}{min(o.participants for o in rows):>6}{len(rows):>3}"
        )
