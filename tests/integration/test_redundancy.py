"""Real jobs lose exactly the nodes that the printed sentence says may be lost, and one set that it says may not."""

from __future__ import annotations

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from flags import tiny_gpt
from jobs import Job, Jobs, launch_flags, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
ITERATIONS = 7


def _flags(nodes: int, redundancy: str, *more: str) -> list[str]:
    """One rank a node, data-parallel."""
    flags = tiny_gpt("none", iters=ITERATIONS)
    flags[flags.index("--tensor-model-parallel-size") + 1] = "1"
    flags[flags.index("--global-batch-size") + 1] = str(2 * nodes)
    return [*flags, "--deadpool-redundancy", redundancy, *more]


def _lost_at_once(job: Job, nodes: tuple[int, ...], iteration: int = 3) -> None:
    job.arm(*((node, iteration, 1) for node in nodes))


@pytest.mark.parametrize(
    ("redundancy", "active", "lost"),
    [("1", 4, (0, 1)), ("2", 4, (1, 2)), ("2+1", 3, (1,)), ("2+2", 4, (0, 3))],
)
def test_nodes_that_may_be_lost_at_once_are_lost_and_the_run_ends_bit_for_bit_the_same(
    jobs: Jobs, redundancy: str, active: int, lost: tuple[int, ...]
) -> None:
    name = f"{redundancy}-{len(lost)}"
    want = undisturbed(launch_flags(active, 0, 1), _flags(active, redundancy))
    job = jobs.start(
        f"lost-{name}", launch_flags(active + len(lost), len(lost), 1), _flags(active, redundancy), held=True
    )
    _lost_at_once(job, lost)
    job.until_event("training")
    fatal = job.until_event("placed")["fatal"]
    assert not any(set(each) <= set(lost) for each in fatal), "the sentence says these may be lost"
    job.finished()
    gone = {node for each in job.events("declared") for node in each["lost"]}
    assert gone == set(lost) and job.hashes() == want.hashes()
    assert job.status()["protection"]["full"] and job.events("protected")[-1]["epoch"] > 0
    if "+" in redundancy:
        assert job.events("agreed")[-1]["rebuilds"]


def test_one_node_more_than_may_be_lost_ends_the_job_with_the_sentence(jobs: Jobs) -> None:
    job = jobs.start("beyond", launch_flags(6, 2, 1), _flags(4, "1"), held=True)
    _lost_at_once(job, (0, 2))
    assert [0, 2] in job.until_event("placed")["fatal"], "the sentence says that these may not be lost together"
    assert job.wait() == Exit.GENERATION_LOST
    said = job.output
    assert "more nodes were lost than the redundancy covers, which is any 1 node; any 2 nodes but these" in said


def test_a_whole_rack_that_is_lost_at_once_with_its_spare_goes_on_on_the_other_ones_spares(jobs: Jobs) -> None:
    """Two nodes of each rack train. Of the one that is lost the spare goes a moment later; the other one has two."""
    want = undisturbed(launch_flags(4, 0, 1), _flags(4, "1"))
    domains = ("--deadpool-domains", "0-1=r1,2-3=r2,4=r1,5-6=r2")
    job = jobs.start("a-rack", launch_flags(7, 3, 1), _flags(4, "1", *domains), held=True)
    assert job.until_event("placed")["tolerated"].endswith("; any 1 rack")
    job.until("spares", lambda: [spare["state"] for spare in job.status()["spares"]] == ["parked"] * 3)
    job.until("status", lambda: "a whole rack lost at once, its spares too: r1" in job.command("status").stdout)
    assert job.command("inject", "--node", "4", "--at", "agent.node-arrived").returncode == 0  # as it takes over
    _lost_at_once(job, (0, 1))
    job.finished()
    assert {node for each in job.events("declared") for node in each["lost"]} == {0, 1, 4}
    assert {c["node"] for c in job.status()["coordinates"]} == {2, 3, 5, 6} and job.hashes() == want.hashes()


def test_pairs_are_split_over_the_racks_that_the_user_names(jobs: Jobs) -> None:
    job = jobs.start("racks", launch_flags(4, 0, 1), _flags(4, "1", "--deadpool-domains", "0-1=r1,2-3=r2")).finished()
    (placed,) = job.events("placed")
    assert placed["tolerated"].endswith("; any 1 rack")
    assert all({node // 2 for node in group} == {0, 1} for group in placed["groups"])
    assert "[deadpool] a committed generation survives the loss of any 1 node" in job.output
    assert {event["node"] for event in job.events("memory")} == {0, 1, 2, 3}
