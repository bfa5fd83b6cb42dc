"""Which generation a recovery goes on from, and who gives what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deadpool_megatron.cluster.placement.agreement import ANY_EPOCH, NoCommonGeneration, agree
from deadpool_megatron.cluster.records import Offer, SlotAddress, Source

# Rank 0 on node 0, rank 1 on node 1, rank 2 on node 2.
THREE = [SlotAddress(0, 0), SlotAddress(1, 0), SlotAddress(2, 0)]


def offer(
    node: int,
    live: dict[int, int | None],
    own: dict[int, list[tuple[int, int]]] | None = None,
    peer: dict[int, list[tuple[int, int]]] | None = None,
) -> Offer:
    return Offer(1, node, live, own or {}, peer or {})


def test_live_state_that_everybody_has_is_taken_and_nothing_is_fetched() -> None:
    agreed = agree(THREE, {n: offer(n, {n: 7}) for n in range(3)})
    assert (agreed.generation, agreed.sources) == (7, {})


def test_the_newest_generation_that_every_rank_has_is_taken_not_the_newest_there_is() -> None:
    offers = {
        0: offer(0, {0: 8}, {0: [(0, 6), (0, 7)]}),
        1: offer(1, {1: None}, {1: [(0, 6), (0, 7)]}),
        2: offer(2, {2: 8}, {2: [(0, 6), (0, 7)]}),
    }
    assert agree(THREE, offers).generation == 7


def test_torn_live_state_counts_for_nothing() -> None:
    offers = {
        0: offer(0, {0: None}, {0: [(0, 4)]}),
        1: offer(1, {1: 5}, {1: [(0, 4)]}),
        2: offer(2, {2: 5}, {2: [(0, 4), (0, 5)]}),
    }
    assert agree(THREE, offers).generation == 4


def test_a_rank_that_holds_nothing_gets_its_shard_from_the_peers_copy() -> None:
    offers = {
        0: offer(0, {0: 5}, {0: [(0, 5)]}, {2: [(0, 5)]}),
        1: offer(1, {1: 5}, {1: [(0, 5)]}, {0: [(0, 5)]}),
        2: offer(2, {2: None}),
    }
    agreed = agree(THREE, offers)
    assert agreed.generation == 5 and agreed.sources == {2: Source(0, 0)}


def test_the_shard_comes_in_the_version_of_the_newest_epoch_that_wrote_it() -> None:
    offers = {
        0: offer(0, {0: 5}, {}, {2: [(1, 5), (3, 5), (2, 5)]}),
        1: offer(1, {1: 5}),
        2: offer(2, {2: None}),
    }
    assert agree(THREE, offers).sources == {2: Source(0, 3)}


def test_an_own_copy_left_on_another_node_serves_as_well() -> None:
    offers = {
        0: offer(0, {0: 5}, {0: [(0, 5)], 1: [(0, 5)]}),
        1: offer(1, {1: None}),
        2: offer(2, {2: 5}),
    }
    assert agree(THREE, offers).sources == {1: Source(0, 0)}


def test_ranks_share_their_sources() -> None:
    two = [SlotAddress(0, 0), SlotAddress(0, 1), SlotAddress(1, 0), SlotAddress(2, 0)]
    offers = {
        0: offer(0, {0: None, 1: None}),
        1: offer(1, {2: 5}, {}, {0: [(0, 5)], 1: [(0, 5)]}),
        2: offer(2, {3: 5}, {}, {0: [(0, 5)], 1: [(0, 5)]}),
    }
    assert {s.node for s in agree(two, offers).sources.values()} == {1, 2}


def test_a_refused_copy_is_not_named_again_and_another_source_is_taken() -> None:
    offers = {
        0: offer(0, {0: 5}, {}, {2: [(0, 5)]}),
        1: offer(1, {1: 5}, {}, {2: [(0, 5)]}),
        2: offer(2, {2: None}),
    }
    first = agree(THREE, offers).sources[2]
    second = agree(THREE, offers, frozenset({(2, first.node, 5, 0, -1)})).sources[2]
    assert {first.node, second.node} == {0, 1}


def test_an_own_copy_that_is_refused_does_not_count_as_held() -> None:
    offers = {
        0: offer(0, {0: 5}, {}, {2: [(0, 5)]}),
        1: offer(1, {1: 5}),
        2: offer(2, {2: None}, {2: [(0, 5)]}),
    }
    assert agree(THREE, offers).sources == {}
    for epoch in (0, ANY_EPOCH):
        assert agree(THREE, offers, frozenset({(2, 2, 5, epoch, -1)})).sources == {2: Source(0, 0)}


def test_a_generation_written_anew_is_not_refused_with_the_copy_that_was_bad() -> None:
    live = {0: offer(0, {0: 5}), 1: offer(1, {1: 5})}
    bad = frozenset({(2, 2, 5, 1, -1), (2, 0, 5, 1, -1)})
    both = [(0, 5), (1, 5)]
    at_home = live | {2: offer(2, {2: None}, {2: both})}
    assert agree(THREE, at_home, bad).sources == {2: Source(2, 0)}, "its node is told which of the two"
    elsewhere = live | {0: offer(0, {0: 5}, {}, {2: both}), 2: offer(2, {2: None})}
    assert agree(THREE, elsewhere, bad).sources == {2: Source(0, 0)}
    anew = live | {2: offer(2, {2: None}, {2: [(2, 5)]})}
    assert agree(THREE, anew, bad).sources == {2: Source(2, 2)}
    with pytest.raises(NoCommonGeneration):
        agree(THREE, live | {2: offer(2, {2: None}, {2: [(1, 5)]})}, bad)


def test_an_older_generation_is_agreed_when_every_copy_of_the_newest_is_refused() -> None:
    offers = {
        0: offer(0, {0: 5}, {0: [(0, 4)]}, {2: [(0, 4), (0, 5)]}),
        1: offer(1, {1: 5}, {1: [(0, 4)]}),
        2: offer(2, {2: None}),
    }
    agreed = agree(THREE, offers, frozenset({(2, 0, 5, 0, -1)}))
    assert agreed.generation == 4 and agreed.sources == {2: Source(0, 0)}


def test_a_rank_without_any_copy_is_named() -> None:
    offers = {0: offer(0, {0: 5}), 1: offer(1, {1: None}), 2: offer(2, {2: 5})}
    with pytest.raises(NoCommonGeneration) as lost:
        agree(THREE, offers)
    assert lost.value.missing == [1]


def test_copies_without_a_generation_in_common_are_lost_too() -> None:
    offers = {0: offer(0, {0: 5}), 1: offer(1, {1: 6}), 2: offer(2, {2: 5})}
    with pytest.raises(NoCommonGeneration) as lost:
        agree(THREE, offers)
    assert lost.value.missing == []


def test_what_some_rank_has_only_live_is_not_held() -> None:
    assignment = [SlotAddress(0, 0), SlotAddress(1, 0)]
    in_vault = Offer(1, 1, {1: None}, {1: [(0, 5)]}, {})
    live = Offer(1, 0, {0: 5}, {0: [(0, 4)]}, {1: [(0, 4)]})
    agreed = agree(assignment, {0: live, 1: in_vault})
    assert (agreed.generation, agreed.held) == (5, False)
    both = Offer(1, 0, {0: 5}, {0: [(0, 5)]}, {})
    assert agree(assignment, {0: both, 1: in_vault}).held


# ---- runs whose kernels do not give the same bits twice


def test_versions_of_one_generation_are_not_mixed_where_the_run_is_not_repeatable() -> None:
    offers = {
        0: offer(0, {0: None}, {0: [(0, 7), (0, 8)]}),
        1: offer(1, {1: None}, {1: [(0, 7), (1, 8)]}),
        2: offer(2, {2: None}, {2: [(0, 7), (0, 8), (1, 8)]}),
    }
    assert agree(THREE, offers).generation == 8
    agreed = agree(THREE, offers, repeatable=False)
    assert agreed.generation == 7 and agreed.sources == {n: Source(n, 0) for n in range(3)}


def test_a_live_state_counts_as_the_version_that_it_would_have_been_written_as() -> None:
    offers = {n: Offer(2, n, {n: 8}, {n: [(0, 7)]}, {}, live_epochs={n: n % 2}) for n in range(3)}
    assert agree(THREE, offers, repeatable=False).generation == 7
    offers = {n: Offer(2, n, {n: 8}, {n: [(0, 7)]}, {}, live_epochs={n: 1}) for n in range(3)}
    agreed = agree(THREE, offers, repeatable=False)
    assert agreed == replace(agree(THREE, offers), epoch=1)


def test_in_which_epoch_what_is_agreed_on_was_written_is_known_where_that_makes_a_difference() -> None:
    offers = {n: offer(n, {n: None}, {n: [(0, 8), (1, 8)]}) for n in range(3)}
    assert agree(THREE, offers, repeatable=False).epoch == 1 and agree(THREE, offers).epoch == ANY_EPOCH
    offers[1] = offer(1, {1: None}, {1: [(0, 8)]})
    assert agree(THREE, offers, repeatable=False).epoch == 0 and agree(THREE, offers).epoch == ANY_EPOCH


def test_a_rank_that_has_the_number_live_takes_the_version_from_its_vault_where_that_is_the_common_one() -> None:
    offers = {
        0: Offer(2, 0, {0: 8}, {0: [(1, 8)]}, {}, live_epochs={0: 0}),
        1: Offer(2, 1, {1: None}, {1: [(1, 8)]}, {2: [(0, 8), (1, 8)]}),
        2: Offer(2, 2, {2: None}, {}, {}),
    }
    agreed = agree(THREE, offers, repeatable=False)
    assert agreed.sources == {0: Source(0, 1), 1: Source(1, 1), 2: Source(1, 1)}


def test_the_newest_epochs_history_is_the_runs() -> None:
    versions = [(0, 8), (1, 7)]
    offers = {n: offer(n, {n: None}, {n: versions}) for n in range(3)}
    assert agree(THREE, offers, repeatable=False).generation == 7
