"""Which spare takes the place of which node: domains, rehearsals, numbers."""

from __future__ import annotations

from typing import Any

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.layout import Layout
from deadpool_megatron.cluster.placement.domains import covered, parse_domains, whole
from simulated import SimulatedJob


def of_domains(nvlink: str = "", domains: str = "", tp: int = 1, ep: int = 1, **more: Any) -> SimulatedJob:
    """Four nodes with one rank each train, three are spares; ranks are numbered with tp, then ep fastest."""
    labels = parse_domains(domains, 7, nvlink)
    job = SimulatedJob(nodes=7, spares=3, slots=1, domains=labels, **more)
    job.join()
    job.park()
    for rank in range(4):
        info = r.CoordinateInfo(rank, rank % tp, 0, rank // tp, 0, rank % ep)
        job.feed(r.Registered(rank, 0, info, 1 << 20, 1 << 10, "groups", True, 0, 0, True, False))
    return job


TWO = "0-1=n1,2-3=n2,4=n3,5=n2,6=n1"


@pytest.mark.parametrize(
    ("lost", "tp", "ep", "spare"),
    [
        (0, 2, 1, 6),
        (2, 2, 1, 5),
        (2, 1, 2, 5),
        (0, 1, 4, 6),
        (2, 1, 1, 5),  # no group lives on it: it is a failure domain as any other
    ],
)
def test_a_spare_comes_from_the_nvlink_domain(lost: int, tp: int, ep: int, spare: int) -> None:
    job = of_domains(TWO, tp=tp, ep=ep)
    job.lose(lost)
    assert job.core.assignment[lost].node == spare


def test_the_nvlink_domain_counts_more_than_what_a_spare_has_rehearsed_only_where_a_group_spans_it() -> None:
    for tp, spare in ((2, 6), (1, 4)):
        job = of_domains(TWO, tp=tp, rehearsals=1)
        job.feed(r.Rehearsed(4, [0]))
        job.lose(0)
        assert job.core.assignment[0].node == spare


def test_a_group_that_spans_domains_but_not_this_one_ties_nobody() -> None:
    """Ranks 0 and 1 are a TP group, and their nodes in two domains: no spare is as good as the lost node was."""
    job = of_domains("0=n1,1=n2,4=n2,5=n1", "4-6=r1", tp=2, rehearsals=1)
    job.feed(r.Rehearsed(6, [0]))
    job.lose(0)
    assert job.core.assignment[0].node == 6


def test_else_a_spare_comes_from_the_failure_domain_and_then_by_its_number() -> None:
    job = of_domains(domains="0-1=r1,2-3=r2,4=r3,5=r2,6=r1")
    job.lose(2)
    job.recover()
    assert job.core.assignment[2].node == 5
    job.lose(3)
    assert job.core.assignment[3].node == 4


def test_two_losses_at_once_each_take_what_suits_them() -> None:
    job = of_domains(TWO, tp=2)
    job.lose(3)
    job.lose(0)
    assert [slot.node for slot in job.core.assignment] == [6, 1, 2, 5]


def test_at_the_start_nobody_knows_the_groups_and_the_domain_counts() -> None:
    job = SimulatedJob(nodes=7, spares=3, slots=1, domains=parse_domains("", 7, TWO))
    job.join()
    job.park()
    job.lose(2)
    assert job.core.assignment[2].node == 5


def test_expert_parallel_groups_are_those_of_megatron() -> None:
    """Stages of 8 ranks, experts over 4 of them: 0-3, 4-7; with two expert-tensor ranks: 0, 2, 4, 6 and 1, 3, 5, 7."""
    for etp, groups in ((1, [{0, 1, 2, 3}, {4, 5, 6, 7}]), (2, [{0, 2, 4, 6}, {1, 3, 5, 7}])):
        layout = Layout(16)
        for rank in range(16):
            pp, inside = divmod(rank, 8)
            info = r.CoordinateInfo(rank, 0, pp, inside, 0, inside // etp % 4)
            layout.register(r.Registered(rank, 0, info, 1, 1, "groups", True, 0, 0, True, False))
        assert layout.close_to(3) == next(group for group in groups if 3 in group)
        assert layout.close_to(11) == {rank + 8 for rank in next(group for group in groups if 3 in group)}


def test_it_is_said_how_many_losses_of_each_domain_are_covered() -> None:
    job = of_domains("0-1=n1,2-3=n2,4-6=n1", "0-3=r1,4-6=r2")
    assert job.core.covered == [
        "losses that spares of the same nvlink domain cover: n1 2, none of n2",
        "losses that spares of the same rack domain cover: none of r1",
        "a whole nvlink lost at once, its spares too: n2; not n1 (2 nodes, 0 spares elsewhere)",
    ]
    job.lose(4)
    job.lose(5)
    assert job.core.covered[0] == "losses that spares of the same nvlink domain cover: n1 1, none of n2"
    assert SimulatedJob().train().core.covered == []
    many = {node: {"rack": f"r{node:03}"} for node in range(100)}
    (line,) = covered(many, range(100), [])
    assert line.endswith("r011, ...")


def test_it_is_said_which_whole_domains_may_be_lost_with_copies_and_with_spares() -> None:
    """Each shard has a copy in the other rack; a rack takes its own spares along."""
    job = SimulatedJob(nodes=7, spares=3, slots=1, domains=parse_domains("0-1=r1,2-3=r2,4-5=r1,6=r2", 7)).train()
    line = "a whole rack lost at once, its spares too: "
    assert job.core.covered[-1] == f"{line}r2; not r1 (2 nodes, 1 spares elsewhere)"
    job.lose(5)
    assert job.core.covered[-1] == f"{line}not r1 (2 nodes, 1 spares elsewhere), r2 (2 nodes, 1 spares elsewhere)"
    alike = whole({node: {"rack": f"r{node % 3}"} for node in range(12)}, range(6), range(6, 12), {"rack": ["r1"]})
    assert alike == [f"{line}r0, r2; not r1 (its shards have no copy elsewhere)"]
    assert whole({node: {"rack": "r1"} for node in range(4)}, range(3), [3], {}) == []


def test_a_rack_that_is_lost_at_once_with_its_spare_goes_to_the_spares_of_the_other() -> None:
    domains = parse_domains("0-1=r1,2-3=r2,4=r1,5-6=r2", 7)
    job = SimulatedJob(nodes=7, spares=3, slots=1, domains=domains).train()
    job.commit(5)
    for node in (0, 1, 4):  # the spare that suits them best is gone, too
        job.lose(node)
    job.recover()
    assert sorted(job.active) == [2, 3, 5, 6] and job.finish is None


def test_nvlink_domains_have_their_own_flag_and_forms(tmp_path: Any) -> None:
    file = tmp_path / "nvlink.yaml"
    file.write_text("nvlink: {n1: 0-1, n2: 2-3}\n")
    for text in (str(file), "0-1=n1,2-3=n2"):
        assert parse_domains("0-3=r1", 4, text)[2] == {"rack": "r1", "nvlink": "n2"}
    file.write_text("rack: {n1: 0-1}\n")
    with pytest.raises(ValueError, match="the only kind here is nvlink"):
        parse_domains("", 4, str(file))
    with pytest.raises(ValueError, match="there is no node 4"):
        parse_domains("", 4, "0-9=n1")
