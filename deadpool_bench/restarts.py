"""The baseline: kill, restart from one of Megatron's checkpoints. With the same detection and a standby that is warm.

The standby is a second job whose processes have imported everything a spare has (`megatron.warm_up`) and wait for a
file. When the first job has ended, which its agents tell as fast as they tell DeadPool, the file appears and the
standby runs the script with ``--load``. So *every* process of the restart is warm, more than a real restart has.

Weights only: upstream cannot load Adam's state back without apex or Transformer Engine, so this is its best case, too.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final

from deadpool_bench.checkpoints import CHECKPOINTS, CheckpointKind, check_kind
from deadpool_bench.harness.jobs import Job
from deadpool_bench.kills import RECOVER_S, START_S, launch_options
from deadpool_bench.progress import say
from deadpool_megatron.observe import LOGS

_LINE: Final = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+)\] iteration +(\d+)/")


@dataclass(frozen=True, slots=True)
class Restart:
    """One kill and the restart after it. Times are seconds.

    ``ended_s`` is from the kill until the job's processes are gone (detection included), ``first_iteration_s`` until
    the first iteration after it is complete; ``lost_iterations`` are complete ones that were not in the checkpoint.
    ``stall_s`` is how much longer an iteration with a save took than one without, ``iteration_s`` one without.
    """

    mode: str
    interval: int
    warm: bool
    ended_s: float
    first_iteration_s: float
    lost_iterations: int
    stall_s: float
    iteration_s: float

    def cost(self, mtbf_s: float) -> float:
        """Seconds of training lost a failure, saving included: half an interval is repeated on average."""
        saving = self.stall_s / (self.interval * self.iteration_s)
        return self.first_iteration_s + self.interval / 2 * self.iteration_s + saving * mtbf_s


def choose_interval(found: Sequence[Restart], mtbf_s: float) -> tuple[str, int, float]:
    """Mode and interval (iterations) with the least cost a failure, and that cost: medians over the restarts."""
    cells: dict[tuple[str, int], list[float]] = {}
    for r in found:
        cells.setdefault((r.mode, r.interval), []).append(r.cost(mtbf_s))
    (mode, interval), costs = min(cells.items(), key=lambda cell: statistics.median(cell[1]))
    return mode, interval, statistics.median(costs)


def _moments(run_dir: Path) -> dict[int, float]:
    """Unix seconds of the end of each iteration (from 1), as Megatron's lines say."""
    out: dict[int, float] = {}
    for path in (run_dir / LOGS).glob("rank-*.log"):
        if not path.is_symlink():
            for when, number in _LINE.findall(path.read_text(errors="replace")):
                out[int(number)] = datetime.strptime(when, "%Y-%m-%d %H:%M:%S.%f").timestamp()
    return out


def _stall(moments: dict[int, float], interval: int) -> tuple[float, float]:
    """(extra seconds of an iteration after a save, seconds of the others): medians of the differences of the lines."""
    with_save: list[float] = []
    without: list[float] = []
    for number, t in moments.items():
        if number - 1 in moments and number > 2:
            (with_save if (number - 1) % interval == 0 else without).append(t - moments[number - 1])
    if not without:  # a save every iteration: the first one, which follows none, is all there is to compare with
        without = [moments[2] - moments[1]] if 1 in moments and 2 in moments else with_save
    usual = statistics.median(without)
    return (max(0.0, statistics.median(with_save) - usual) if with_save else 0.0), usual


def name_of(mode: str, interval: int, warm: bool, number: int) -> str:
    """Of its directories, which no other restart has: a checkpoint of another would be found at once."""
    return f"{mode}-{interval}-{'warm' if warm else 'cold'}-{number}"


def restart(
    options: argparse.Namespace, base: Path, mode: CheckpointKind, interval: int, warm: bool, number: int
) -> Restart:
    """A restart with a checkpoint every ``interval`` iterations, the ``number``-th of its kind."""
    name = name_of(mode, interval, warm, number)
    rng = random.Random(f"{options.seed}-{name}")
    checkpoint = base / f"checkpoint-{name}"
    save = ["--save", str(checkpoint), "--save-interval", str(interval), "--ckpt-format", "torch_dist"]
    script = [*options.arguments, *save, *CHECKPOINTS[mode]]
    again = [*script, "--load", str(checkpoint), "--no-load-optim", "--no-load-rng"]
    launch = launch_options(options, 0)
    go = base / f"go-{name}"
    waiting = [str(Path(__file__).with_name("standby.py")), str(go), options.script, *again]
    standby = Job(base / f"{name}-standby", launch, waiting) if warm else None
    try:
        with Job(base / f"{name}-killed", launch, [options.script, *script]) as job:
            if standby is not None:
                ready = partial(_ready, go, options.active_nodes * options.nproc_per_node)
                standby.until("warm standby", ready, START_S)
            latest = checkpoint / "latest_checkpointed_iteration.txt"
            job.until("checkpoint", latest.exists, START_S)
            saved = int(latest.read_text())
            past = saved + rng.randint(1, max(1, interval - 1)) + interval
            job.until("iterations after it", partial(_has_reached, job, past), RECOVER_S)
            check_kind(job)
            moment = job.kill_node(rng.randrange(options.active_nodes))
            job.wait()
            ended = time.time()
        done = _moments(job.run_dir)
        saved = int(latest.read_text())
        go.touch()
        if standby is None:
            standby = Job(base / f"{name}-again", launch, [options.script, *again])
        standby.until("first iteration after the restart", partial(_moments, standby.run_dir), START_S)
        first = min(_moments(standby.run_dir).values())
    finally:
        if standby is not None:
            standby.end()
    last = max(n for n, t in done.items() if t <= moment)
    stall, usual = _stall(done, interval)
    one = Restart(mode, interval, warm, ended - moment, first - moment, max(0, last - saved), stall, usual)
    say(f"{name}: {one.first_iteration_s:.1f} s, {one.lost_iterations} iterations lost")
    return one


def _ready(go: Path, count: int) -> bool:
    return len(list(go.parent.glob(f"{go.name}.ready-*"))) >= count


def _has_reached(job: Job, iteration: int) -> bool:
    return max(job.printed_iterations(), default=0) >= iteration
