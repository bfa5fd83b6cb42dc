"""No crash point is without a case that shows what happens there."""

from __future__ import annotations

from crash_cases import ELSEWHERE, ENDS, GROUPS, REPRESENTATIVE, known
from deadpool_megatron import points
from deadpool_megatron.cluster import records as r  # noqa: F401 - adds the points of messages


def test_every_crash_point_has_a_case_or_a_reason() -> None:
    assert known() == set(points.POINTS)


def test_nobody_is_the_victim_of_another_kind_of_process_s_point() -> None:
    for case in [case for cases in GROUPS.values() for case in cases] + REPRESENTATIVE:
        where = points.POINTS[case.point][0]
        assert (where == "coordinator") == (case.role == "coordinator") == (case.fault == "kill-coordinator"), case


def test_what_has_a_case_needs_no_reason() -> None:
    in_runs = {case.point for cases in GROUPS.values() for case in cases}
    assert not in_runs & set(ENDS) and not (in_runs | set(ENDS)) & set(ELSEWHERE)


def test_the_phases_of_a_recovery_befall_survivors_and_spares() -> None:
    pairs = {(case.point, case.role) for cases in GROUPS.values() for case in cases}
    phases = [name for name in points.names("worker") if name.startswith("recovery.")]
    phases += ["step.ready", "step.formed", "step.restored", "step.resumed", "worker.arrived"]
    assert {(name, role) for name in phases for role in ("survivor", "spare")} <= pairs
