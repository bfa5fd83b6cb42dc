"""Which case shows what about each crash point: its victim, and what makes the job pass the point.

Every point of the registry is in here (`tests/unit/test_crash_cases.py`), so a new one needs a case. Long runs pass the
cases of a group one after the other; what lies at a job's start or end has short jobs; what only other ways of starting
a job pass says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["ELSEWHERE", "ENDS", "GROUPS", "REPRESENTATIVE", "Case", "known"]


@dataclass(frozen=True)
class Case:
    """A crash at a point.

    Args:
        role: the victim: the node of coordinate ``rank`` (survivor), the spare that takes over (spare), or the
            coordinator.
        trigger: what makes the job come past the point (`crashes.Gauntlet`); empty: it does so by itself.
    """

    point: str
    role: str = "survivor"
    trigger: str = ""
    rank: int = 0
    fault: str = "kill"

    def __str__(self) -> str:
        return f"{self.point} ({self.role}{', ' + self.trigger if self.trigger else ''})"


def _each(names: str, role: str = "survivor", trigger: str = "", rank: int = 0) -> list[Case]:
    return [Case(name, role, trigger, (rank + i) % 4) for i, name in enumerate(names.split())]


def _coordinator(names: str, trigger: str = "") -> list[Case]:
    return [Case(name, "coordinator", trigger, fault="kill-coordinator") for name in names.split()]


_ITERATION = (
    "small-state.before small-state.after slot.opened slice.before slice.after local.complete gradient-sync.before "
    "gradient-sync.after grad-norm.during optimizer-step.before optimizer-step.during optimizer-step.after "
    "param-gather.before param-gather.after"
)
_AFTER = "lr-step.before lr-step.after iteration.after log.before log.after"
_RECOVERY = (
    "recovery.aborted recovery.unwound worker.arrived recovery.agreed recovery.restored-local step.ready "
    "recovery.re-forming recovery.re-formed step.formed recovery.synchronized recovery.compared step.restored "
    "step.resumed"
)
_NODE = "agent.node-ready agent.node-formed agent.node-restored agent.node-resumed"


def _spread(many: list[Case], few: list[Case]) -> list[Case]:
    """The few between the many, so that no more than a few coordinators die within two minutes."""
    out, step = list(many), max(1, len(many) // max(1, len(few)))
    for i, case in enumerate(few):
        out.insert(min(len(out), (i + 1) * step + i), case)
    return out


# Group of cases: each is one long run.
GROUPS: Final[dict[str, list[Case]]] = {
    "iteration": _spread(
        _each(_ITERATION),
        _coordinator("coordinator.committed-to"),
    ),
    "after-iteration": _spread(
        [*_each(_AFTER), Case("worker.iteration", rank=2), Case("worker.side-effect", rank=3)],
        _coordinator("coordinator.inject-reply"),
    ),
    "survivor": _spread(
        [
            *_each(_RECOVERY, trigger="abort"),
            Case("agent.offer", trigger="abort"),
            Case("worker.compared", trigger="abort"),
            Case("agent.compared", trigger="abort"),
        ],
        _coordinator("coordinator.persisted coordinator.declare coordinator.agree", "abort"),
    ),
    "survivor-in-swap": _spread(
        [*_each(_RECOVERY, trigger="swap", rank=1), *_each(_NODE, trigger="swap")],
        _coordinator("coordinator.declare coordinator.agree coordinator.form", "swap"),
    ),
    "spare": [
        Case("take-over.building", "spare", "swap"),
        Case("worker.arena-request", "spare", "swap", 1),
        Case("take-over.built", "spare", "swap", 2),
        Case("worker.registered", "spare", "swap", 3),
        *_each(_RECOVERY, "spare", "swap"),
    ],
    "spare-node": [
        Case("agent.registered", "spare", "swap"),
        Case("agent.node-arrived", "spare", "swap"),
        *_each(_NODE, "spare", "swap"),
        Case("agent.covered", "spare", "swap", 1),
        Case("fetch.before", "spare", "swap", 2),
        Case("fetch.after", "spare", "swap", 3),
    ],
    "agent": _spread(
        [
            *_each("checksum.chunk peer-send.before peer-send.chunk peer-receive.chunk peer-receive.complete"),
            *_each("agent.committed agent.pace"),
            Case("agent.iteration", rank=2),
            Case("agent.side-effect", rank=3),
            Case("agent.worker-exited", trigger="own-worker"),
            Case("agent.refusals", trigger="garbage", rank=1),
            Case("agent.damaged-copy", trigger="corrupt", rank=2),
            Case("agent.machine-sign", trigger="sign", rank=3),
            Case("agent.worker-ready", "spare", "spare-worker"),
            Case("step.parked", "spare", "starting-worker"),
            Case("worker.worker-failed", trigger="bug", rank=1),
            Case("agent.worker-failed", trigger="bug", rank=3),
        ],
        [
            *_coordinator("coordinator.roster coordinator.spare-added", "join"),
            *_coordinator("coordinator.respawn", "spare-worker"),
            *_coordinator("coordinator.arm", "command"),
        ],
    ),
    "moves": _spread(
        [
            Case("worker.held", trigger="drain"),
            Case("agent.node-held", trigger="drain", rank=1),
            Case("agent.join", trigger="coordinator", rank=2),
            Case("agent.registered", trigger="coordinator", rank=3),
            Case("worker.whereabouts", trigger="hang"),
            Case("agent.stalled", trigger="hang", rank=1),
            Case("worker.peer-error", trigger="silent-agent", rank=2),
            Case("agent.peer-error", trigger="silent-agent", rank=3),
            Case("agent.fetch-failed", "spare", "damaged-source"),
            Case("worker.unreadable", trigger="damaged-own", rank=2),
        ],
        [
            *_coordinator("coordinator.hold", "drain"),
            *_coordinator("coordinator.end-stuck", "hang"),
            *_coordinator("coordinator.stop", "loss"),
        ],
    ),
    "around": _each("evaluation.before evaluation.during evaluation.after save.before save.during save.after", rank=3),
    "around-async": [
        *_each("save.before save.during save.after save.finalized"),
        Case("save.finalized", rank=3),
    ],
    "durable": _spread(
        [
            Case("worker.described", "spare", "swap"),
            Case("agent.shards-drained"),
            Case("agent.generation-sealed"),
        ],
        [
            *_coordinator("coordinator.drain-shards coordinator.seal-generation"),
            *_coordinator("coordinator.departed", "drain"),
        ],
    ),
}

# At the start or the end of a job: what the launcher says where it cannot go on, nothing where it has to.
ENDS: Final[dict[str, str]] = {
    "coordinator.placement": "",
    "agent.vault-memory": "",
    "agent.no-room": "--deadpool-host-memory allows",
    "step.finished": "",
    "agent.finished": "",
    "coordinator.all-finished": "",
    "worker.state-hash": "",
    "agent.state-hash": "",
    "worker.shard-ready": "no checkpoint could be saved",
    "agent.saved": "no checkpoint could be saved",
    "coordinator.load-shards": "",
    "coordinator.resume-at": "",
    "agent.preemption-notice": "",
    "coordinator.exit-notice": "",
}

# Points that no job under `deadpool launch` on this machine passes.
ELSEWHERE: Final[dict[str, str]] = {
    "worker.leaving": "only where another launcher has started the workers, as their last message",
    "coordinator.enlisted": "only while `deadpool agent` nodes come, and those ask again",
    "agent.set-aside": "only at the start with another number of replicas (test_shrink loses nodes there)",
    "agent.shards-loaded": "a moment after the start, before a command can arm it (test_durable_core loses a node)",
    "step.rehearsed": "only with --deadpool-rehearsals (test_rehearsals.py), and who rehearses has nothing to lose",
    "agent.rehearsed": "only with --deadpool-rehearsals (test_rehearsals.py loses spares), and told again",
    "agent.standbys": "only with --deadpool-standby-workers, and told again (test_simulated_jobs)",
    "coordinator.rehearse": "only with --deadpool-rehearsals: a drain goes on with the next one (test_simulated_jobs)",
    "take-over.rehearsed": "only with --deadpool-rehearsals: test_rehearsals.py",
    "worker.checked": "only parked spares send it, and it is asked again (test_checked_spares, test_simulated_jobs)",
    "agent.spare-checked": "as worker.checked",
    "coordinator.check-spare": "as worker.checked: the next coordinator asks anew",
    "agent.behind": "only an agent that has missed an epoch's declaration asks for the whole of it",
    "coordinator.keep-stacks": "only where a worker hangs past a deadline, and told again in the next epoch",
    "coordinator.give-up-drain": "after a drain that failed, when nothing waits for the answer",
}

# What every run of the tests shows: the optimizer's step, a spare in the middle of a swap, the coordinator.
REPRESENTATIVE: Final = [
    Case("optimizer-step.during", rank=2),
    Case("recovery.re-forming", "spare", "swap", 1),
    Case("coordinator.agree", "coordinator", "abort", fault="kill-coordinator"),
]


def known() -> set[str]:
    """Every point that has a case, a short job or a reason."""
    return {case.point for cases in GROUPS.values() for case in cases} | set(ENDS) | set(ELSEWHERE)
