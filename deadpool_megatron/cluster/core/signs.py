"""Whom the end of a worker is to be blamed on, by what its machine says: Xids of the NVIDIA driver, and who died first.

One bad GPU takes its NVLink domain along: the others report that their links went down, and their processes die. So a
sign is a *cause* (its own machine is at fault), of a *link* (either end may be), or one that only *follows*. A death
that follows spends no spare and does not count against its node; the node of the cause is replaced. Pure.

Source of the table: NVIDIA, "Analyzing Xid Errors with the Xid Catalog" (docs.nvidia.com/deploy/xid-errors): its
columns "Immediate Action" and "Trigger Conditions", and its decoding of Xids 144 to 150 with local and remote effects.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum
from typing import Final

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Effects, Persist, emit
from deadpool_megatron.cluster.core.members import Members
from deadpool_megatron.cluster.core.protection import Protection
from deadpool_megatron.cluster.placement.domains import NVLINK

CAUSE_S: Final = 900.0
"""So long a cause explains what ends on its own node: the device stays as it is until it is reset."""


class Role(Enum):
    """What an Xid says of the node that reports it."""

    CAUSE = "cause"
    """A device, link or host of this node is at fault, and the device needs a reset."""
    LINK = "link"
    """A link is down or gives errors; the device at its other end may be the cause."""
    FOLLOWS = "follows"
    """It is seen beside another Xid, here or elsewhere; alone it says nothing."""
    PROGRAM = "program"
    """What the process itself did may be the cause: nobody is blamed by it."""


XIDS: Final[dict[int, tuple[Role, str]]] = {
    13: (Role.PROGRAM, "graphics engine exception"),
    31: (Role.PROGRAM, "GPU memory page fault"),  # RESTART_APP; hardware only if it repeats on one GPU
    43: (Role.FOLLOWS, "GPU stopped processing"),  # IGNORE: the process hit a fault of its own
    45: (Role.FOLLOWS, "preemptive cleanup, due to previous errors"),  # "not solo: follow other Xid"; any SIGKILL too
    46: (Role.CAUSE, "GPU stopped processing"),
    48: (Role.CAUSE, "double bit ECC error"),
    62: (Role.CAUSE, "internal micro-controller halt"),
    63: (Role.FOLLOWS, "GPU memory remapping event"),  # IGNORE: what the GPU does about a 48
    64: (Role.CAUSE, "GPU memory remapping failure"),
    74: (Role.LINK, "NVLink error"),  # "because the link went down", if a GPU at its other end fails
    79: (Role.CAUSE, "GPU has fallen off the bus"),
    94: (Role.FOLLOWS, "contained memory error"),  # RESTART_APP, sympathetic; poison may come from a remote 144 to 146
    95: (Role.CAUSE, "uncontained memory error"),
    109: (Role.CAUSE, "context switch timeout"),
    110: (Role.CAUSE, "security fault"),
    119: (Role.CAUSE, "GSP RPC timeout"),
    120: (Role.CAUSE, "GSP error"),
    137: (Role.LINK, "NVLink FLA privilege error"),  # reported by a remote MMU
    140: (Role.CAUSE, "unrecovered ECC error"),
    143: (Role.CAUSE, "GPU initialization error"),
    144: (Role.LINK, "NVLink SAW error"),
    145: (Role.LINK, "NVLink RLW error"),  # "a by-product", if a link of the partition went down in the last 30 s
    146: (Role.LINK, "NVLink TLW error"),
    147: (Role.LINK, "NVLink TREX error"),
    148: (Role.LINK, "NVLink NVLPW_CTRL error"),
    149: (Role.CAUSE, "NVLink NETIR error"),  # link fatal, and always of a local device
    150: (Role.CAUSE, "NVLink MSE error"),
    154: (Role.FOLLOWS, "GPU recovery action changed"),  # "informational only regarding another Xid"
    155: (Role.LINK, "NVLink software defined error"),
    156: (Role.CAUSE, "resource retirement event"),
    158: (Role.CAUSE, "GPU fatal timeout"),
    167: (Role.CAUSE, "PCIe fatal timeout"),
    171: (Role.CAUSE, "uncorrectable DRAM error"),
    172: (Role.CAUSE, "uncorrectable SRAM error"),
}


def role_of(record: r.MachineSign) -> Role:
    """What a sign says; the driver may tell itself that it follows another one."""
    role = XIDS.get(record.xid, (Role.PROGRAM, ""))[0]
    return Role.FOLLOWS if record.after and role is not Role.CAUSE else role


class Blamed(Enum):
    """What the end of a worker is, as far as signs tell."""

    CAUSE = "cause"
    FOLLOWS = "follows"
    LINK = "link"
    """Its link is at fault, at whichever end: it counts until the other end turns out to be the cause."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of the end of one worker, with what explains it in words."""

    blamed: Blamed
    why: str = ""


