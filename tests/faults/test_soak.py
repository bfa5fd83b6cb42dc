"""Random faults of every class and at every crash point, one after the other, with nodes that come back.

The seed is printed and can be set, and so can the number of faults::

    DEADPOOL_TEST_FAULTS=100 DEADPOOL_TEST_SEED=1 python -m pytest -m slow -s tests/faults/test_soak.py
"""

from __future__ import annotations

import os
import random

import pytest

from crash_cases import GROUPS
from crashes import CALM_S, COORDINATES, Gauntlet, differences, gauntlet_flags, write_results
from jobs import PACED, Jobs, launch_flags

# What `deadpool inject` does at once, and the event that tells of it.
AT_ONCE = {
    "kill": "detected",
    "kill-worker": "detected",
    "kill-agent": "detected",
    "stop": "stuck",
    "stop-agent": "detected",
    "kill-coordinator": "coordinator_back",
}
MOVES = ("abort", "drain", "damage")
# Points that training passes by itself, or in the recovery from something simple.
POINTS = [
    case
    for group in ("iteration", "survivor", "survivor-in-swap", "spare", "agent")
    for case in GROUPS[group]
    if case.role != "coordinator" and case.trigger in ("", "abort", "swap")
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_soak_of_random_faults_with_nodes_that_come_back(jobs: Jobs) -> None:
    seed = int(os.environ.get("DEADPOOL_TEST_SEED", random.SystemRandom().randrange(1 << 30)))
    faults = int(os.environ.get("DEADPOOL_TEST_FAULTS", "30"))
    print(f"seed {seed}, {faults} faults")
    rng = random.Random(seed)
    iterations = 40 + 15 * faults
    pace = jobs.directory / "calm.pace"
    pace.write_text(CALM_S)
    flags = gauntlet_flags(iterations)
    calm = jobs.start("calm", launch_flags(COORDINATES, 0, 1), flags, PACED, extra={"PACE_FILE": str(pace)})
    calm.finished(1500)
    gauntlet = Gauntlet(jobs, "soak", iterations)
    coordinators = 0
    try:
        for number in range(faults):
            kinds = [*AT_ONCE, *MOVES, *["point"] * 6]
            if coordinators > number // 6:  # its launcher takes many within two minutes for no accident
                kinds.remove("kill-coordinator")
            kind, rank = rng.choice(kinds), rng.randrange(COORDINATES)
            print(f"{number}: {kind} on rank {rank}", flush=True)
            coordinators += kind == "kill-coordinator"
            if kind in AT_ONCE:
                gauntlet.suffer([kind], AT_ONCE[kind], rank)
            elif kind == "point":
                gauntlet.face(rng.choice(POINTS))
            else:
                _move(gauntlet, kind, rank)
        got = gauntlet.finish()
    finally:
        gauntlet.end()
    assert differences(got, calm) == []
    row = {"class": f"a soak of random faults (seed {seed})", "times": faults, "detected_s": [], "recovered_s": []}
    write_results("soak", [row | {"lost_iterations": max([0, *(r.lost_iterations for r in gauntlet.results)])}])


def _move(gauntlet: Gauntlet, kind: str, rank: int) -> None:
    def happen() -> None:
        node = str(gauntlet.node_of(rank))
        if kind == "abort":
            gauntlet.command("inject", "--fault", "abort")
        elif kind == "drain":
            gauntlet.command("drain", "--node", node)
        else:
            gauntlet.command("inject", "--node", node, "--fault", "corrupt", "--at", "agent.worker-exited")
            gauntlet.command("inject", "--node", node, "--fault", "kill-worker")

    gauntlet.recovers(happen)
