"""What two runs must have in common to be called equal, and everything in which they are not. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

type Hashes = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Step:
    """One completed iteration. ``exact`` are hexadecimal floats by name, losses and ``grad norm``: no digit is lost."""

    iteration: int
    epoch: int
    exact: Mapping[str, str]
    seconds: float
    blocked_s: float

    @property
    def loss(self) -> str:
        """The first loss, with as many digits as it takes to tell it from every other double."""
        return repr(float.fromhex(next(iter(self.exact.values()))))


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process: its id and the time it was created, since ids are used again."""

    pid: int
    created: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of both runs.

    ``expected`` is the number of iterations a run has. ``before`` and ``after`` are the survivors by rank, None for a
    process that was not there. ``mute`` are iterations whose report may have died with the victim: nothing of them is
    compared if the disturbed run has none.
    """

    expected: int
    undisturbed: Sequence[Step]
    disturbed: Sequence[Step]
    undisturbed_hashes: Hashes
    disturbed_hashes: Hashes
    before: Mapping[int, ProcessIdentity | None]
    after: Mapping[int, ProcessIdentity | None]
    mute: frozenset[int] = frozenset()


def steps_of(events: Iterable[Mapping[str, Any]]) -> list[Step]:
    """The completed iterations among a run's events, in order; a redone one is there once for each time."""
    return [
        Step(
            e["iteration"],
            e["epoch"],
            {**e["losses_hex"], **({"grad norm": e["grad_norm_hex"]} if e["grad_norm_hex"] is not None else {})},
            e["seconds"],
            e["blocked_s"],
        )
        for e in events
        if e["event"] == "iteration"
    ]


def hash_pairs(evidence: Evidence) -> list[tuple[str, str, str | None, str | None]]:
    """(rank, part, digest of the undisturbed run, of the disturbed run) for every digest of either run."""
    a, b = evidence.undisturbed_hashes, evidence.disturbed_hashes
    out: list[tuple[str, str, str | None, str | None]] = []
    for rank in sorted({*a, *b}, key=int):
        mine, other = a.get(rank, {}), b.get(rank, {})
        out += [(rank, part, mine.get(part), other.get(part)) for part in dict.fromkeys([*mine, *other])]
    return out


def compare(evidence: Evidence) -> list[str]:
    """Every difference as one line; an empty list means that the runs are equal bit for bit."""
    out: list[str] = []
    reference = {step.iteration: step for step in evidence.undisturbed}
    seen = {step.iteration for step in evidence.disturbed}
    for iteration in range(evidence.expected):
        if iteration not in reference:
            out.append(f"iteration {iteration}: the undisturbed run has not reported it")
        if iteration not in seen and iteration not in evidence.mute:
            out.append(f"iteration {iteration}: the disturbed run has not reported it")
    for step in evidence.disturbed:
        want = reference.get(step.iteration)
        if want is None:
            continue
        for name in dict.fromkeys([*want.exact, *step.exact]):
            left, right = want.exact.get(name), step.exact.get(name)
            if left != right:
                out.append(f"iteration {step.iteration} (epoch {step.epoch}): {name} is {right}, undisturbed {left}")
    pairs = hash_pairs(evidence)
    if not pairs:
        out.append("neither run has written state hashes")
    for rank, part, left, right in pairs:
        if left is None or left != right:
            out.append(f"rank {rank}: SHA-256 of {part} differs")
    if not evidence.before:
        out.append("no survivor's process was seen before the kill")
    for survivor, process in evidence.before.items():
        now = evidence.after.get(survivor)
        if process is None or now != process:
            was = f"process {process.pid}" if process else "not seen"
            then = f"process {now.pid}" if now else "not seen"
            out.append(f"rank {survivor}: {was} before the kill, {then} after it")
    return out
