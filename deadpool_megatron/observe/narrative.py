"""A recovery in one paragraph that a tired person understands. Pure text, from what the events say."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

from deadpool_megatron.cluster.records.exits import Exit, what_to_do
from deadpool_megatron.observe.recoveries import Recovery, Story

_NAMED: Final = 4  # nodes, at most, that are named and not only numbered
_PHASE: Final = {
    "declared": "declaring the next epoch",
    "aborted": "getting every survivor out of its step",
    "agreed": "agreeing on a generation",
    "prepared": "building the spare's model and fetching shards",
    "reformed": "re-forming process groups",
    "restored": "gathering 16-bit parameters",
    "compared": "comparing what all ranks hold",
    "resumed": "starting again",
    "redone": "the first iteration",
}


def seconds_text(seconds: float) -> str:
    """Seconds with a unit that keeps three digits or so."""
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 100 else f"{seconds:.0f} s"


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as ranges: ``0-3, 6``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def count_text(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``, ``no node``."""
    return f"no {noun}" if number == 0 else f"{number} {noun}" + ("" if number == 1 else "s")


def _several(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'' if len(numbers) == 1 else 's'} {ranks_text(numbers)}"


def _nodes(r: Recovery, numbers: Sequence[int]) -> str:
    if not r.names or len(numbers) > _NAMED:
        return _several("node", numbers)
    return f"node{'' if len(numbers) == 1 else 's'} {', '.join(map(r.called, sorted(numbers)))}"


def _what_failed(r: Recovery) -> str:
    by_cause: dict[str, list[int]] = {}
    for node, cause in r.causes.items():
        if cause:
            by_cause.setdefault(cause, []).append(node)
    causes = [f"{_nodes(r, nodes)}: {cause}" for cause, nodes in by_cause.items()]
    seen = "; ".join(causes) or r.reason
    if r.lost:
        text = f"{_nodes(r, r.lost)} failed"
        held = f" and {_several('rank', r.ranks)} with {'it' if len(r.lost) == 1 else 'them'}" if r.ranks else ""
        return f"{text}{held}. Seen by this: {seen}."
    if r.ranks:
        return f"{_several('rank', r.ranks)} failed, the node stays. Seen by this: {seen}."
    return f"no node failed, but the communicators had to be formed again. The reason: {seen}."


def _who_took_over(r: Recovery) -> str:
    anew = "All processes were started anew: their kernels wait for other nodes. " if r.restarts else ""
    if not r.replaced:
        return f"Nobody had to take over. {anew}"
    sources = sorted(set(r.sources.values()))
    came = f", with the shards out of the vault{'s' if len(sources) > 1 else ''} of {_several('node', sources)}"
    who = f"{_nodes(r, r.new_nodes)}, until then spare," if r.new_nodes else "Other slots"
    if not r.new_nodes and {*r.replaced} <= {*r.stood_by}:
        who = "Processes that stood by in their own slots"
    if who.startswith("node"):
        who = who.capitalize()
    return f"{who} took over {_several('rank', r.replaced)}{came if sources else ''}. {anew}"


def _what_was_lost(r: Recovery) -> str:
    if r.generation is None:
        return ""
    repeated = r.repeated or 0
    what = f"Training went on from the start of iteration {r.generation}"
    if repeated == 0:
        return f"{what}; only the interrupted iteration was begun again, no completed one is lost. "
    same = "" if r.replicas[0] else ", bit for bit the same"  # sums of other replicas are in another order
    return f"{what}; {count_text(repeated, 'completed iteration')} had to be done again{same}. "


def _how_long(r: Recovery) -> str:
    phases = {name: s for name, s in r.durations.items() if name in _PHASE}
    text = ", ".join(f"{seconds_text(s)} {_PHASE[name]}" for name, s in phases.items() if s >= 0.0005)
    sign = "From the coordinator's first sign of it"
    if r.first_sign < r.began:
        sign = f"From the last progress of rank {ranks_text(r.ranks)}"
        text = f"{seconds_text(r.began - r.first_sign)} until it was known to be stuck and was ended, {text}"
    total = seconds_text(r.ended - r.first_sign)
    if r.redone is not None and r.pace_s is not None:
        extra = max(0.0, r.redone - r.first_sign - r.pace_s)
        total += f", {seconds_text(extra)} more than the iteration takes anyway"
    return f"{sign} to the first completed iteration it took {total}: {text}. "


def _what_is_left(r: Recovery, story: Story) -> str:
    again = story.committed_epoch >= r.epoch and story.committed >= (r.generation or 0)
    where = "every shard in more than one vault" if len(story.active) > 1 else "all of it on one node"
    shards = (
        f"generation {story.committed} is committed again, {where}"
        if again
        else "until the next generation is committed, the loss of another node may lose shards"
    )
    if again and story.survives is not None and story.survives[0] >= r.epoch:
        shards += f", and any {count_text(story.survives[1], 'node')} may be lost"
    spares = "" if r.spares_left is None else f"; {count_text(r.spares_left, 'spare node')} left"
    return f"Protection now: {shards}{spares}. "


def _what_next(r: Recovery) -> str:
    todo: list[str] = []
    if r.lost:
        todo.append(f"look at {_nodes(r, r.lost)} (its kernel log and its agent's) before using it again")
    elif r.ranks and r.stuck_since is not None:
        todo.append(f"see in that file where {_several('rank', r.ranks)} stood still")
    elif r.ranks:
        killed = any("signal 9" in cause for cause in r.causes.values())
        kernel = ", and at the kernel log of its node: for want of memory it kills" if killed else ""
        todo.append(f"look at the log of {_several('rank', r.ranks)}{kernel}")
    else:
        todo.append("look at the network; the peer_error events say who saw what")
    if r.spares_left == 0 and r.end == "shrunk":
        todo.append("bring a node (deadpool join), and the replica comes back; the next loss costs another one")
    elif r.spares_left == 0:
        todo.append("bring a spare node soon: the next loss ends the job (with a checkpoint, where one can be saved)")
    return f"What to do: {'; '.join(todo)}."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def paragraph(r: Recovery, number: int, story: Story) -> str:
    """The paragraph on one recovery, unwrapped.

    Args:
        r: the recovery, complete.
        number: which one of the run it is, from 1.
        story: the run at the moment the recovery was complete.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(r.began))
    during = f"in iteration {r.progress + 1}" if r.progress >= 0 else "before the first iteration was complete"
    head = f"Recovery {number}, {when}, {during} (epoch {r.epoch}): {_what_failed(r)} "
    if r.end == "stopped":
        why = r.end_message.splitlines()[0] if r.end_message else "it does not say why"
        return f"{head}The job could not go on: {why}. {_sentence(what_to_do(r.end_code or Exit.FAILED))}."
    if r.end == "saved":
        return (
            f"{head}No spare was left, so the survivors saved Megatron's checkpoint of iteration {r.generation} to "
            f"{r.directory} and the job ended. {_sentence(what_to_do(Exit.NO_SPARE_SAVED))}."
        )
    if r.end == "started_over":
        return f"{head}{_sentence(r.end_message)}. {_what_next(r)}"
    if r.end in ("shrunk", "grown"):
        width, was = r.replicas
        why, of = ("No spare was left", "of") if width < was else ("Nodes had come", "instead of")
        taken = f"{why}: the job began anew with {width} {of} {was} data-parallel replicas. "
        return head + taken + _what_was_lost(r) + _how_long(r) + _what_is_left(r, story) + _what_next(r)
    return head + _who_took_over(r) + _what_was_lost(r) + _how_long(r) + _what_is_left(r, story) + _what_next(r)
