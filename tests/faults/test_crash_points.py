"""Every crash point, each with every victim's role: the run ends as if nothing had happened.

The default run shows three. All of them, in some minutes a group, with what they took written as JSON::

    DEADPOOL_TEST_RESULTS=DIR python -m pytest -m slow -s tests/faults/test_crash_points.py [-k GROUP]
    deadpool bench faults --results DIR --write docs/fault-tolerance.md
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from crash_cases import GROUPS, REPRESENTATIVE, Case
from crashes import CALM_S, COORDINATES, Gauntlet, differences, gauntlet_flags, results, write_results
from deadpool_megatron.observe import LOGS
from fair_clock import CLOCK
from jobs import PACED, Job, Jobs, launch_flags

FEW, MANY, SOME = 60, 320, 200
BUDGET_S = 600.0  # for the cases of a group; what is left then is not begun
# An evaluation every 5 iterations, a checkpoint every 10.
AROUND = ["--eval-interval", "5", "--eval-iters", "2"]
SETTINGS = {
    "moves": (MANY, ["--deadpool-scrub-rate", "0"]),
    "durable": (MANY, ["--deadpool-durable-interval", "5"]),
    "around": (SOME, AROUND),
    "around-async": (SOME, [*AROUND, "--async-save"]),
}


class Calm:
    """The undisturbed runs, each made when it is needed first."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._made: dict[tuple[int, tuple[str, ...]], Job] = {}

    def of(self, iterations: int, more: Sequence[str] = ()) -> Job:
        """The run of so many iterations, with these flags besides."""
        key = (iterations, tuple(more))
        if key not in self._made:
            name = f"calm-{len(self._made)}"
            pace = self._jobs.directory / f"{name}.pace"
            pace.write_text(CALM_S)
            flags = [*gauntlet_flags(iterations), *more]
            job = self._jobs.start(name, launch_flags(COORDINATES, 0, 1), flags, PACED, extra={"PACE_FILE": str(pace)})
            self._made[key] = job.finished(300)
        return self._made[key]


@pytest.fixture(scope="module")
def calm(module_jobs: Jobs) -> Calm:
    """What to compare with."""
    return Calm(module_jobs)


def run(name: str, cases: Sequence[Case], jobs: Jobs, calm: Calm, iterations: int, more: Sequence[str]) -> Job:
    """One job through all cases."""
    want = calm.of(iterations, AROUND if AROUND[0] in more else [])
    gauntlet = Gauntlet(jobs, name, iterations, more=more)
    wrong = ["the run did not end"]
    late: list[Case] = []
    begun = CLOCK.seconds()
    try:
        for case in cases:
            if CLOCK.seconds() - begun < BUDGET_S:
                gauntlet.face(case)
            else:
                late.append(case)
        got = gauntlet.finish()
        wrong = differences(got, want)
    finally:
        gauntlet.end()
        write_results(name, results(gauntlet, not wrong))
    assert not wrong, f"{wrong}\n{got.log_tails()}"
    assert not late, f"no time was left for {list(map(str, late))}: is this machine busy with something else?"
    return got


def test_a_survivor_a_spare_and_the_coordinator_die_at_a_point_each(jobs: Jobs, calm: Calm) -> None:
    run("representative", REPRESENTATIVE, jobs, calm, FEW, [])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("group", [name for name in GROUPS if not name.startswith("around")])
def test_every_point_of_a_group(group: str, jobs: Jobs, calm: Calm, tmp_path: Path) -> None:
    iterations, more = SETTINGS.get(group, (MANY, []))
    if group == "durable":
        more = [*more, "--deadpool-durable-dir", str(tmp_path / "durable")]
    run(group, GROUPS[group], jobs, calm, iterations, more)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("group", ["around", "around-async"])
def test_what_is_due_around_training_is_done_exactly_once(group: str, jobs: Jobs, calm: Calm, tmp_path: Path) -> None:
    iterations, more = SETTINGS[group]
    save = ["--save", str(tmp_path / "save"), "--save-interval", "10"]
    job = run(group, GROUPS[group], jobs, calm, iterations, [*more, *save])
    logs = [p for p in (job.run_dir / LOGS).glob("*.log") if not p.is_symlink()]
    text = "\n".join(p.read_text(errors="replace") for p in logs)
    evaluations = Counter(re.findall(r"validation loss at iteration (\d+) ", text))
    due = [str(i) for i in range(5, iterations, 5)]
    # Whose node dies at "evaluation.after" has printed it, and may not have told anybody outside.
    assert min(evaluations[n] for n in due) == 1 and sum(evaluations[n] - 1 for n in due) <= 1, evaluations
    saves = Counter(int(n) for n in re.findall(r"successfully saved checkpoint from iteration +(\d+)", text))
    # Who dies at "save.finalized" has not told anybody that it is: the same checkpoint is written once more.
    untold = sum(case.point == "save.finalized" for case in GROUPS[group])
    assert sum(count - 1 for count in saves.values()) <= untold, f"written twice: {saves}"
    # One that a failure caught unfinished in the background is made good by the next iteration's.
    late = 1 if group.endswith("async") else 0
    for due_at in range(10, iterations + 1, 10):
        assert any(saves[due_at + i] for i in range(late + 3 if late else 1)), f"no checkpoint of {due_at}: {saves}"
    latest = (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text()
    assert int(latest) == iterations
