"""A real job: one machine is at fault and takes another along, then a file names a node that is to be taken away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flags import tiny_gpt
from jobs import Jobs, assert_same_training, launch_flags, set_pace, undisturbed

ITERATIONS = 16


@pytest.mark.timeout(400)
def test_the_node_at_fault_is_replaced_who_follows_stays_and_who_is_named_in_a_file_is_drained(
    jobs: Jobs, tmp_path: Path
) -> None:
    flags, drain = tiny_gpt("none", iters=ITERATIONS), tmp_path / "drain"
    ours = ["--deadpool-drain-from", f"file:{drain}", "--deadpool-drain-poll", "0.2"]
    job = jobs.start("blame", launch_flags(4, 2), [*flags, *ours], held=True)
    job.until_event("training")
    job.until("both spares parked", lambda: {e["node"] for e in job.events("parked")} >= {2, 3})
    # Both workers die in one iteration: whose end is heard of first is left to chance, as on a real rack.
    for node, sign in ((1, "xid:145"), (0, "xid:149")):
        done = job.command("inject", "--node", str(node), "--sign", sign)
        assert done.stdout == f"deadpool: {sign} on node {node}, now\n"
        job.command("inject", "--node", str(node), "--fault", "kill-worker", "--at-iteration", "3")
    job.until("both signs", lambda: len(job.events("sign")) == 2)
    job.hold(None)
    job.until("node 0 has left", lambda: [e for e in job.events("left") if e["node"] == 0])
    pace = jobs.directory / "blame.pace"
    set_pace(pace, 0.3)
    nodes: list[dict[str, Any]] = json.loads(job.command("nodes", "--json").stdout)
    kinds = {node["node"]: [failure["kind"] for failure in node["failures"]] for node in nodes}
    assert "sign" in kinds[0] and not kinds[1], kinds
    assert {node["node"]: node["state"] for node in nodes}[0] == "left"
    assert "Xid 149: NVLink NETIR error" in job.command("nodes").stdout
    assert {node for e in job.events("declared") for node in e["lost"]} == {0}
    assert job.events("declared")[-1]["nodes"] == [2, 1], "one spare is spent, and node 1 has its worker again"
    job.until("training again", lambda: job.events("resumed"))

    drain.write_text("1 its fan is loud\n")
    job.until("node 1 has left", lambda: [e for e in job.events("left") if e["node"] == 1])
    set_pace(pace, 0)
    job.finished()
    assert job.events("drain_wanted")[0]["cause"] == "its fan is loud"
    assert job.events("declared")[-1]["nodes"] == [2, 3]
    assert_same_training(job, undisturbed(launch_flags(2), flags), ITERATIONS, rank=3, mute=frozenset({2}))
