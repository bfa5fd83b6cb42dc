"""Parked spares look whether they could take over; who could not does not, and training notices nothing of it."""

from __future__ import annotations

import json

import pytest

from flags import duo_gpt
from jobs import Jobs, assert_same_training, launch_flags, undisturbed

ITERATIONS = 6


@pytest.mark.timeout(240)
def test_a_spare_that_fails_its_check_is_passed_over_bit_for_bit(jobs: Jobs) -> None:
    """Two nodes train, three are spares. Node 2 computes wrong numbers, node 3 is checked while it takes over."""
    flags = duo_gpt("data", iters=ITERATIONS)
    job = jobs.start("checked", launch_flags(5, 3, slots=1), [*flags, "--deadpool-spare-check", "0.5"], held=True)
    job.until("checks", lambda: {e["node"] for e in job.events("checked") if e["link_s"] > 0} == {2, 3, 4})
    assert job.command("inject", "--node", "2", "--fault", "fail-check").returncode == 0
    unfit = job.until_event("unfit")
    assert unfit["node"] == 2 and unfit["cause"].startswith("worker 0: a product of matrices on cpu is wrong")
    refused = job.command("inject", "--node", "1", "--fault", "fail-check")
    assert refused.returncode and "node 1 is no spare" in refused.stderr
    job.until("status", lambda: [s["unfit"] != "" for s in job.status()["spares"]] == [True, False, False])
    told = json.loads(job.command("nodes", "--json").stdout)
    assert [bool(node["unfit"]) for node in told] == [False, False, True, False, False]
    assert told[2]["failures"][0]["kind"] == "check" and told[2]["lemon"]
    assert "failed the last check, and taken last: node 2" in job.command("status").stdout
    job.arm((1, 2, 2))
    job.finished()
    assert [e["nodes"] for e in job.events("declared")] == [[0, 3]]
    assert_same_training(job, undisturbed(launch_flags(2, slots=1), flags), ITERATIONS, rank=1, mute=frozenset({1}))
