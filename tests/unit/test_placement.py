"""The promise: what the printed sentence says may be lost may be lost, and nothing more than it says may not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadpool_megatron.cluster.core.protection import Protection, in_words
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.domains import parse_domains, slurm_labels
from deadpool_megatron.cluster.placement.groups import parallel_groups, place, replace
from deadpool_megatron.cluster.placement.redundancy import Scheme, cost, degree, holders, stripes, survives, tolerated
from deadpool_megatron.cluster.records import CoordinateInfo, SlotAddress


def layout(nodes: int, slots: int, tensor: int, pipeline: int) -> tuple[list[SlotAddress], dict[int, CoordinateInfo]]:
    """Coordinates numbered as Megatron does: tensor, then data, then pipeline."""
    world = nodes * slots
    data = world // tensor // pipeline
    return placing.initial(nodes, slots), {
        rank: CoordinateInfo(rank, rank % tensor, rank // tensor // data, rank // tensor % data)
        for rank in range(world)
    }


def shared(pairs: Sequence[tuple[int, int]], groups_of: dict[int, frozenset[tuple[object, ...]]]) -> int:
    return sum(len({kind[0] for kind in groups_of[a] & groups_of[b]}) for a, b in pairs)


def matchings(nodes: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every way to put an even number of nodes into pairs."""
    if not nodes:
        yield []
        return
    first, *rest = nodes
    for i, other in enumerate(rest):
        for others in matchings(rest[:i] + rest[i + 1 :]):
            yield [(first, other), *others]


