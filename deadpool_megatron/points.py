"""Crash points: every place on the data's way where a process may die, by name, passed by the code itself.

``reach(point)`` costs one look at a module variable while no fault is armed. `deadpool inject --at POINT` arms a fault
in the processes of a node; the first of them that passes the point (in the iteration asked for, or later) dies there.

Most points are written down here. Each message of the protocol and each step of a recovery is one as well, by
construction: `cluster.records` adds them, and agent, worker and coordinator pass ``<who>.<record>`` before they send
anything. So nothing can be told without a crash point (tests/unit/test_points.py walks the registry and the sources).
A leaf: everybody may pass a point, so this module knows nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import IO, Final, Literal

Where = Literal["worker", "agent", "coordinator"]


# "during" points lie between two parts of something that is not atomic.
POINTS: Final[dict[str, tuple[Where, str]]] = {
    "small-state.before": ("worker", "an iteration begins; nothing of its generation is captured"),
    "small-state.after": ("worker", "the small state is captured, no slot is open yet"),
    "slot.opened": ("worker", "the generation's slot is open, its small state written"),
    "slice.before": ("worker", "a slice of unique state is about to be copied"),
    "slice.after": ("worker", "a slice of unique state has been copied and published"),
    "local.complete": ("worker", "the last slice is copied, the version is not sealed"),
    "gradient-sync.before": ("worker", "backward passes are over, gradients are not reduced yet"),
    "gradient-sync.after": ("worker", "gradients are reduced"),
    "grad-norm.during": ("worker", "between the gradient norm's local part and its reduction"),
    "optimizer-step.before": ("worker", "through the gate; the first mutation of unique state comes next"),
    "optimizer-step.during": ("worker", "some parameter groups are stepped, others not"),
    "optimizer-step.after": ("worker", "all parameter groups are stepped, 16-bit parameters are stale"),
    "param-gather.before": ("worker", "a data-parallel all-gather of parameters is about to start"),
    "param-gather.after": ("worker", "the all-gather has been waited for"),
    "lr-step.before": ("worker", "the optimizer has stepped, the learning rate has not"),
    "lr-step.after": ("worker", "the learning rate has stepped"),
    "iteration.after": ("worker", "an iteration is over, its line is not logged"),
    "log.before": ("worker", "the line of the iteration is about to be logged"),
    "log.after": ("worker", "the line of the iteration is logged"),
    "evaluation.before": ("worker", "an evaluation begins"),
    "evaluation.during": ("worker", "between two microbatches of an evaluation"),
    "evaluation.after": ("worker", "an evaluation is over and printed"),
    "save.before": ("worker", "a checkpoint is due"),
    "save.during": ("worker", "some of a checkpoint's files are written, its tracker is not"),
    "save.after": ("worker", "a checkpoint is written"),
    "save.finalized": ("worker", "an asynchronous checkpoint is finalized"),
    "recovery.aborted": ("worker", "communicators are aborted, the broken step is not unwound"),
    "recovery.unwound": ("worker", "the broken step is unwound"),
    "recovery.agreed": ("worker", "the agreed generation is known, nothing is restored"),
    "recovery.restored-local": ("worker", "the unique and the small state are those of the agreed generation"),
    "recovery.re-forming": ("worker", "groups are about to be formed"),
    "recovery.re-formed": ("worker", "groups are formed, parameters are not gathered"),
    "recovery.synchronized": ("worker", "parameters are gathered"),
    "recovery.compared": ("worker", "all ranks have compared what they hold"),
    "take-over.rehearsed": ("worker", "a spare is given the coordinate that it has rehearsed"),
    "take-over.building": ("worker", "a spare begins to build the model of its coordinate"),
    "take-over.built": ("worker", "a spare has built its model"),
    "checksum.chunk": ("agent", "a chunk of the own copy is about to be checksummed"),
    "peer-send.before": ("agent", "the transfer of a generation to the peer is about to begin"),
    "peer-send.chunk": ("agent", "a chunk is about to go to the peer"),
    "peer-receive.chunk": ("agent", "a chunk of a peer's copy has arrived"),
    "peer-receive.complete": ("agent", "a peer's copy is complete, its sender does not know"),
    "fetch.before": ("agent", "a lost shard is about to be fetched"),
    "fetch.after": ("agent", "a lost shard has been fetched, nobody knows"),
    "coordinator.persisted": ("coordinator", "the next epoch is on disk, nobody has been told"),
}

_armed: tuple[str, int, Callable[[], None]] | None = None
_iteration = -1


def names(where: Where | None = None) -> list[str]:
    """Every crash point, in the order of the data's way; those of one kind of process with ``where``."""
    return [name for name, (place, _) in POINTS.items() if where is None or place == where]


def add(where: Where, family: str, members: Iterable[str], what: str) -> None:
    """One point ``family.<member>`` for each member; ``what`` has a {} for its name."""
    for name in members:
        POINTS[f"{family}.{name}"] = (where, what.format(name))


def kebab(name: str) -> str:
    """``NodeReady`` as ``node-ready``."""
    return "".join("-" + c.lower() if c.isupper() else c for c in name).lstrip("-")


def arm(point: str, iteration: int, strike: Callable[[], None]) -> None:
    """From now on the first pass of ``point`` in ``iteration`` or later calls ``strike``, on the passing thread."""
    global _armed
    _armed = (point, iteration, strike)


def disarm() -> None:
    global _armed
    _armed = None


def iteration_is(iteration: int) -> None:
    """The process is in this iteration now."""
    global _iteration
    _iteration = iteration


def announce(kind: str, victim: str, log: IO[str]) -> None:
    """Write the moment of an injected fault, from which detection counts (`deadpool timeline` reads it)."""
    print(f"deadpool: fault {kind} strikes {victim} at {time.time():.6f}", file=log, flush=True)


def reach(point: str) -> None:
    """The process is at ``point``."""
    if _armed is not None:
        _pass(point)


def reach_record(who: str, record: object) -> None:
    """The process is about to send ``record``."""
    if _armed is not None:
        _pass(f"{who}.{kebab(type(record).__name__)}")


def _pass(point: str) -> None:
    armed = _armed
    if armed is not None and armed[0] == point and _iteration >= armed[1]:
        disarm()
        armed[2]()
