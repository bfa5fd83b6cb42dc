"""A command that starts waits for an etcd that does not answer, as long as it waits for the others; a real etcd."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from deadpool_bench.control_plane.etcd import EtcdMembers
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import EtcdStore, StoreError
from deadpool_megatron.launcher import add_agent_arguments, agent, local
from deadpool_megatron.launcher.agent_options import AgentPlan, check_agent
from deadpool_megatron.launcher.enlisting import Interrupted
from deadpool_megatron.launcher.processes import CoordinatorProcess, Processes, coordinator_settings
from deadpool_megatron.launcher.seat import Seat
from deadpool_megatron.launcher.secret import SecretSource
from etcds import need_etcd


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdMembers]:
    need_etcd()
    (tmp_path / "etcd").mkdir()
    members = EtcdMembers(tmp_path / "etcd")
    members.until_up()
    yield members
    members.end()


@pytest.fixture
def plan(etcd: EtcdMembers, tmp_path: Path) -> AgentPlan:
    (tmp_path / "train.py").touch()
    parser = argparse.ArgumentParser()
    add_agent_arguments(parser)
    line = ["--nnodes", "2", "--rdzv-id", "job", "--run-dir", str(tmp_path / "run"), str(tmp_path / "train.py")]
    line += ["--deadpool", "--deadpool-store", etcd.url, "--deadpool-lease", "2"]
    return check_agent(parser.parse_args(line), {})


@pytest.fixture
def seat(etcd: EtcdMembers, plan: AgentPlan) -> Iterator[Seat]:
    seat = Seat(plan, EtcdStore(etcd.url, "/deadpool/job/", 0.3))
    yield seat
    seat.close()


class _Back:
    """``interrupted`` of a wait, in which etcd comes back after some looks."""

    def __init__(self, etcd: EtcdMembers) -> None:
        self.looks = 0
        self._etcd = etcd

    def __call__(self) -> bool:
        self.looks += 1
        if self.looks == 4:
            self._etcd.start(0)
        return False


def test_a_store_that_is_away_for_a_moment_is_waited_for(etcd: EtcdMembers, seat: Seat) -> None:
    etcd.kill(0)
    back = _Back(etcd)
    assert seat.find_or_take(time.monotonic() + 1e6, back) is None
    assert back.looks >= 4 and seat.leadership.guard is not None


def test_what_the_store_said_is_the_error_once_the_time_is_over(etcd: EtcdMembers, seat: Seat) -> None:
    etcd.kill(0)
    with pytest.raises(StoreError, match="does not answer"):
        seat.find_or_take(time.monotonic(), lambda: False)


def test_who_is_told_to_end_meanwhile_was_interrupted(seat: Seat) -> None:
    with pytest.raises(Interrupted):
        seat.find_or_take(time.monotonic() + 1e6, lambda: True)


def test_a_store_that_goes_away_before_the_coordinator_starts_is_waited_for_too(
    etcd: EtcdMembers, seat: Seat, plan: AgentPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken, started = seat.take, list[bool](), list[object]()

    def and_away() -> bool:
        if not taken:
            taken.append(take())
            etcd.kill(0)
            return taken[0]
        return take()

    def start(*of: object) -> SimpleNamespace:
        started.append(of)
        return SimpleNamespace(port=1)

    monkeypatch.setattr(seat, "take", and_away)
    monkeypatch.setattr(agent, "CoordinatorProcess", start)  # (the process imports torch)
    source = SecretSource("", {}, plan.launch.run_dir, plan.job_name)
    host = agent._Host(plan, "127.0.0.1", Processes(), source, seat)
    place, hosted, code = host.find_or_start(0, time.monotonic() + 1e6, _Back(etcd))
    assert (place, hosted is not None, code) == (None, True, 0) and taken == [True] and len(started) == 1
    assert seat.leadership.guard is not None


def _starts(plan: AgentPlan, seat: Seat, processes: Processes) -> CoordinatorProcess:
    settings = coordinator_settings(plan.launch, "job-1", bytes(32), "127.0.0.1", 0, 60.0, plan.job_name)
    return CoordinatorProcess(processes, settings, seat.leadership)


def test_a_first_coordinator_that_finds_the_store_away_is_no_end_and_another_one_begins(
    etcd: EtcdMembers, seat: Seat, plan: AgentPlan
) -> None:
    """It goes away behind the back of who leads: while the coordinator's process starts."""
    processes = Processes()
    assert seat.take()
    etcd.kill(0)
    try:
        hosted = _starts(plan, seat, processes)
        assert not hosted.port and hosted.process.wait() == Exit.DEPOSED
        etcd.start(0)
        assert hosted.begun() is None and hosted.port
    finally:
        processes.end(5.0)


def test_launch_waits_for_a_store_that_is_away(
    etcd: EtcdMembers, seat: Seat, plan: AgentPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd.kill(0)
    back = _Back(etcd)
    monkeypatch.setattr(local.time, "sleep", lambda seconds: back())
    local._lead(plan.launch, seat.leadership)
    assert back.looks >= 4 and seat.leadership.guard is not None


def test_a_job_that_has_not_begun_is_gone_on_with_by_another_node_when_the_store_was_away(
    etcd: EtcdMembers, seat: Seat, plan: AgentPlan
) -> None:
    """Its coordinator listens, and has decided nothing yet."""
    other = Seat(plan, EtcdStore(etcd.url, "/deadpool/job/", 0.3))
    processes = Processes()
    assert seat.take()
    try:
        hosted = _starts(plan, seat, processes)
        assert hosted.port
        etcd.kill(0)
        seat.leadership.resign()  # what keeps its lease alive; etcd hears no more of it
        hosted.kill()
        etcd.start(0)
        other.campaign()
        while not other.won():
            time.sleep(0.05)
        assert other.leadership.guard is not None
    finally:
        processes.end(5.0)
        other.close()


def test_a_coordinator_that_is_deposed_before_its_node_has_a_place_is_followed_by_another_one(
    etcd: EtcdMembers, seat: Seat, plan: AgentPlan
) -> None:
    host = agent._Host(plan, "127.0.0.1", Processes(), SecretSource("", {}, plan.launch.run_dir, plan.job_name), seat)
    until = time.monotonic() + 1e6
    try:
        place, hosted, _ = host.find_or_start(0, until, lambda: False)
        assert place is None and hosted is not None
        lease = seat.leadership._lease
        assert lease is not None
        etcd.kill(0)
        assert lease.lost.wait(60.0)
        assert host.gone_on(hosted) == (Exit.DEPOSED, "") and hosted.process.poll() is not None
        back = _Back(etcd)
        while (found := host.find_or_start(0, until, back))[0] is not None:  # etcd has not missed the first one yet
            time.sleep(0.1)
        hosted = found[1]
        assert hosted is not None and hosted.port
        hosted.process.kill()
        assert host.gone_on(hosted) is None and hosted.process.poll() is None, "started again"
    finally:
        host.processes.end(5.0)