SCHEMES = st.sampled_from(["1", "2", "3", "2+1", "2+2", "3+1", "4+2"]).map(Scheme.parse)
LABELS = st.dictionaries(
    st.integers(0, 20), st.fixed_dictionaries({"rack": st.sampled_from("abcd"), "power": st.sampled_from("xy")})
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(nodes=st.integers(2, 14), scheme=SCHEMES, labels=LABELS)
def test_every_node_is_in_one_group_and_keeps_and_gives_the_same_as_any_other(
    nodes: int, scheme: Scheme, labels: dict[int, dict[str, str]]
) -> None:
    groups = place(range(nodes), scheme, {}, labels)
    if nodes < scheme.size:
        assert groups == ()
        return
    assert sorted(node for group in groups for node in group) == list(range(nodes))
    every = list(stripes(groups, scheme))
    for node in range(nodes):
        assert sorted(s.data.index(node) for s in every if node in s.data) == list(range(scheme.k))
        assert sorted(s.keepers.index(node) for s in every if node in s.keepers) == list(range(scheme.m))
    assert all(len(set(s.nodes)) == scheme.size for s in every)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(nodes=st.integers(2, 9), scheme=SCHEMES, labels=LABELS)
def test_the_tolerated_set_is_exact(nodes: int, scheme: Scheme, labels: dict[int, dict[str, str]]) -> None:
    """Every set of nodes, one after the other, against a count of what is left of each stripe."""
    groups = place(range(nodes), scheme, {}, labels)
    if not groups:
        return
    exact = tolerated(groups, scheme, labels)
    every = list(stripes(groups, scheme))
    for size in range(1, nodes + 1):
        for lost in combinations(range(nodes), size):
            recoverable = all(sum(node not in lost for node in s.nodes) >= scheme.k for s in every)
            assert survives(lost, groups, scheme) == recoverable
            assert exact.count == len(exact.fatal)
            says = size <= exact.nodes or not any(set(fatal) <= set(lost) for fatal in exact.fatal)
            assert says == recoverable, f"{lost}: {exact.sentence}"
            assert (degree(groups, scheme, lost) >= 0) == recoverable
    for kind, (count, bad) in exact.domains.items():
        of_kind = {of[kind] for node, of in labels.items() if node < nodes}
        assert count == len(of_kind)
        for label in of_kind:
            inside = [node for node in range(nodes) if labels.get(node, {}).get(kind) == label]
            assert (label not in bad) == survives(inside, groups, scheme)


def test_the_sentence_says_it_in_words() -> None:
    groups = ((0, 3), (1, 2))
    racks = parse_domains("0-1=r1,2-3=r2")
    assert tolerated(groups, Scheme.parse("1"), racks).sentence == (
        "any 1 node; any 2 nodes but these 2 pairs: 0+3, 1+2; any 1 rack"
    )
    racks = parse_domains("0=r1,3=r1,1-2=r2")
    assert tolerated(groups, Scheme.parse("1"), racks).sentence.endswith("; no whole rack")
    racks = parse_domains("0=r1,3=r1,1=r2,2=r3")
    assert tolerated(groups, Scheme.parse("1"), racks).sentence.endswith("; any 1 rack but r1")
    racks = parse_domains("0-1=r1,2=r2")
    said = tolerated(groups, Scheme.parse("1"), racks).sentence
    assert said.endswith("; any 1 rack (the rack of node 3 is not known)")
    assert tolerated(((0, 1),), Scheme.parse("1")).sentence == "any 1 node"
    assert tolerated(((0, 1, 2, 3),), Scheme.parse("2")).sentence == "any 2 nodes"
    many = tolerated([(i, i + 64) for i in range(64)], Scheme.parse("1"))
    assert "but these 64 pairs: 0+64, 1+65, " in many.sentence and "and 52 more" in many.sentence
    assert len(many.fatal) == 64
    assert tolerated((), Scheme.parse("1")).sentence == "no node"


@pytest.mark.parametrize("scheme", [Scheme(1, 1), Scheme(1, 2), Scheme(1, 3), Scheme(3, 1), Scheme(3, 2), Scheme(2, 4)])
def test_fatal_sets_are_counted_as_they_are_listed_in_circles_of_every_size(scheme: Scheme) -> None:
    for nodes in range(scheme.size, 2 * scheme.size + 3):
        exact = tolerated([tuple(range(nodes)), tuple(range(nodes, nodes + scheme.size))], scheme)
        assert exact.count == len(exact.fatal), nodes


def test_sets_too_many_to_list_are_counted_and_some_are_named() -> None:
    """Listing these would take hours."""
    exact = tolerated([tuple(range(40)), tuple(range(40, 72))], Scheme.parse("16+16"))
    assert len(exact.fatal) == 1000 and exact.fatal[0] == tuple(range(17)) and exact.count < exact.sets
    assert all(not survives(lost, [tuple(range(40))], Scheme.parse("16+16")) for lost in exact.fatal[:3])
    assert f"but these {exact.count} sets: " in exact.sentence
    assert exact.sentence.endswith(f" and {exact.count - 12} more")


@pytest.mark.parametrize(
    ("nodes", "slots", "tensor", "pipeline"),
    [(4, 2, 2, 2), (8, 2, 2, 2), (6, 1, 1, 2), (8, 1, 2, 2), (6, 2, 1, 3), (8, 4, 4, 2), (8, 1, 1, 4), (4, 2, 4, 1)],
)
def test_where_the_layout_allows_no_two_of_a_pair_share_a_tp_pp_or_dp_group(
    nodes: int, slots: int, tensor: int, pipeline: int
) -> None:
    groups_of = parallel_groups(*layout(nodes, slots, tensor, pipeline))
    pairs = [tuple(group) for group in place(range(nodes), Scheme(), groups_of)]
    least = min(shared(each, groups_of) for each in matchings(list(range(nodes))))
    assert shared(pairs, groups_of) == least


@pytest.mark.parametrize(("nodes", "slots"), [(64, 8), (128, 4)])
@pytest.mark.parametrize("redundancy", ["1", "2", "4+2"])
def test_the_layouts_of_large_runs_share_no_group_and_survive_any_rack(nodes: int, slots: int, redundancy: str) -> None:
    scheme = Scheme.parse(redundancy)
    groups_of = parallel_groups(*layout(nodes, slots, 8, 8))
    racks = {node: {"rack": f"r{node // 8}"} for node in range(nodes)}
    groups = place(range(nodes), scheme, groups_of, racks)
    exact = tolerated(groups, scheme, racks)
    assert exact.domains == {"rack": (nodes // 8, ())}
    for stripe in stripes(groups, scheme):
        assert not shared(list(combinations(stripe.nodes, 2)), groups_of)
        assert len({racks[node]["rack"] for node in stripe.nodes}) == scheme.size


@settings(max_examples=60, deadline=None, derandomize=True)
@given(racks=st.lists(st.sampled_from("abc"), min_size=4, max_size=8).filter(lambda racks: len(racks) % 2 == 0))
def test_whenever_pairs_can_be_split_over_racks_they_are(racks: list[str]) -> None:
    labels = {node: {"rack": rack} for node, rack in enumerate(racks)}
    pairs = place(range(len(racks)), Scheme(), {}, labels)
    within = sum(racks[a] == racks[b] for a, b in pairs)
    assert len(set(racks)) == 1 or within == min(
        sum(racks[a] == racks[b] for a, b in each) for each in matchings(list(range(len(racks))))
    )


def test_a_spare_takes_the_place_of_the_lost_node_and_nobody_else_moves() -> None:
    scheme = Scheme.parse("2+1")
    groups = place(range(9), scheme)
    after = replace(groups, {4: 11}, scheme)
    assert [tuple(11 if n == 4 else n for n in group) for group in groups] == [tuple(group) for group in after]


def test_a_spare_in_the_rack_of_its_partner_is_exchanged_when_that_helps_and_only_then() -> None:
    racks = parse_domains("0-1=a,2-3=b,8=a,9=b")
    groups = place(range(4), Scheme(), {}, racks)
    partner = {a: b for pair in groups for a, b in (pair, pair[::-1])}
    after = replace(groups, {partner[0]: 8}, Scheme(), {}, racks)
    assert sorted(n for g in after for n in g) == sorted({0, 1, 2, 3, 8} - {partner[0]})
    # three of rack a and one of b: one pair has to be within a rack, so moving would help nobody
    assert after == tuple(tuple(8 if n == partner[0] else n for n in group) for group in groups)
    again = replace(((0, 2), (1, 3)), {2: 8, 1: 9}, Scheme(), {}, racks)
    assert all(racks[x]["rack"] != racks[y]["rack"] for x, y in again)


def test_domains_are_read_from_a_flag_a_file_and_slurm(tmp_path: pytest.TempPathFactory) -> None:
    assert parse_domains("") == {}
    assert parse_domains("0-1=r1,2=r2") == {0: {"rack": "r1"}, 1: {"rack": "r1"}, 2: {"rack": "r2"}}
    path = f"{tmp_path}/domains.yaml"
    with open(path, "w") as file:
        file.write("rack: {r1: 0-1, r2: [2, '3-4']}\npower: {7: '0,2'}\n")
    labels = parse_domains(path)
    assert labels[0] == {"rack": "r1", "power": "7"} and labels[4] == {"rack": "r2"} and len(labels) == 5
    slurm = {"SLURM_TOPOLOGY_ADDR": "core.leaf3.n17", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
    assert slurm_labels(slurm) == {"switch": "core.leaf3", "switch2": "core"}
    assert slurm_labels({}) == {}
    # topology/flat names the node alone
    assert slurm_labels({"SLURM_TOPOLOGY_ADDR": "n17", "SLURM_TOPOLOGY_ADDR_PATTERN": "node"}) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0-1=r1,1=r2", "node 1 is in rack r1 and in rack r2"),
        ("0-1", "No such file"),
        ("a=r1", "'a' is not a node"),
        ("3-1=r1", "'3-1' is not a node"),
        ("0=", "'0=' is not of the form"),
    ],
)
def test_domains_that_make_no_sense_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        parse_domains(text)
    assert "\n" not in str(refused.value)


def test_a_file_of_domains_with_a_mistake_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "domains.yaml"
    for text, says in (("rack: {r1: 0-1}\nrack: {r2: 2-3}", "line 2: 'rack' stands"), ("rack:\n\tr1: 0", "line 2: ")):
        path.write_text(text)
        with pytest.raises(ValueError, match=says) as refused:
            parse_domains(str(path))
        assert "\n" not in str(refused.value) and str(refused.value).startswith(f"failure domains {path}: not YAML")


@pytest.mark.parametrize("text", ["0", "x", "0+1", "2+0", "40+2", "-1", "1+", ""])
def test_a_redundancy_that_makes_no_sense_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="redundancy"):
        Scheme.parse(text)


def test_what_a_redundancy_costs() -> None:
    shard, slots = 1_500_000_000, 8
    mirror, parity = cost(Scheme.parse("1"), shard, slots), cost(Scheme.parse("4+1"), shard, slots)
    assert mirror.memory_bytes == 4 * shard * slots and mirror.network_bytes == shard * slots
    assert parity.memory_bytes == 2.5 * shard * slots and parity.network_bytes == shard * slots
    assert cost(Scheme.parse("2"), shard, slots).network_bytes == 2 * shard * slots


# ---- over the life of a job


def test_the_degree_of_protection_falls_with_a_swap_and_is_back_when_every_node_is_covered() -> None:
    assignment, coordinates = layout(4, 2, 2, 2)
    protection = Protection("1")
    protection.begin(assignment, coordinates, 1000, 2)
    assert protection.degree == 0 and not protection.status()["full"]
    assert protection.committed() and protection.degree == 1
    after = placing.replace_nodes(assignment, {2: 4})
    protection.moved(after, coordinates)
    assert protection.degree == 0 and protection.status()["not_covered_yet"] == [4]
    assert not any(protection.covered(node) for node in (0, 1, 3))
    assert protection.degree == 0
    assert protection.covered(4) and protection.degree == 1 and protection.status()["full"]
    # the same nodes again, after a fault of the network: nothing is missing
    protection.moved(after, coordinates)
    assert protection.degree == 1 and not protection.committed()


def test_the_words_that_the_newest_copies_lie_in_outlive_a_coordinator_until_the_next_commit() -> None:
    before, coordinates = layout(4, 1, 1, 1)
    protection = Protection("2+1")
    protection.begin(before, coordinates, 100, 1)
    old = {word.ranks for word in protection.words}
    protection.moved(before, coordinates, one_to_one=False)  # to be drained: nothing is kept for anybody any more
    again = Protection("2+1")
    again.begin(before, coordinates, 100, 1, json.loads(json.dumps(protection.dump())))
    assert old and {word.ranks for word in again.words} == old and again.groups == ()
    protection.committed()
    assert protection.words == []


def test_a_job_that_trains_on_after_it_had_to_save_has_parity_again() -> None:
    before, coordinates = layout(6, 1, 1, 2)
    protection = Protection("2+1")
    protection.begin(before, coordinates, 100, 1)
    rescued = placing.rescue(before, {0}, 1)
    assert rescued is not None and not protection.moved(rescued, coordinates, one_to_one=False)
    groups = protection.moved(placing.replace_nodes(before, {0: 6}), coordinates)
    assert sorted(node for group in groups for node in group) == [1, 2, 3, 4, 5, 6]


def test_two_copies_still_protect_while_the_third_is_made() -> None:
    assignment, coordinates = layout(6, 1, 1, 2)
    protection = Protection("2")
    protection.begin(assignment, coordinates, 1000, 1)
    protection.committed()
    assert protection.degree == 2
    protection.moved(placing.replace_nodes(assignment, {0: 6}), coordinates)
    assert protection.degree == 1


def test_the_lines_at_start_say_what_is_survived_and_what_it_costs() -> None:
    assignment, coordinates = layout(6, 2, 2, 2)
    protection = Protection("2", parse_domains("0-2=r1,3-5=r2"))
    protection.begin(assignment, coordinates, 3 << 29, 2)
    first, *costs = in_words({"costs": protection.costs(), **protection.status()})
    assert first.startswith("a committed generation survives the loss of any 2 nodes; any 3 nodes but these 2 triples")
    assert costs[0] == "redundancy 2: 18 GiB of memory a node, 6 GiB sent by a node an iteration (in use)"
    assert costs[1].startswith("redundancy 1: 12 GiB") and costs[3].startswith("redundancy 4+2: 9 GiB")


def test_every_node_of_a_mirror_has_its_keepers_in_its_group() -> None:
    assert holders(((0, 3), (1, 2)), Scheme()) == {0: (3,), 3: (0,), 1: (2,), 2: (1,)}
    assert holders(((0, 1, 2),), Scheme()) == {0: (1,), 1: (2,), 2: (0,)}
    assert holders(((0, 1, 2),), Scheme(1, 2)) == {0: (1, 2), 1: (2, 0), 2: (0, 1)}
    assert holders(((0, 1, 2),), Scheme(2, 1)) == {}
