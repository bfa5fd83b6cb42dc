"""A durable generation of one number of replicas goes on at another, bit for bit as Megatron's own checkpoint does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain

import pytest

from flags import plain_optimizer, tiny_gpt, with_value
from jobs import ROOT, Job, Jobs, launch_flags

ITERATIONS, SAVED = 8, 3
SAMPLES = ROOT / "tests" / "pretrain_samples.py"
SMALL = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
# With dropout a sample's numbers follow from the replica that has it, and from the seed that a loader draws first when
# a checkpoint has been loaded: emulated devices have the host's random numbers.
EXACT = ["--attention-dropout", "0", "--hidden-dropout", "0"]
RESHAPED = ["--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable"]


def flags(*more: str) -> list[str]:
    return [*with_value(tiny_gpt(iters=ITERATIONS), "--num-layers", 2), *SMALL, *more]


class Widths:
    """Jobs of one model at several widths, on ``ranks`` processes a replica."""

    def __init__(self, jobs: Jobs, name: str, flags: Sequence[str], ranks: int) -> None:
        self._jobs = jobs
        self._name = name
        self.flags = list(flags)
        self._ranks = ranks
        self.store = jobs.directory / f"{name}-store"
        self._started: dict[str, Job] = {}

    def start(self, name: str, width: int, *more: str, held: bool = False, spares: int = 0) -> Job:
        samples = self._jobs.directory / f"{self._name}-{name}-samples"
        samples.mkdir()
        extra = {"SAMPLES": str(samples)}
        slots = min(2, self._ranks)
        launch = launch_flags(width * self._ranks // slots + spares, spares, slots)
        job = self._jobs.start(f"{self._name}-{name}", launch, [*self.flags, *more], SAMPLES, extra=extra, held=held)
        self._started[name] = job
        return job

    def job(self, name: str) -> Job:
        """One that was started."""
        return self._started[name]

    def drew(self, name: str) -> set[str]:
        """The ranks that have a loader."""
        there = (self._jobs.directory / f"{self._name}-{name}-samples").iterdir()
        return {file.name.removeprefix("rank-") for file in there}

    def samples(self, name: str) -> dict[int, list[list[int]]]:
        """By iteration, what each process drew, in its order; processes that drew nothing are left out."""
        out: dict[int, list[list[int]]] = {}
        for file in sorted((self._jobs.directory / f"{self._name}-{name}-samples").iterdir()):
            drawn: dict[int, list[int]] = {}
            for line in file.read_text().splitlines():
                iteration, number = map(int, line.split())
                drawn.setdefault(iteration, []).append(number)
            for iteration, numbers in drawn.items():
                out.setdefault(iteration, []).append(numbers)
        return out

    def durable(self, width: int) -> int:
        """Leave a durable generation of a job of which nothing else is left; which one."""
        more = ["--deadpool-durable-dir", str(self.store), "--deadpool-durable-interval", str(SAVED)]
        job = self.start("before", width, *more, held=True)
        job.hold(2 * SAVED)
        job.until("a durable generation", lambda: job.events("durable"))
        job.kill_everything()
        return int(max(self.store.glob("generation-*/manifest.json")).parent.name.split("-")[1])

    def resumed(self, name: str, width: int, held: bool = False, spares: int = 0) -> Job:
        ours = ["--deadpool-durable-dir", str(self.store), "--deadpool-resume", "auto"]
        return self.start(name, width, *ours, "--deadpool-durable-interval", "1000", held=held, spares=spares)

    def from_checkpoint(self, name: str, width: int) -> Job:
        """The same out of Megatron's own checkpoint, which `deadpool export` makes and Megatron cuts anew."""
        checkpoint = self._jobs.directory / f"{self._name}-checkpoint"
        if not checkpoint.exists():
            command = [sys.executable, "-m", "deadpool_megatron.cli", "export", "--durable-dir", str(self.store)]
            command += ["--output", str(checkpoint), "--emulate-cpu", "--run-dir", f"{checkpoint}-run"]
            command += ["--script", str(SAMPLES), "--", *RESHAPED[2:]]
            env = os.environ | {"PYTHONPATH": str(ROOT), "SAMPLES": str(self._jobs.directory)}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            assert done.returncode == 0, done.stderr
        return self.start(name, width, "--load", str(checkpoint), *RESHAPED)


