"""What is found out of agents whose connection has ended: each word once."""

from __future__ import annotations

from collections.abc import Callable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.coordinator import absences
from deadpool_megatron.cluster.coordinator.absences import Absences

VAULT = r.Address("127.0.0.1", 7)


def test_only_the_first_word_of_an_agent_counts_and_what_refuses_has_ended() -> None:
    tells: list[Callable[[bool], None]] = []
    asked = Absences(lambda place, tell: tells.append(tell) or (lambda: None))
    assert asked.began(3, VAULT)
    tells[0](False)
    assert asked.answers(lambda node: True) == [(3, False)]
    tells[0](False)
    assert asked.answers(lambda node: True) == [], "else an absence would have no end"
    tells[0](True)
    assert asked.answers(lambda node: True) == [(3, True)] and not asked.asks
    assert asked.began(3, VAULT)
    tells[1](False)
    assert asked.answers(lambda node: True) == [(3, False)], "another absence"


def test_where_too_many_are_away_that_is_said() -> None:
    asked = Absences(lambda place, tell: lambda: None)
    most = absences._MOST_ASKED
    assert all(asked.began(node, VAULT) for node in range(most)) and not asked.began(most, VAULT)
    asked.over(0)
    assert asked.began(most, VAULT)
