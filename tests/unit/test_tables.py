"""An epoch is told as what it changes: whoever holds the base ends with the whole, and nobody else believes to."""

from __future__ import annotations

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.records.tables import Broadcast, Tables, apply
from simulated import SimulatedJob


def _told(job: SimulatedJob, broadcast: Broadcast) -> Tables:
    """The tables of an agent that has heard everything up to the first step."""
    nodes = job.core.members.present()
    roster, placement = job.told(r.Roster)[0], job.told(r.Placement)[0]
    first = r.decode_from_coordinator(broadcast.packets(roster, nodes)[0][1])
    second = r.decode_from_coordinator(broadcast.packets(placement, nodes)[0][1])
    assert isinstance(first, r.Roster) and isinstance(second, r.Placement)
    assert not first.assignment, "everybody knows the first one"
    sizes = second.unique_bytes, second.small_capacity
    return Tables(second.version, roster.assignment, first.vaults, second.groups, *sizes)


def _declared(job: SimulatedJob, node: int) -> r.Declare:
    job.lose(node)
    declared: r.Declare = job.told(r.Declare)[-1]
    return declared


def _same(a: r.Declare, b: r.Declare) -> bool:
    return msgspec.structs.replace(a, version=0) == msgspec.structs.replace(b, version=0)


def test_what_is_told_of_an_epoch_is_short_and_gives_the_whole_again_and_again() -> None:
    job, broadcast = SimulatedJob(nodes=60, spares=4, slots=8).train(), Broadcast()
    tables = _told(job, broadcast)
    for victim in (3, 17):
        declared = _declared(job, victim)
        packets = broadcast.packets(declared, job.core.members.present())
        assert len({packet for _, packet in packets}) == 1 and len(packets[0][1]) < 400
        changed = r.decode_from_coordinator(packets[0][1])
        assert isinstance(changed, r.Changed)
        whole = apply(changed, tables)
        assert whole is not None and _same(whole, declared)
        sizes = whole.unique_bytes, whole.small_capacity
        tables = Tables(whole.version, whole.assignment, whole.vaults, whole.groups, *sizes)


def test_who_does_not_hold_the_base_says_so_and_gets_the_whole() -> None:
    job, broadcast = SimulatedJob(nodes=6, spares=1, slots=2).train(), Broadcast()
    tables = _told(job, broadcast)
    declared = _declared(job, 1)
    changed = r.decode_from_coordinator(broadcast.packets(declared, [0])[0][1])
    assert isinstance(changed, r.Changed)
    assert apply(changed, Tables(tables.version + 2, tables.assignment)) is None
    assert apply(changed, Tables()) is None
    whole = r.decode_from_coordinator(broadcast.behind(0))
    assert isinstance(whole, r.Declare) and _same(whole, declared)


def test_a_node_whose_connection_is_new_is_told_the_whole_the_next_time() -> None:
    job, broadcast = SimulatedJob(nodes=6, spares=1, slots=2).train(), Broadcast()
    _told(job, broadcast)
    broadcast.joined(2)
    packets = dict(broadcast.packets(_declared(job, 1), [0, 2]))
    assert isinstance(r.decode_from_coordinator(packets[0]), r.Changed)
    assert isinstance(r.decode_from_coordinator(packets[2]), r.Declare)


def test_a_coordinator_that_has_just_come_tells_the_whole() -> None:
    job = SimulatedJob(nodes=6, spares=1, slots=2).train()
    packets = Broadcast().packets(_declared(job, 1), [0, 2])
    assert all(isinstance(r.decode_from_coordinator(packet), r.Declare) for _, packet in packets)
