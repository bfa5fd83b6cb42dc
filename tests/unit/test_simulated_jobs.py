"""Thousands of simulated jobs keep their promises, and each fix that the simulation asked for is still needed.

`tests/simulation` says what runs there. A seed that fails is looked at with ``python -m simulation --seed S --trace``
(in tests/); what is mended because of it is taken back here, in a run that misses it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.jobs.descendants import has_ended
from simulation import many, simulate
from simulation.faults import Profile
from simulation.mutants import MUTANTS
from simulation.run import Run
from waiting import until

_TESTS = Path(__file__).parents[1]
_BATCHES, _RUNS = 6, 125

# By fix that is taken back, a run that finds it missing: seed, and the kinds of faults that are drawn (none: all).
MISSED: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 ranks": (5, ("join",)),
    "2 tries": (12, ("resets", "kill worker")),
    "2 own": (3, ("full spare", "kill worker")),
    "4": (7, ("drain, and the spare dies",)),
    "5": (383, ("freeze coordinator",)),
    "reset": (0, ("reset control",)),
    "dropped": (188, ("drop control",)),
    "one complaint": (30, ("garbled reads", "kill worker", "kill node")),
    "7": (0, ()),
    "8": (3, ()),
    "10": (72, ()),
    "6": (9, ("late recovery",)),
    "12": (12, ("drain", "kill worker")),
    "early end": (21, ("kill worker",)),
    "kept late": (9, ("join, and the coordinator dies", "kill node")),
    "stale fetch": (945, ()),
    "given up": (12, ("damaged source",)),
    "departed": (20071, ()),
    "comes back": (105619, ()),
    "one end": (8655, ()),
    "broken new": (201, ("damage", "kill node", "freeze node")),
    "one moment": (6526, ()),
    "told before": (1367, ("kill worker", "kill coordinator", "crash coordinator soon")),
    "9": (1, ()),
    "9 again": (206, ()),
    "hangs": (29, ("freeze worker", "kill worker")),
    "lemon": (12, ()),
    "live alone": (44, ("kill worker", "kill node", "slow link")),
}
_NO_COPY = ("every copy damaged", "kill node", "lose node", "damaged file", "unreadable directory")
# The same of the durable directory, which all of these runs have.
MISSED_DURABLE: dict[str, tuple[int, tuple[str, ...]]] = {
    "read again": (46, _NO_COPY),
    "no source": (10, ("every copy damaged", "damaged file", "kill worker")),
    "no spare": (3750, ()),
    "10 save": (483, ()),
    "10 copy": (3198, ("damage", "damaged source", "kill node", "lose node")),
    "reads for ever": (5, ()),
    "10 drain": (44, ("kill node", "lose node", "kill worker")),
    "goes back": (16, _NO_COPY),
    "11": (29, ("another owner", "kill node")),
    "begins again": (10, ("damage",)),
    "heard again": (20335, ()),
}
# The same with parity, constants, or failure domains.
MISSED_SHARDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "old words": (1419, ()),
    "own constants": (32547, ()),
    "constants registered": (55, ("damage", "kill worker", "kill node")),
    "constants everywhere": (31322, ()),
}
# The same with both: the durable directory has constants too.
MISSED_BOTH: dict[str, tuple[int, tuple[str, ...]]] = {
    "constants read": (810126, ()),
    "constants drained": (728636, ()),
    "constants restored": (414, ("damage",)),
}
# The same where another job wants the durable directory.
MISSED_RIVALS: dict[str, tuple[int, tuple[str, ...]]] = {
    "11 watch": (4, ()),
}
# The same where fewer replicas go on when no spare is left.
MISSED_SHRINKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "narrowest": (6, ()),
    "stays narrow": (56, ()),
    "goes on": (44, ()),
    "shrink over": (20039, ()),
    "only recut": (50, ()),
}
# One run in thousands misses these, so a test of their own holds them: `test_core.py`, `test_core_moves.py`,
# `test_core_shrink.py`, `test_known_and_commits.py`, `test_durable_core.py`, `test_agreement.py`,
# `test_vault_parity.py`, `test_fetching.py`, `test_durable_node.py`, `test_launcher_ends.py`.
RARE = {
    "3",
    "10 spares",
    "ends once",
    "share refused",
    "1 nodes",
    "refused twice",
    "margin",
    "false alarm",
    "below floor",
    "looks again",
    "constants anew",
    "constants first",
    "constants tries",
    "has left",
    "joins late",
    "all back",
    "wait kept",
    "together",
    "wider copies",
    "constants durable",
    "width kept",
}


@pytest.mark.parametrize("batch", range(_BATCHES))
def test_no_fault_breaks_a_promise(batch: int) -> None:
    runs = [simulate(seed) for seed in range(batch * _RUNS, (batch + 1) * _RUNS)]
    broken = {run.seed: f"{run.violation} [{run.shape}; {', '.join(run.faults)}]" for run in runs if run.violation}
    assert not broken
    assert sum(run.epochs for run in runs) > _RUNS // 3, "faults struck, and were recovered from"
    assert sum(run.code == 0 for run in runs) > _RUNS // 2, "most jobs survive them"


_FEW_KINDS = ("damage", "kill node", "lose node")
# Runs in which something was found, and for whose mends there is no run above.
FOUND = (
    (713588, Profile()),
    (764939, many.mixed(764939)[1]),
    (9735, many.mixed(9735)[1]),
    (31322, many.mixed(31322)[1]),
    (39241, many.mixed(39241)[1]),
    (74589, many.mixed(74589)[1]),
    (78768, many.mixed(78768)[1]),
    (617321, many.mixed(617321)[1]),
    (1010103, many.mixed(1010103)[1]),
    (802150, many.mixed(802150)[1]),
    (600538, Profile(durable=True, shards=True, only=_FEW_KINDS)),
    (600841, Profile(durable=True, shards=True, only=_FEW_KINDS)),
    (600947, Profile(durable=True, shards=True, only=_FEW_KINDS)),
    (601571, Profile(durable=True, shards=True, only=(*_FEW_KINDS, "kill worker"))),
    (601804, Profile(durable=True, shards=True, only=(*_FEW_KINDS, "kill worker"))),
)


@pytest.mark.parametrize(("seed", "profile"), FOUND, ids=[str(seed) for seed, _ in FOUND])
def test_what_was_found_stays_mended(seed: int, profile: Profile) -> None:
    assert not simulate(seed, replace(profile, moves=False, standbys=False, together=False)).violation


def test_no_fault_breaks_a_promise_where_drains_are_upset() -> None:
    runs = [simulate(seed, Profile(moves=True, rehearsals=seed % 2 == 0)) for seed in range(60)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]
    assert sum(run.kinds["drain that is upset"] for run in runs) > 40


def test_no_fault_breaks_a_promise_where_fewer_replicas_go_on() -> None:
    runs = [simulate(seed, Profile(durable=True, shrinks=True)) for seed in range(60)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]
    assert sum(run.code == 0 for run in runs) > 40


def test_no_fault_breaks_a_promise_where_every_recovery_needs_other_processes() -> None:
    runs = [simulate(seed, Profile(restarts=True)) for seed in range(60)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]
    assert sum(run.epochs for run in runs) > 20


def test_no_fault_breaks_a_promise_where_processes_stand_by() -> None:
    runs = [simulate(seed, Profile(standbys=True, restarts=seed % 8 == 0)) for seed in range(80)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]
    assert sum(run.kinds["ends at once"] for run in runs) > 60


def test_no_fault_breaks_a_promise_where_one_gpu_takes_others_along() -> None:
    runs = [simulate(seed, Profile(signs=True)) for seed in range(60)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]
    assert sum(run.kinds["rack"] for run in runs) > 30


def test_no_fault_breaks_a_promise_where_spares_are_checked_and_some_fail() -> None:
    runs = [simulate(seed, Profile(checks=True)) for seed in range(60)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]
    assert sum(run.kinds["bad spare"] for run in runs) > 10


def test_no_fault_breaks_a_promise_where_what_is_told_is_lost_with_a_connection_that_is_replaced() -> None:
    runs = [simulate(seed, replace(many.mixed(seed)[1], replaced=0.01)) for seed in range(80)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]


def test_no_fault_breaks_a_promise_where_workers_die_together() -> None:
    runs = [simulate(seed, Profile(together=True)) for seed in range(40)]
    assert not [(run.seed, run.violation) for run in runs if run.violation]
    assert sum(run.kinds["workers together"] for run in runs) > 40


# The same where a GPU is at fault.
MISSED_SIGNS: dict[str, tuple[int, tuple[str, ...]]] = {"follows": (4, ())}
# The same where processes stand by.
MISSED_STANDBYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "stands by": (1, ("kill worker",)),
    "takes in": (62, ("kill worker",)),
}
MISSED_CHECKS: dict[str, tuple[int, tuple[str, ...]]] = {"unfit": (150, ())}
MISSED_RESTARTS: dict[str, tuple[int, tuple[str, ...]]] = {"renewing": (143, ())}
# The same where workers die together.
MISSED_TOGETHER: dict[str, tuple[int, tuple[str, ...]]] = {"together end": (148, ())}
# The same where drains are upset.
MISSED_MOVES: dict[str, tuple[int, tuple[str, ...]]] = {"drain kept": (7, ()), "drain goes on": (0, ())}
# Whatever else a seed draws.
MISSED_ANY: dict[str, tuple[int, tuple[str, ...]]] = {"broken own": (35, ("damaged source",))}
MODES = {
    Profile(): MISSED_ANY,
    Profile(restarts=True, moves=False): MISSED_RESTARTS,
    Profile(signs=True, moves=False): MISSED_SIGNS,
    Profile(standbys=True, moves=False): MISSED_STANDBYS,
    Profile(checks=True): MISSED_CHECKS,
    Profile(durable=False, shards=False, rivals=False, moves=False): MISSED,
    Profile(durable=True, shards=False, rivals=False, moves=False): MISSED_DURABLE,
    Profile(shards=True, rivals=False, moves=False): MISSED_SHARDS,
    Profile(durable=True, shards=True, moves=False): MISSED_BOTH,
    Profile(durable=True, shards=False, rivals=True, moves=False): MISSED_RIVALS,
    Profile(moves=True): MISSED_MOVES,
    Profile(together=True): MISSED_TOGETHER,
    Profile(durable=True, shrinks=True): MISSED_SHRINKS,
}


@pytest.mark.parametrize(
    ("mode", "fix"), [pytest.param(mode, fix, id=fix) for mode, missed in MODES.items() for fix in missed]
)
def test_a_fix_that_is_taken_back_is_missed(mode: Profile, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, kinds = MODES[mode][fix]
    profile = replace(mode, only=kinds)
    assert not simulate(seed, profile).violation
    MUTANTS[fix](monkeypatch)
    assert simulate(seed, profile).violation


def test_an_agent_of_an_earlier_run_is_told_to_leave_and_takes_nobodys_place() -> None:
    run = Run(3, Profile(most=0))
    while run.hq.core.phase is not Phase.RUNNING:
        run.world.step()
    answers: list[tuple[str, bytes]] = []
    run.hq.hub._answered = lambda name, packet: answers.append((name, packet))
    run.hq.hub.packets.append((b"node-0@earlier", r.encode(r.Join(0, 7, "n0", 1, [8, 9])), 1))
    run.hq._soon()
    run.hq.hub.ends.append((b"node-0@earlier", 1))
    run.run()
    ((name, packet),) = answers
    told = r.decode_from_coordinator(packet)
    assert name == "node-0@earlier" and isinstance(told, r.Stop) and told.code == Exit.FENCED
    assert run.hq.ended is not None and run.hq.ended[0] == Exit.OK and run.hq.core.nodes[0].role == "active"


def test_the_log_and_the_metrics_of_a_node_have_every_epoch_that_it_is_in() -> None:
    run = Run(9, Profile(only=("kill node",)))
    seen: dict[int, list[int]] = {}
    while run.hq.ended is None:
        assert run.world.step()
        for host in run.hosts:
            if host.known.epoch and host.known.epoch not in seen.setdefault(host.node, []):
                seen[host.node].append(host.known.epoch)
    assert seen and {host.node: host.watch.epochs for host in run.hosts if host.watch.epochs} == seen


def test_every_fix_has_a_run() -> None:
    assert {fix for missed in MODES.values() for fix in missed} | RARE == MUTANTS.keys()


def test_runs_that_were_cut_off_go_on_where_they_were_and_not_with_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "_BLOCK", 2)
    results = tmp_path / "results"
    whole = [*many.many(7, 6, None, results=results)]
    lines = results.read_text().splitlines()
    results.write_text("\n".join([*lines[:2], lines[2][:30]]))  # killed while it wrote the second block
    again = [*many.many(7, 6, None, results=results)]
    assert [{**block, "cpu_s": 0} for block in again] == json.loads(json.dumps([{**b, "cpu_s": 0} for b in whole]))
    assert len(results.read_text().splitlines()) == len(lines) == 4
    assert "6 runs of seeds 7 to 12; 0 violations" in many.summary(again)
    with pytest.raises(ValueError, match="take another file"):
        next(many.many(7, 6, Profile(), results=results))


def test_a_seed_is_one_run_to_the_message() -> None:
    first, again = (simulate(3, trace=True) for _ in range(2))
    assert len(first.trace) > 300 and first.trace == again.trace
    assert simulate(4, trace=True).trace != first.trace


@pytest.mark.timeout(60)
def test_who_kills_the_command_leaves_none_of_its_processes() -> None:
    command = [sys.executable, "-m", "simulation", "--mixed", "--seeds", "100000", "--processes", "2"]
    children: list[psutil.Process] = []
    running = psutil.Popen(command, cwd=_TESTS, stdout=subprocess.DEVNULL)
    try:
        until(lambda: len(running.children()) == 2, "its two processes")
        children = running.children()
        until(lambda: all(sum(child.cpu_times()[:2]) > 0.2 for child in children), "that they have begun")
        for child in children:
            child.suspend()  # (else they end by themselves when they have something to say)
        running.kill()
        until(lambda: all(map(has_ended, children)), "their end")
    finally:
        for process in [*running.children(), *children, running]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait()
