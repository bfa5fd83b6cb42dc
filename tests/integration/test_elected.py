"""An elected coordinator: real agents, a real etcd, and machines and members that go."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deadpool_bench.control_plane.etcd import EtcdMembers
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import EtcdStore
from deadpool_megatron.cluster.store.leadership import known_place
from deadpool_megatron.observe import read_events
from etcds import need_etcd
from flags import tiny_gpt
from jobs import EXAMPLE, PACED, assert_same_training, launch_flags, set_pace, undisturbed
from machines import Machines, MachinesJob

pytestmark = pytest.mark.slow

SCRIPT = (
    "import os, pathlib, time\n"
    "here = pathlib.Path(__file__).parent\n"
    "(here / ('up-' + os.environ['RANK'])).touch()\n"
    "while not (here / 'finish').exists():\n"
    "    time.sleep(0.05)\n"
)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    all_machines = Machines(tmp_path)
    yield all_machines
    all_machines.end()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdMembers]:
    need_etcd()
    (tmp_path / "etcd").mkdir()
    members = EtcdMembers(tmp_path / "etcd", 3)
    try:
        members.until_up()
        yield members
    finally:
        members.end()


class ElectedJob:
    """A job without training, which shows who leads and who is connected."""

    def __init__(self, machines: Machines, etcd: EtcdMembers, nodes: int = 3) -> None:
        self.machines = machines
        self.store = EtcdStore(etcd.url, "/deadpool/job/", 20.0)
        script = machines.directory / "script.py"
        script.write_text(SCRIPT)
        line = ["--nnodes", str(nodes), "--rdzv-id", "job"]
        env = {"DEADPOOL_STORE": etcd.url, "DEADPOOL_LEASE": "2"}
        for n in range(nodes):
            machines.start([*line, "--node-rank", str(n), "--local-addr", f"127.0.0.{n + 1}"], [str(script)], env)
        machines.until("workers", lambda: len(list(machines.directory.glob("up-*"))) == nodes)

    def leader(self) -> int:
        """The machine that has the coordinator."""
        place = known_place(self.store)
        assert place is not None
        return int(place.host.rsplit(".", 1)[1]) - 1

    def status(self) -> dict[str, Any]:
        """What the coordinator says."""
        status: dict[str, Any] = json.loads((self.machines.run_dir / "status.json").read_text())
        return status

    def events(self, name: str) -> list[dict[str, Any]]:
        """All of one name."""
        return [e for e in read_events(self.machines.run_dir) if e["event"] == name]

    def finish(self, machines: list[int]) -> None:
        """The script ends well on these machines, and so does the job."""
        (self.machines.directory / "finish").touch()
        assert [self.machines.code(n) for n in machines] == [0] * len(machines), self.machines.outputs()


def test_the_coordinators_machine_is_killed_and_another_one_leads_without_anybody_restarting(
    machines: Machines, etcd: EtcdMembers
) -> None:
    job = ElectedJob(machines, etcd)
    first = job.leader()
    left = [n for n in range(3) if n != first]
    machines.kill_tree(first)
    machines.until("another leader", lambda: (p := known_place(job.store)) and int(p.host[-1]) - 1 != first)
    # DeadPool is off in this job, so the loss of a node ends it, by the word of the new coordinator.
    assert [machines.code(n) for n in left] == [Exit.FAILED] * 2
    assert job.events("coordinator_back")[0]["nodes"] == [0, 1, 2]
    assert all(f"node {first} was lost" in machines.output(n) for n in left)


def test_an_etcd_that_is_away_for_longer_than_a_lease_before_the_job_has_begun_costs_nothing(
    machines: Machines, etcd: EtcdMembers
) -> None:
    """Node 0 leads, and waits for node 1."""
    script = machines.directory / "script.py"
    script.write_text(SCRIPT)
    env = {"DEADPOOL_STORE": etcd.url, "DEADPOOL_LEASE": "2"}
    line = ["--nnodes", "2", "--rdzv-id", "job"]
    store = EtcdStore(etcd.url, "/deadpool/job/", 20.0)
    machines.start([*line, "--node-rank", "0", "--local-addr", "127.0.0.1"], [str(script)], env)
    machines.until("a coordinator", lambda: known_place(store))
    machines.until("its node", lambda: list(machines.run_dir.glob("node-0.jsonl")))
    for member in range(3):
        etcd.kill(member)
    time.sleep(6.0)  # a lease, by whatever clock
    for member in range(3):
        etcd.start(member)
    machines.start([*line, "--node-rank", "1", "--local-addr", "127.0.0.2"], [str(script)], env)
    machines.until("workers", lambda: len(list(machines.directory.glob("up-*"))) == 2)
    (machines.directory / "finish").touch()
    assert [machines.code(n) for n in range(2)] == [0, 0], machines.outputs()


def test_a_command_that_comes_while_a_dead_leaders_lease_lasts_does_not_stay_at_its_address(
    machines: Machines, etcd: EtcdMembers
) -> None:
    script = machines.directory / "script.py"
    script.write_text(SCRIPT)
    line = ["--nnodes", "1", "--node-rank", "0", "--rdzv-id", "job", "--local-addr", "127.0.0.1"]
    env = {"DEADPOOL_STORE": etcd.url, "DEADPOOL_LEASE": "15"}
    up = machines.directory / "up-0"
    machines.start(line, [str(script)], env)
    machines.until("its worker", up.exists)
    machines.kill_tree(0)
    up.unlink()
    machines.start(line, [str(script)], env)
    machines.until("the worker of the next", up.exists)
    (machines.directory / "finish").touch()
    assert machines.code(1) == 0, machines.outputs()


def test_an_etcd_member_is_killed_another_cut_off_and_all_are_restarted_and_the_job_does_not_notice(
    machines: Machines, etcd: EtcdMembers
) -> None:
    job = ElectedJob(machines, etcd)
    for member in range(3):
        etcd.kill(member, signal.SIGSTOP if member == 1 else signal.SIGKILL)
        time.sleep(3.0)  # longer than the lease
        if member == 1:
            etcd.kill(member, signal.SIGCONT)
        else:
            etcd.start(member)
        etcd.until_up(f"etcd://{etcd.endpoints[member]}")
    for member in range(3):
        etcd.kill(member)
    time.sleep(4.0)  # the leader cannot know any more that it leads, and steps down
    for member in range(3):
        etcd.start(member)
    etcd.until_up()
    job.machines.until("a coordinator again", lambda: (p := known_place(job.store)) and p.term > 0)
    job.finish([0, 1, 2])
    assert not job.events("detected"), "nobody was lost"


def test_a_leader_that_etcd_does_not_hear_steps_down_and_its_late_writes_are_refused(
    machines: Machines, etcd: EtcdMembers
) -> None:
    job = ElectedJob(machines, etcd)
    first, place = job.leader(), known_place(job.store)
    assert place is not None
    # The command holds the lease: stopped, it cannot keep it alive, while its coordinator goes on.
    machines.started[first].send_signal(signal.SIGSTOP)
    try:
        machines.until("another leader", lambda: (p := known_place(job.store)) and p.term != place.term)
    finally:
        machines.started[first].send_signal(signal.SIGCONT)
    machines.until("the agents' return", lambda: job.status()["coordinator_pid"] and job.events("coordinator_back"))
    job.finish([0, 1, 2])
    assert not job.events("detected")


@pytest.mark.timeout(240)
def test_the_embedded_stores_host_is_killed_and_comes_back_and_the_job_goes_on(machines: Machines) -> None:
    script = machines.directory / "script.py"
    script.write_text(SCRIPT)
    line = ["--nnodes", "2", "--emulate-cpu", "--rdzv-endpoint", f"127.0.0.1:{machines.port}"]
    command = [str(script), "--deadpool"]  # for its vaults: by them a job is seen to live
    machines.start(line, command, command="coordinator")
    for n in (0, 1):
        machines.start([*line, "--node-rank", str(n), "--no-coordinator"], command)
    machines.until("workers", lambda: len(list(machines.directory.glob("up-*"))) == 2)
    job = (machines.run_dir / "job.json").read_text()
    machines.kill_tree(0)
    time.sleep(2.0)
    machines.start(line, command, command="coordinator")
    machines.until("its return", lambda: "goes on here" in machines.output(3))
    machines.until("a coordinator", lambda: (machines.run_dir / "job.json").read_text() != job)
    assert json.loads((machines.run_dir / "job.json").read_text())["secret"] == json.loads(job)["secret"]
    (machines.directory / "finish").touch()
    assert [machines.code(n) for n in (1, 2, 3)] == [0, 0, 0], machines.outputs()
    events = [e["event"] for e in read_events(machines.run_dir)]
    assert "coordinator_back" in events and "detected" not in events


def _without_machine_0(machines: Machines, committed: int) -> tuple[MachinesJob, int]:
    """A job that trains, and has lost that machine once a generation was committed; the worker of rank 1."""
    job = MachinesJob(machines)
    job.process = machines.started[1]
    job.until_event("training")
    job.until("a commit", lambda: job.status()["generation"]["committed"] >= committed)
    survivor = job.pids()[1]
    machines.kill_tree(0)
    return job, survivor


@pytest.mark.timeout(400)
def test_the_machine_of_node_0_comes_back_with_its_coordinator_and_becomes_a_spare(machines: Machines) -> None:
    """The same command given again, as a batch system would: the others train on without a coordinator meanwhile."""
    flags = [*tiny_gpt("none", iters=300), "--tensor-model-parallel-size", "1"]
    line = ["--nnodes", "3", "--spare-nodes", "1", "--emulate-cpu", "--tee", "none"]
    line += ["--rdzv-endpoint", f"127.0.0.1:{machines.port}"]
    set_pace(machines.pace, 0.2)
    for n in range(3):
        machines.start([*line, "--node-rank", str(n)], [str(PACED), *flags, "--deadpool"])
    job, survivor = _without_machine_0(machines, committed=2)
    machines.start([*line, "--node-rank", "0"], [str(PACED), *flags, "--deadpool"])
    assert job.until_event("joined")["node"] == 3
    assert [e["lost"] for e in job.events("declared")] == [[0]]
    set_pace(machines.pace, 0)
    assert [machines.code(n) for n in (1, 2, 3)] == [0, 0, 0], machines.outputs()
    assert job.pids()[1] == survivor
    machines.until_gone()


@pytest.mark.timeout(400)
def test_training_loses_the_machine_of_node_0_which_leads_and_ends_bitwise_equal(
    machines: Machines, etcd: EtcdMembers
) -> None:
    iterations = 60
    flags = [*tiny_gpt("none", iters=iterations), "--tensor-model-parallel-size", "1"]
    want = undisturbed(launch_flags(2, slots=1), flags)
    hash_file = Path(f"{machines.run_dir}.hash.json")
    script = [str(EXAMPLE), *flags, "--deadpool", "--deadpool-state-hash", str(hash_file)]
    line = ["--nnodes", "3", "--spare-nodes", "1", "--emulate-cpu", "--tee", "none", "--rdzv-id", "train"]
    env = {"DEADPOOL_STORE": etcd.url}
    store = EtcdStore(etcd.url, "/deadpool/train/", 20.0)
    for n in range(3):
        machines.start([*line, "--node-rank", str(n), "--local-addr", f"127.0.0.{n + 1}"], script, env)
        machines.until("the first leader", lambda: known_place(store))
    place = known_place(store)
    assert place is not None and place.host == "127.0.0.1"
    job, survivor = _without_machine_0(machines, committed=5)
    assert [machines.code(n) for n in (1, 2)] == [0, 0], job.log_tails()
    assert [e["lost"] for e in job.events("declared")] == [[0]]
    assert job.events("coordinator_back") and job.pids()[1] == survivor
    machines.until_gone()
    assert_same_training(job, want, iterations, rank=1)