def assert_same_from(job: Job, want: Job, first: int, drew: set[str]) -> None:
    """Every iteration, and all state at the end but the seed that a loader draws: a checkpoint knows nothing of it."""
    assert job.exact()[0][0] == first and job.exact() == want.exact()
    ours, theirs = job.hashes(), want.hashes()
    parts = ("params", "main_params", "moments", "steps")
    assert len(ours) == len(theirs) and all(ours[rank][part] == theirs[rank][part] for rank in ours for part in parts)
    assert all(ours[rank]["rng"] == theirs[rank]["rng"] for rank in ours if rank not in drew)


def goes_on(it: Widths, before: int, after: Sequence[int]) -> Job:
    """The last of the jobs that went on, after all was compared."""
    it.start("undisturbed", before).finished(300)
    generation = it.durable(before)
    undisturbed = it.samples("undisturbed")
    for width in after:
        job = it.resumed(f"at-{width}", width).finished(300)
        assert f"training goes on from durable generation {generation}" in job.output
        loaded = it.from_checkpoint(f"loaded-{width}", width).finished(300)
        assert_same_from(job, loaded, generation, it.drew(f"at-{width}"))
        samples = it.samples(f"at-{width}")
        assert min(samples) == generation and max(samples) == ITERATIONS - 1
        for iteration, drawn in samples.items():
            assert sorted(chain(*drawn)) == sorted(chain(*undisturbed[iteration]))
    return job


@pytest.mark.timeout(500)
def test_three_replicas_go_on_from_a_durable_generation_of_two_with_the_same_samples_in_each_global_batch(
    jobs: Jobs,
) -> None:
    """Eight samples over three replicas, each of which weighs what it weighed; FP32, so that this can be seen."""
    exact = [flag for flag in flags(*EXACT) if flag != "--bf16"]
    it = Widths(jobs, "uneven", exact, 1)
    job = goes_on(it, 2, [3])
    drawn = it.samples("at-3")[ITERATIONS - 1]
    assert sorted(map(len, drawn)) == [2, 3, 3]
    want = {iteration: rest for iteration, *rest in it.job("undisturbed").exact()}
    for iteration, losses, norm in job.exact():
        expected, expected_norm = want[iteration]
        assert float.fromhex(losses["lm loss"]) == pytest.approx(float.fromhex(expected["lm loss"]), rel=1e-5)
        assert float.fromhex(norm) == pytest.approx(float.fromhex(expected_norm), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_node_that_is_lost_at_the_new_width_is_replaced_bitwise_with_what_it_was_dealt(jobs: Jobs) -> None:
    it = Widths(jobs, "lost", flags(), 1)
    generation = it.durable(2)
    want = it.resumed("whole", 3).finished(300)
    job = it.resumed("swapped", 3, held=True, spares=1)
    job.arm((1, generation + 2, 2))
    job.finished(300)
    assert job.events("resumed") and {each[0]: each for each in job.exact()} == {each[0]: each for each in want.exact()}
    assert job.hashes() == want.hashes()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "more", "ranks", "before", "after"),
    [
        ("pipeline", [], 4, 2, [1]),
        ("replicated", ["plain", *SMALL], 1, 4, [2, 3]),
        ("tokens", [*SMALL, "--calculate-per-token-loss"], 1, 2, [3]),
        ("data", SMALL, 1, 3, [2, 4]),
        ("experts", ["experts", *SMALL], 1, 4, [2]),
        ("experts replicated", ["experts", "plain", *SMALL], 1, 2, [4]),
    ],
)
def test_fewer_and_more_replicas_go_on_from_a_durable_generation_as_from_megatrons_checkpoint(
    jobs: Jobs, name: str, more: list[str], ranks: int, before: int, after: list[int]
) -> None:
    words = {"plain", "experts"}.intersection(more)
    given = [
        *with_value(tiny_gpt(iters=ITERATIONS, moe="experts" in words), "--num-layers", 2),
        *EXACT,
        *(flag for flag in more if flag not in words),
    ]
    goes_on(
        Widths(jobs, name.replace(" ", "-"), plain_optimizer(given) if "plain" in words else given, ranks),
        before,
        after,
    )
