"""Every crash point is passed somewhere, and nothing is told or begun without one."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import deadpool_megatron
from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.megatron import faults

PACKAGE = Path(deadpool_megatron.__file__).parent
_LITERAL = re.compile(r'(?:reach\(|before=|after=)"([a-z.-]+)"')


@pytest.fixture(autouse=True)
def _nothing_armed() -> Iterator[None]:
    yield
    points.disarm()
    points.iteration_is(-1)


def passed_by_name() -> set[str]:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "points.py"]
    return {name for source in sources for name in _LITERAL.findall(source)}


def by_construction() -> set[str]:
    families = {"worker": r.WorkerRecord, "agent": r.AgentRecord, "coordinator": r.CoordinatorRecord}
    names = {
        f"{who}.{points.kebab(each.__name__)}" for who, union in families.items() for each in typing.get_args(union)
    }
    return names | {f"step.{step}" for step in typing.get_args(r.Step)}


def test_every_point_in_the_sources_is_in_the_registry() -> None:
    assert passed_by_name() <= set(points.POINTS)


def test_every_point_of_the_registry_is_passed_in_the_sources_or_with_every_message() -> None:
    assert set(points.POINTS) - passed_by_name() - by_construction() == set()


def test_no_message_can_be_sent_without_a_point() -> None:
    tools = {"agent.inject", "agent.drain", "agent.enlist", "agent.add-spare"}
    assert by_construction() - set(points.POINTS) == tools | {"worker.worker-step"}
    senders = {"cluster/agent.py": '"agent", record', "recovery/session.py": '"worker", record'}
    senders["cluster/coordinator.py"] = '"coordinator", action.record'
    for path, what in senders.items():
        assert f"points.reach_record({what})" in (PACKAGE / path).read_text()


def test_every_phase_of_a_recovery_has_points_of_the_worker_and_of_the_agent() -> None:
    for step, record in (
        ("ready", r.NodeReady),
        ("formed", r.NodeFormed),
        ("restored", r.NodeRestored),
        ("resumed", r.NodeResumed),
    ):
        assert f"step.{step}" in points.POINTS and f"agent.{points.kebab(record.__name__)}" in points.POINTS


def test_points_inside_of_other_peoples_code_have_a_place_that_is_wrapped_when_armed() -> None:
    inside = {name.split(".")[0] for name in points.POINTS if name.split(".")[0] in faults._INSIDE}
    assert inside == set(faults._INSIDE)


def test_a_fault_strikes_once_at_its_point_and_not_before_its_iteration() -> None:
    struck: list[int] = []
    points.arm("slice.before", 5, lambda: struck.append(1))
    for iteration in (3, 4, 5, 5, 6):
        points.iteration_is(iteration)
        points.reach("slice.after")
        points.reach("slice.before")
        assert len(struck) == (iteration >= 5)


def test_a_message_passes_the_point_of_its_name() -> None:
    struck: list[int] = []
    points.arm("agent.node-ready", -1, lambda: struck.append(1))
    points.reach_record("agent", r.NodeFormed(1, 0, 3))
    assert not struck
    points.reach_record("agent", r.NodeReady(1, 0))
    assert struck
