"""The promise: a shard is copied as early as the link allows, in the gaps there are, beside nothing that is busy."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from deadpool_megatron.snapshot import Pacing

MIB = 1 << 20


@dataclass
class Link:
    """Takes what is asked for in order, at one bandwidth."""

    bandwidth: float
    asked: list[tuple[float, int]] = field(default_factory=list)

    def landed(self, now: float) -> float:
        done = free = 0.0
        for at, nbytes in self.asked:
            begin = max(at, free)
            free = begin + nbytes / self.bandwidth
            done += max(0.0, min(nbytes, (now - begin) * self.bandwidth))
        return done

    @property
    def all_landed_at(self) -> float:
        free = 0.0
        for at, nbytes in self.asked:
            free = max(at, free) + nbytes / self.bandwidth
        return free


def iterate(pacing: Pacing, link: Link, total: int, gaps: list[float], busy: list[bool]) -> list[int]:
    """One iteration; bytes asked for by tick. The gate takes the rest and is not in the list."""
    now, left, out = 0.0, total, []
    link.asked = []
    pacing.begin(now)
    for gap, links_busy in zip(gaps, busy, strict=True):
        backlog = int(total - left - link.landed(now))
        wanted = pacing.ask(now, left, backlog, links_busy)
        assert 0 <= wanted <= left
        if wanted:
            link.asked.append((now, wanted))
        left -= wanted
        out.append(wanted)
        now += gap
    pacing.close(now)
    pacing.landed(int(link.landed(now)), min(now, link.all_landed_at))
    return out


def quiet(count: int) -> list[bool]:
    return [False] * count


def test_without_any_measurement_all_is_asked_for_at_once() -> None:
    assert iterate(Pacing(), Link(1e9), 100 * MIB, [0.01] * 8, quiet(8))[0] == 100 * MIB


def test_a_tick_asks_for_no_more_than_lands_until_the_next_one_and_the_long_gaps_take_the_most() -> None:
    pacing, link = Pacing(least=1), Link(1e9)
    gaps = [0.010, 0.100, 0.010, 0.200]
    for _ in range(3):
        asked = iterate(pacing, link, 200_000_000, gaps, quiet(4))
    for nbytes, gap in zip(asked, gaps, strict=True):
        assert nbytes <= gap * 1.01e9
    assert asked[1] > 5 * asked[0] and sum(asked) == 200_000_000


def test_ticks_with_busy_links_are_passed_over_while_the_quiet_ones_suffice() -> None:
    busy = [False, True, False, False, False, False, True, True]
    pacing, link = Pacing(), Link(1e9)
    for _ in range(3):
        asked = iterate(pacing, link, 30_000_000, [0.01] * 8, busy)
    assert sum(asked) == 30_000_000
    assert not any(nbytes for nbytes, links in zip(asked, busy, strict=True) if links)


def test_busy_ticks_are_used_when_the_quiet_ones_do_not_suffice() -> None:
    busy = [True, True, False, True]
    pacing, link = Pacing(), Link(1e9)
    for _ in range(3):
        asked = iterate(pacing, link, 35_000_000, [0.01] * 4, busy)
    assert sum(asked) == 35_000_000 and asked[0] and asked[1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-4, 0.3), st.booleans()), min_size=2, max_size=40),
    st.integers(1, 1 << 32),
    st.floats(1e8, 6e10),
    st.floats(1e7, 6e10),
)
def test_a_limit_is_never_exceeded(ticks: list[tuple[float, bool]], total: int, bandwidth: float, limit: float) -> None:
    pacing, link = Pacing(limit=limit), Link(bandwidth)
    gaps, busy = [gap for gap, _ in ticks], [flag for _, flag in ticks]
    iterate(pacing, link, total, gaps, busy)  # before anything is known the limit counts by the usual gap
    for _ in range(3):
        asked = iterate(pacing, link, total, gaps, busy)
        now, so_far = 0.0, 0
        for nbytes, gap in zip(asked, gaps, strict=True):
            now += gap
            so_far += nbytes
            assert so_far <= limit * now * 1.001 + 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-3, 0.3), min_size=4, max_size=40), st.integers(1 << 20, 1 << 32), st.floats(1e8, 6e10))
def test_what_the_link_can_take_in_half_an_iteration_has_landed_soon_after(
    gaps: list[float], total: int, bandwidth: float
) -> None:
    total = min(total, int(bandwidth * sum(gaps) / 2))
    pacing, link = Pacing(), Link(bandwidth)
    for _ in range(4):
        asked = iterate(pacing, link, total, gaps, quiet(len(gaps)))
    assert sum(asked) == total
    assert link.all_landed_at <= 1.1 * total / bandwidth + max(gaps)
