"""Jobs without a spare that lose a node and get one: what it costs to go on with fewer replicas, and with all again."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from deadpool_bench.harness.forking import FORK_SERVER
from deadpool_bench.harness.jobs import Job
from deadpool_bench.kills import RECOVER_S, START_S, launch_options
from deadpool_bench.progress import say

SHRINKING: Final = ("--deadpool", "--deadpool-when-out-of-spares", "shrink")
"""Flags of a script whose job goes on with fewer replicas."""
_STEADY: Final = 4  # iterations at a width


@dataclass(frozen=True, slots=True)
class Change:
    """The job went on with fewer replicas, or with more. Times are seconds.

    ``first_iteration_s``: to the end of the first iteration at the new width; of a shrink from the kill, of a growth
    from the end of the last iteration before. ``iteration_s`` is the median at the new width, ``lost_iterations`` are
    completed ones that had to be done again.
    """

    event: Literal["shrunk", "grown"]
    width: int
    was: int
    first_iteration_s: float
    iteration_s: float
    lost_iterations: int

    @property
    def disturbance_s(self) -> float:
        """For so long training stood still, the normal time of the first iteration left out."""
        return self.first_iteration_s - self.iteration_s


def changes(events: Sequence[dict[str, Any]], kills: Sequence[float]) -> list[Change]:
    """All changes of width whose first iteration is there, oldest first; ``kills`` are their Unix seconds."""
    out = []
    for event in (e for e in events if e["event"] in ("shrunk", "grown")):
        iterations = [e for e in events if e["event"] == "iteration"]
        before = [e for e in iterations if e["epoch"] < event["epoch"] and e["t"] <= event["t"]]
        after = [e for e in iterations if e["epoch"] == event["epoch"]]
        if not before or not after:
            continue  # lost once more in its start
        grown = event["event"] == "grown"
        moment = before[-1]["t"] if grown else max(t for t in kills if t <= event["t"])
        usual = statistics.median(e["seconds"] for e in after[1:] or after)
        again = max(0, before[-1]["iteration"] + 1 - after[0]["iteration"])
        out.append(Change(event["event"], event["width"], event["was"], after[0]["t"] - moment, usual, again))
    return out


def shrink_and_growth(options: argparse.Namespace, base: Path, name: str) -> list[Change]:
    """One job that loses a random node at a random moment of an iteration, and gets one when it trains steadily.

    Args:
        name: of the run directory; the moment and the victim follow from it and ``options.seed``.

    Raises:
        JobError: the job does not go on.
    """
    rng = random.Random(f"{options.seed}-{name}")
    script = [options.script, *options.arguments, *SHRINKING]
    with Job(base / name, launch_options(options, 0), script) as job:
        rows = job.until("iterations", partial(_steady, job, 0), START_S)
        job.until("warm servers", partial(warm, job), START_S)
        time.sleep(rng.uniform(0.0, statistics.median(e["seconds"] for e in rows)))
        kill = lose(job, rng)
        rows = job.until("iterations with fewer replicas", partial(_steady, job, rows[-1]["replicas"]), RECOVER_S)
        job.join()
        job.until("iterations with more replicas", partial(_steady, job, rows[-1]["replicas"]), RECOVER_S)
        found = changes(job.events(), [kill])
    say(f"{name}: {', '.join(f'{each.event} {each.first_iteration_s:.3f} s' for each in found)}")
    return found


def warm(job: Job) -> bool:
    """All nodes that live have the warm server that each makes in its first seconds; forked jobs have none."""
    nodes = [each["node"] for each in job.status()["nodes"] if each["role"] in ("active", "spare")]
    logs = [job.run_dir / "logs" / f"node-{node}.jsonl" for node in nodes]
    return FORK_SERVER in os.environ or all(log.exists() and '"warm_server"' in log.read_text() for log in logs)


def lose(job: Job, rng: random.Random) -> float:
    """Kill a random node that trains; the Unix seconds of it."""
    return job.kill_node(rng.choice([n["node"] for n in job.status()["nodes"] if n["role"] == "active"]))


def _steady(job: Job, was: int) -> list[dict[str, Any]]:
    """Iterations of the newest epoch, once there are some at another width than that."""
    rows = job.events("iteration")
    rows = [e for e in rows if e["epoch"] == rows[-1]["epoch"]]
    return rows if len(rows) >= _STEADY and rows[-1]["replicas"] != was else []


def show_changes(found: Mapping[str, Sequence[Change]]) -> None:
    """Print a table, at most 80 columns, of what each system's shrinks and growths cost."""
    print("\nwithout a spare (s): medians; to the first iteration at the new width, of a")
    print("shrink from the kill, of a growth from the last one before; again: mean")
    columns = ("first", 8), ("most", 8), ("beyond", 8), ("one it.", 8), ("again", 6), ("n", 3)
    print(f"{'':<39}" + "".join(f"{name:>{width}}" for name, width in columns))
    for name, all_of_it in found.items():
        for event in ("shrunk", "grown"):
            rows = [each for each in all_of_it if each.event == event]
            if not rows:
                continue
            first, beyond, usual = (
                statistics.median(getattr(each, field) for each in rows)
                for field in ("first_iteration_s", "disturbance_s", "iteration_s")
            )
            print(
                f"{name + ' ' + event:<39}{first:>8.3f}{max(each.first_iteration_s for each in rows):>8.3f}"
                f"{beyond:>8.3f}{usual:>8.3f}{statistics.mean(each.lost_iterations for each in rows):>6.2f}"
                f"{len(rows):>3}"
            )
