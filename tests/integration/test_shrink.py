"""Without a spare a job goes on with fewer replicas, and with more when nodes come, bit for bit as one of that width
from the same generation."""

from __future__ import annotations

import itertools
import os
import random
import time
from pathlib import Path

import pytest

from deadpool_bench.changes import warm
from flags import tiny_gpt, with_value
from jobs import Jobs, launch_flags
from shrinking import Shrinking

ITERATIONS = 7
SMALL = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]


@pytest.mark.timeout(400)
def test_a_job_that_loses_all_nodes_but_one_ends_bitwise_as_one_of_that_width(jobs: Jobs) -> None:
    it = Shrinking(jobs, "narrower", [*with_value(tiny_gpt(iters=ITERATIONS), "--num-layers", 2), *SMALL], 3)
    job = it.job
    it.lose_node_1()
    job.until_event("shrunk")
    job.until("the new start to train", lambda: job.events("training")[-1]["width"] == 2)
    job.arm((0, 5, 2))  # in the workers that the new start has begun with
    job.finished(300)
    assert [(e["width"], e["was"], e["nodes"]) for e in it.compare()] == [(2, 3, [0, 2]), (1, 2, [2])]


@pytest.mark.timeout(400)
def test_a_replica_comes_back_with_a_node_and_training_goes_on_bitwise_as_one_of_that_width(jobs: Jobs) -> None:
    """Without an import: who survives is forked by the warm server of its node, who joins has made them as a spare."""
    it = Shrinking(jobs, "wider", [*with_value(tiny_gpt(iters=12), "--num-layers", 2), *SMALL], 2, real=True)
    it.job.hold(1)
    it.job.until_event("training")
    it.job.until("warm servers", lambda: warm(it.job))
    it.lose_node_1()
    it.job.until_event("shrunk")
    it.join()
    it.job.until_event("parked")
    (parked,) = it.job.status()["spares"][0]["pids"]
    it.job.hold(8)
    it.job.until_event("grown")
    it.job.until("all to train", lambda: it.job.events("training")[-1]["width"] == 2)
    forked, began = (each["pid"] for each in it.job.status()["coordinates"])
    assert began == parked
    assert b"\0DEADPOOL_ORDERS_FD=" in Path(f"/proc/{forked}/environ").read_bytes()
    it.ended()
    assert [(e["event"], e["width"], e["nodes"]) for e in it.compare()] == [("shrunk", 1, [0]), ("grown", 2, [0, 2])]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replicas", [2, 4])
def test_the_healthy_nodes_of_a_replica_that_leaves_are_spares_and_the_next_loss_is_a_swap(
    jobs: Jobs, replicas: int
) -> None:
    """Pipelines of two nodes: of the second replica one is lost, and the other one takes the next one's place."""
    it = Shrinking(jobs, f"swapped-{replicas}", tiny_gpt(iters=ITERATIONS), 2 * replicas, 2)
    job = it.job
    it.lose_node_1()
    (event,) = job.until("the shrink", lambda: job.events("shrunk"))
    assert event["width"] == replicas - 1 and event["spares"] == [replicas + 1]
    job.until_event("parked")
    job.arm((0, 5, 2))
    job.finished(600)
    assert len(it.compare()) == 1 and job.events("resumed")
    swapped = job.events("declared")[-1]
    assert swapped["purpose"] == "resume" and replicas + 1 in swapped["nodes"] and 0 not in swapped["nodes"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_of_several_nodes_comes_back_with_one_node(jobs: Jobs) -> None:
    """TP2 x PP2 x DP2 on four nodes: the healthy node of the broken replica has stayed as a spare."""
    it = Shrinking(jobs, "pipelines", tiny_gpt(iters=12), 4, 2)
    it.shrinks_and_grows(2)
    assert [(e["width"], e["spares"]) for e in it.compare()] == [(1, [3]), (2, [])]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_of_experts_leave_and_come_back_as_many_as_hold_all_experts(jobs: Jobs) -> None:
    """Four replicas of two places of experts: without one node there are two, and the third node is a spare."""
    it = Shrinking(jobs, "experts", [*tiny_gpt(moe=True, iters=12), *SMALL], 4)
    it.shrinks_and_grows(2)
    assert [(e["width"], len(e["nodes"]), len(e["spares"])) for e in it.compare()] == [(2, 2, 1), (4, 4, 0)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_soak_of_losses_and_joins_never_ends_before_its_last_iteration(jobs: Jobs) -> None:
    """At any time, in starts too, as long as a node is left; 0 to 2 spares.

    DEADPOOL_TEST_FAULTS=100 DEADPOOL_TEST_SEED=1 python -m pytest -m slow -s tests/integration/test_shrink.py -k soak
    """
    seed = int(os.environ.get("DEADPOOL_TEST_SEED", random.SystemRandom().randrange(1 << 30)))
    moves = int(os.environ.get("DEADPOOL_TEST_FAULTS", "40"))
    print(f"seed {seed}, {moves} losses and joins")
    rng = random.Random(seed)
    flags = [*with_value(tiny_gpt(iters=6 * moves + 10), "--num-layers", 2), *SMALL]
    it = Shrinking(jobs, "soak", flags, 3, interval=2)  # of what one node has alone there is no other copy
    job = it.job
    it.lose_node_1()
    job.until_event("durable")
    lost = {1}
    for move in range(moves):
        job.hold(6 * (move + 1))
        time.sleep(rng.choice((0.0, rng.uniform(0.0, 1.0), rng.uniform(0.0, 6.0))))
        nodes = {0, 2, *(event["node"] for event in job.events("joined"))} - lost
        if len(nodes) > 1 and (len(nodes) > 4 or rng.random() < 0.5):
            node = rng.choice(sorted(nodes))
            lost.add(node)
            print(f"{move}: node {node} is lost, and {sorted(nodes - lost)} stay", flush=True)
            said = job.command("inject", "--node", str(node))
            assert said.returncode == 0, said.stderr
            job.until("the loss", lambda node=node: node in {event["node"] for event in job.events("detected")})
        elif len(nodes) < 5:
            print(f"{move}: a node joins {sorted(nodes)}", flush=True)
            before = len(job.events("joined"))
            it.join()
            job.until("it to join", lambda before=before: len(job.events("joined")) > before)
    it.ended()
    widths = [str(width) for width, _ in itertools.groupby(it.compare_end())]
    print(f"widths: {', '.join(widths)}")


def test_what_cannot_shrink_is_refused_before_anything_begins(jobs: Jobs) -> None:
    flags = [*with_value(tiny_gpt(iters=ITERATIONS), "--num-layers", 2), *SMALL, "--dataloader-type", "cyclic"]
    job = jobs.start("sampled", launch_flags(2, 0, 1), [*flags, "--deadpool-when-out-of-spares", "shrink"])
    assert job.wait() == 2 and "with dataloader_type cyclic a job has to keep its number of replicas" in job.output
