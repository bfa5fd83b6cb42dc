"""All that changes in Megatron's process, and all that a spare has otherwise, is named in the census.

Every value that can be reached is looked at before each iteration, in an undisturbed and in a killed run.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from census import CENSUS, Entry
from flags import Layout, duo_gpt, plain_optimizer, without_values
from jobs import EXAMPLE, ROOT, Job, Jobs, launch_flags

SCRIPT = ROOT / "tests" / "pretrain_census.py"
VERSION = os.environ.get("DEADPOOL_TEST_MEGATRON") or metadata.version("megatron-core")
ITERATIONS, AT = 6, 4
MAY = ("made", "reset", "free")  # be otherwise after a recovery
Looks = dict[int, dict[str, str]]


@dataclass(frozen=True)
class Run:
    """``@`` stands for the path of the run directory. ``only``: the megatron-core that can, as its version begins."""

    flags: str
    layout: Layout = "data"
    only: str = ""


EVALUATED = "--eval-interval 2 --eval-iters 2 --save @.ckpt --save-interval 3 --ckpt-format torch_dist"
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --disable-bias-linear "
    "--moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3"
)
RUNS = {
    "evaluations and checkpoints": Run(EVALUATED),
    "experts": Run(EXPERTS),
    "experts with a bias": Run(
        f"{EXPERTS.split(' --moe-aux')[0]} --moe-router-load-balancing-type none --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias"
    ),
    "pipeline": Run("", "pipeline"),
    # (0.18 and main need Transformer Engine for it)
    "multi-token prediction": Run("--mtp-num-layers 1 --position-embedding-type rope", only="0.19."),
    "batch-size ramp-up": Run(
        "--rampup-batch-size 2 2 12 --train-samples 32 --lr-decay-samples 80 --lr-warmup-samples 8", "pipeline"
    ),
    "rerun mode validate_results": Run("--rerun-mode validate_results"),
    "cyclic loader": Run("--dataloader-type cyclic --eval-interval 2 --eval-iters 2"),
    "asynchronous checkpoints": Run(f"{EVALUATED} --async-save"),
    "muon": Run("--optimizer muon"),
    "fp16": Run("--fp16"),
}


def _job(jobs: Jobs, name: str, run: Run, spares: int) -> tuple[Job, Path]:
    directory = jobs.directory / f"{name}-census"
    directory.mkdir()
    flags = duo_gpt(run.layout, ITERATIONS)
    new = run.flags.replace("@", str(jobs.directory / name)).split()
    if "--train-samples" in new:
        flags = without_values(flags, "--train-iters", "--lr-decay-iters", "--lr-warmup-iters")
    if "--fp16" in new:
        flags.remove("--bf16")
    if "muon" in new:
        flags = plain_optimizer(flags)
    extra = {"CENSUS_DIR": str(directory), "CENSUS_SCRIPT": str(EXAMPLE)}
    if not spares:
        return jobs.start(name, launch_flags(2, slots=1), [*flags, *new], SCRIPT, extra=extra), directory
    extra |= {"SCRIPT": str(SCRIPT)}
    return jobs.start(name, launch_flags(3, 1, slots=1), [*flags, *new], SCRIPT, held=True, extra=extra), directory


def _looks(directory: Path, rank: int) -> list[Looks]:
    """Of each process that was this rank, in the order they came."""
    files = sorted(directory.glob(f"rank-{rank}-*.json"), key=lambda path: path.stat().st_mtime)
    return [{int(iteration): look for iteration, look in json.loads(file.read_text()).items()} for file in files]


def _unlike(one: dict[str, str], other: dict[str, str]) -> Iterator[str]:
    for path in one.keys() | other.keys():
        if one.get(path) != other.get(path):
            yield path


def _changed(looks: Looks) -> set[str]:
    order = sorted(looks)
    return {path for a, b in itertools.pairwise(order) for path in _unlike(looks[a], looks[b])}


def _unnamed(paths: set[str], entries: list[Entry]) -> list[str]:
    return sorted(path for path in paths if not any(entry.names(path) for entry in entries))


_found: dict[str, tuple[set[str], set[str]]] = {}


def found(name: str, jobs: Jobs) -> tuple[set[str], set[str]]:
    """Paths of what changes in the course of the run, and of what is otherwise after a recovery than undisturbed."""
    if name not in _found:
        _found[name] = _look(RUNS[name], jobs)
    return _found[name]


def _look(run: Run, jobs: Jobs) -> tuple[set[str], set[str]]:
    want, undisturbed = _job(jobs, "undisturbed", run, 0)
    want.finished()
    job, killed = _job(jobs, "killed", run, 1)
    job.arm((0, AT, 2))
    job.finished()
    (generation,) = (event["iteration"] for event in job.events("resumed"))
    assert job.hashes() == want.hashes()
    changed, otherwise = set[str](), set[str]()
    for rank in range(2):
        (mine,) = _looks(undisturbed, rank)
        changed |= _changed(mine)
        after = _looks(killed, rank)[-1]
        otherwise |= set(_unlike(mine[generation], after[generation]))
        otherwise |= set(_unlike(mine[ITERATIONS - 1], after[ITERATIONS - 1])) if ITERATIONS - 1 in mine else set()
    return changed, otherwise


@pytest.mark.slow
@pytest.mark.versions(megatron=True, census=True)
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", RUNS)
def test_the_census_names_all_that_changes_and_all_that_a_recovery_leaves_otherwise(name: str, jobs: Jobs) -> None:
    if not VERSION.startswith(RUNS[name].only):
        pytest.skip(f"megatron-core {VERSION} cannot")
    changed, otherwise = found(name, jobs)
    missed = _unnamed(changed, list(CENSUS))
    assert not missed, "\n".join(["changes in the course of a run, and the census does not name it:", *missed])
    may = [entry for entry in CENSUS if entry.how in MAY]
    assert _unnamed(otherwise, may) == [], "is otherwise after a recovery, and the census does not say it may be"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_any_one_of_its_entries_the_census_would_miss_something(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    changed, otherwise = set[str](), set[str]()
    for name in RUNS:
        jobs = Jobs(tmp_path_factory.mktemp("census"))
        try:
            more, unlike = found(name, jobs)
        finally:
            jobs.end()
        changed, otherwise = changed | more, otherwise | unlike
    idle = []
    for entry in CENSUS:
        if entry.since > tuple(map(int, VERSION.split(".")[:2])):
            continue
        rest = [each for each in CENSUS if each is not entry]
        may = [each for each in rest if each.how in MAY]
        of_it = [{path for path in paths if entry.names(path)} for paths in (changed, otherwise)]
        if not _unnamed(of_it[0], rest) and not _unnamed(of_it[1], may):
            idle.append(entry.pattern)
    assert idle == []