class Signs:
    """What machines have told of late. Causes are on the nodes' records, so the next coordinator knows them too."""

    def __init__(self, members: Members, protection: Protection) -> None:
        self._members = members
        self._protection = protection
        self._seen: dict[int, list[tuple[float, Role]]] = {}

    def took(self, record: r.MachineSign) -> Effects:
        """A machine tells. A cause is written down, and what it explains is taken from the records of others."""
        members, now, role = self._members, self._members.unix_s, role_of(record)
        seen = [each for each in self._seen.get(record.node, ()) if now - each[0] < r.SPREAD_S]
        self._seen[record.node] = [*(each for each in seen if each[1] is not role), (now, role)]
        what = f"Xid {record.xid}: {XIDS.get(record.xid, (role, record.text or 'not in the table'))[1]}"
        what += f" (GPU {record.device})" * bool(record.device)
        yield emit("sign", node=record.node, cause=what, role=role.value)
        if role is not Role.CAUSE:
            return
        known = members.nodes[record.node].record.failures
        if not any(each.kind == "sign" and each.cause == what and now - each.when < r.SPREAD_S for each in known):
            members.failed(record.node, "sign", what)
            for node in self._seen if members.nodes[record.node].trained else ():
                if node != record.node and self._explained(node, record.node):
                    members.nodes[node].record.forgive(now - r.SPREAD_S)
            yield Persist()

    def judge(self, record: r.WorkerExited, by_peer: bool) -> Verdict:
        """A worker of a healthy node has ended; ``by_peer``: with an error that the loss of a peer may have caused."""
        node = record.node
        if own := self._cause(node, CAUSE_S):
            return Verdict(Blamed.CAUSE, own)
        for_a_peer = by_peer or record.code == -signal.SIGABRT
        others = [n for n, s in self._members.nodes.items() if n != node and s.trained and s.record.failures]
        for culprit in others:
            explained = self._explained(node, culprit)
            cause = self._cause(culprit, r.SPREAD_S, ("sign", "lost") if explained else ("sign",))
            if cause and (for_a_peer or explained):
                return Verdict(Blamed.FOLLOWS, f"{cause} on {self._members.called(culprit)}")
        first = next((n for n in others if self._died(n, record.epoch)), None)
        if first is not None and record.code == -signal.SIGABRT:  # as NCCL's watchdog ends a process
            return Verdict(Blamed.FOLLOWS, f"the end of a worker of {self._members.called(first)}")
        if Role.LINK in self._roles(node):
            return Verdict(Blamed.LINK, "a link error of its machine")
        return Verdict(Blamed.UNKNOWN)

    def tells(self, node: int) -> bool:
        """The machine has told of a cause or a link: what ends there of late is no fault of the script's."""
        return bool(self._cause(node, CAUSE_S)) or Role.LINK in self._roles(node)

    def _cause(self, node: int, within_s: float, kinds: tuple[str, ...] = ("sign",)) -> str:
        """The cause that the machine of a node has told of late (or its loss); empty when there is none."""
        now = self._members.unix_s
        recent = [
            each.cause
            for each in self._members.nodes[node].record.failures
            if each.kind in kinds and now - each.when < within_s
        ]
        return recent[-1] if recent else ""

    def _roles(self, node: int) -> set[Role]:
        now = self._members.unix_s
        return {role for when, role in self._seen.get(node, ()) if now - when < r.SPREAD_S}

    def _explained(self, node: int, culprit: int) -> bool:
        """The machine of ``node`` tells of a link, or of what follows; and the culprit may be at its other end."""
        here, there = (self._protection.labels(n).get(NVLINK) for n in (node, culprit))
        same = here is None or there is None or here == there
        return same and bool(self._roles(node) & {Role.LINK, Role.FOLLOWS})

    def _died(self, node: int, epoch: int) -> bool:
        """A worker of the node has ended in this epoch."""
        failures = self._members.nodes[node].record.failures
        return any(each.kind == "worker" and each.epoch == epoch for each in failures)
