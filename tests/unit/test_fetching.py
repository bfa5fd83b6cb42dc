"""The promise: constants are asked for of whoever may have them, for as long as a connection may be away."""

from __future__ import annotations

import itertools

from deadpool_megatron.cluster.agent.fetching import Search


def test_who_does_not_answer_is_asked_again_for_ten_seconds_and_at_least_once_in_each() -> None:
    search, now, asked = Search(["keeper"], 100.0), 100.0, []
    while (pause := search.pause(now)) is not None:
        now += pause
        asked.append(now)
    assert asked[0] == 100.0 and 110.0 < asked[-1] <= 111.0
    assert max(later - earlier for earlier, later in itertools.pairwise(asked)) <= 1.0


def test_everybody_is_asked_once_one_of_them_must_have_them_and_the_search_ends_where_nobody_has() -> None:
    search = Search(["own", "keeper"], 0.0, ["keeper", "another"])
    search.lacks("keeper")
    assert search.left == ["own"]
    search.widen()  # its own bytes have changed
    search.widen()
    assert search.left == ["own", "another"]
    search.lacks("own")
    search.lacks("another")
    assert search.pause(0.0) is None
