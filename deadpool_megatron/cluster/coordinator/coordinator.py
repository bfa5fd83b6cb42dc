"""The coordinator's process: sockets, clock and files around the pure `Core`."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import platform
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.coordinator.absences import Absences, Ask
from deadpool_megatron.cluster.coordinator.drain_sources import Drains
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.coordinator.saved_state import Memory, of_this_version
from deadpool_megatron.cluster.coordinator.validate import misfit
from deadpool_megatron.cluster.core.core import ABSENCE, GONE, Core
from deadpool_megatron.cluster.core.effects import Action, Emit, Finish, Keep, Send
from deadpool_megatron.cluster.core.job import JobSpec, Phase
from deadpool_megatron.cluster.core.protection import in_words
from deadpool_megatron.cluster.link.awake import AwakeClock
from deadpool_megatron.cluster.link.link import Hub, agent_identity
from deadpool_megatron.cluster.link.ports import patience_s
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.records.tables import Broadcast
from deadpool_megatron.cluster.store import Guard, Store, StoreError
from deadpool_megatron.durable import Lease
from deadpool_megatron.observe import RunDirectory

_OF_TOOLS = (r.Inject, r.Drain, r.AddSpare)  # (a union would be made for every packet)
_FAREWELL_S = 10.0
_LONGEST_PASS_S = 0.75
_LOOK_FOR_ANSWERS_S = 0.005  # of ports that were asked: an absence is short, and rare
_MOST_REFUSALS_TOLD = 100
_STATUS_INTERVAL_S = 0.2
_STATUS_SIGN_OF_LIFE_S = 5.0  # written anew although nothing has changed
_HOST = socket.gethostname()
_TOLD = ("durable", "waiting", "late", "started_over", "shrunk", "grown", "never_struck")  # on the terminal, too
_STATUS_FIRST = frozenset({"training", "resumed"})  # who reads of these finds in status.json who holds what now
_STATUS_WAITS = 5  # times what it takes, from a declaration on
_STATUS_SHARE = 0.005  # of the coordinator's time that writing it may take, in large jobs


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """Where the coordinator listens and writes. ``host`` is the address others reach it at, ``bind`` its own.

    ``store_port`` is that of the rendezvous store beside it. ``resume``: go on where a coordinator that is gone left
    off. ``elected``: another node may lead one day. ``agent``: settings of an agent of this job but for its node, for
    `deadpool join`. ``drain_from``: who says that nodes are to be taken away (see `drain_sources`), asked every
    ``drain_poll_s`` seconds.
    """

    host: str
    bind: str
    port: int
    secret: bytes
    run_dir: str
    store_port: int = 0
    job_id: str = ""
    state_hash: str = ""
    resume: bool = False
    elected: bool = False
    agent: Mapping[str, Any] = field(default_factory=dict)
    drain_from: Sequence[str] = ()
    drain_poll_s: float = 10.0


class _Identities(dict[int, bytes]):
    """By node, the name of its agent's end: asked for with every packet."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id

    def __missing__(self, node: int) -> bytes:
        self[node] = agent_identity(self._job_id, node).encode()
        return self[node]


class Coordinator:
    """Runs one job to its end. One thread; `run` returns the exit code and the message that goes with it."""

    def __init__(
        self,
        job: JobSpec,
        settings: CoordinatorSettings,
        enlistment: Enlistment,
        store: Store,
        guard: Guard,
        hub: Hub | None = None,
        run: RunDirectory | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
        lease: Lease | None = None,
        worked: Callable[[], float] = time.thread_time,
        unix: Callable[[], float] = time.time,
        ask: Ask | None = None,
    ) -> None:
        """``guard``: of the leadership in this term; without it ``store`` takes no write.

        ``lease``: of the durable directory, kept by its own thread. ``hub``, ``run``, ``clock`` (seconds, monotonic),
        ``chance``, ``worked`` (seconds of processor time) and ``unix`` (seconds since 1970) are those of ``settings``
        and this machine unless given. ``ask``: see `Absences`.
        """
        self._memory = Memory(store, guard)
        self._steps: dict[int, tuple[int, str]] = {}  # by node, the last step of a recovery, and of which epoch
        self._committed: dict[int, int] = {}  # by node, the newest generation that all its coordinates have committed
        self._settings = settings
        self._enlistment = enlistment
        self._lease = lease
        patience, silence_s = patience_s(again=settings.resume), job.deadlines.lease
        self._clock = AwakeClock(max(_LONGEST_PASS_S, silence_s / 2), clock)  # less than the silence that means gone
        self._core = Core(job, r.Address(settings.host, settings.store_port), unix() - self._clock.now())
        # Who falls silent loses its connection first, and is lost when it has not come back: within the lease, both.
        self._hub = hub or Hub(settings.bind, settings.port, settings.secret, (1 - ABSENCE) * silence_s, patience)
        self._absences = Absences(ask)
        self.port = self._hub.port
        self._run = run or RunDirectory(settings.run_dir, fresh=not settings.resume, aside=True)
        self._finish: Finish | None = None
        self._refused = 0
        self._identities = _Identities(settings.job_id)
        self._broadcast = Broadcast(chance)
        self._no_places_until = self._clock.now() + silence_s if settings.resume else 0.0
        self._connected: set[int] = set()
        self._interrupted: Exit | None = None
        self._parent = os.getppid()
        self._preempted = False
        self._status_due = 0.0
        self._drains = Drains(settings.drain_from, settings.drain_poll_s) if settings.drain_from else None
        self._worked = worked
        self._unix = unix
        self._status_cost = 0.0  # seconds of processor time that the last one took, in a job of this size
        self._status_stale = True

    def interrupt(self, code: Exit = Exit.INTERRUPTED) -> None:
        """The user wants the end, with this exit code; safe in a signal handler."""
        self._interrupted = self._interrupted or code
        self._memory.insists = False

    def preempt(self) -> None:
        """The job has to leave soon, with what is committed made durable; safe in a signal handler."""
        self._preempted = True

    def run(self, announce: Callable[[int], None]) -> tuple[int, str]:
        """Serve the job. ``announce`` is called with the port once the coordinator listens."""
        self.begin(announce)
        core, woke, gather = self._core, 0.0, self._core.job.gather_s
        while self._finish is None:
            timeout = self.timeout()
            if core.phase is Phase.RUNNING and self._clock.now() - woke < gather:
                time.sleep(gather)  # thousands of agents: their news are taken some at a time, not one by one
            woke = self._clock.now()
            self.turn(timeout)
        return self.end()

    @property
    def finished(self) -> bool:
        """The job is over: `end` is next."""
        return self._finish is not None

    @property
    def interrupted(self) -> bool:
        """The user wants the end."""
        return self._interrupted is not None

    def begin(self, announce: Callable[[int], None]) -> None:
        """Before the first `turn`."""
        self._run.job(
            {
                "coordinator": f"{self._settings.host}:{self.port}",
                "secret": self._settings.secret.hex(),
                "lease": self._core.job.deadlines.lease,
                "pid": os.getpid(),
                "agent": dict(self._settings.agent),
            },
            again=self._settings.resume,
        )
        if self._settings.resume:
            kept = self._memory.read()
            if kept is not None:
                with of_this_version():
                    if (until := kept["now"].get("waits_until")) is not None:
                        left = min(kept["now"]["waits_s"], max(0.0, until - self._unix()))
                        kept["now"]["waits_s"] = left
                    actions = self._core.restored(kept, self._clock.now())
                self._do(actions)
        else:
            self._memory.begin(self._core.dump())
        self._write_status()
        host, store_port = self._settings.host, self._settings.store_port
        self._memory.publish_place(host, self.port, store_port, self._settings.job_id, self._settings.resume)
        announce(self.port)
        if self._settings.elected:
            self._memory.watch()

    def timeout(self) -> float:
        """Seconds until there is something to do if nothing comes; half a second at most."""
        deadline = self._core.next_deadline()
        now = self._clock.now()
        most = _LOOK_FOR_ANSWERS_S if self._absences.asks else 0.5
        timeout = most if deadline is None else min(most, max(0.0, deadline - now))
        return min(timeout, max(0.0, self._status_due - now)) if self._status_stale else timeout

    def turn(self, timeout: float) -> None:
        """One turn of the loop: what comes within ``timeout`` seconds, and what is due."""
        self._hub.wait(timeout, self._packet, self._gone)
        self._tell_standstill()
        for node, refused in self._absences.answers(self._core.awaits):
            now = self._clock.now()
            self._do(self._core.node_lost(node, GONE, now) if refused else self._core.node_lives(node, now))
        self._memory.check()
        self._run.flush()
        self._do(self._core.tick(self._clock.now()))
        if self._drains is not None and self._finish is None:
            for node, why in self._drains.due(self._core, self._clock.now()):
                self._run.event("drain_wanted", epoch=self._core.epoch, node=node, cause=why)
                self._do(self._core.drain(node, self._clock.now())[1])
        if self._lease is not None and self._lease.lost is not None:
            why, self._lease = str(self._lease.lost), None
            self._do(self._core.durable_taken(why, self._clock.now()))
        if self._preempted and self._finish is None:
            self._preempted = False
            self._do(self._core.preempted(self._clock.now()))
        if self._interrupted is not None and self._finish is None:
            self._do(self._core.interrupted(self._clock.now(), self._interrupted, self._how))
        now = self._clock.now()
        if now >= self._status_due + (0.0 if self._status_stale else _STATUS_SIGN_OF_LIFE_S):
            self._write_status()

    @property
    def orphaned(self) -> bool:
        """Whoever has started this process is gone."""
        return os.getppid() != self._parent

    @property
    def _how(self) -> str:
        """What has ended the job, where SIGTERM (or its own fate) has come from the end of its launcher."""
        return "its launcher was killed" * self.orphaned

    def abandoned(self) -> tuple[int, str]:
        """Instead of `end`, when the leadership is over and nobody has it any more: whoever can be told is told.

        What this coordinator decides is kept by no store from now on.
        """
        actions = self._core.interrupted(self._clock.now(), Exit.TERMINATED, self._how)
        assert self._core.end is not None
        code, message = self._core.end
        if not actions:  # it had been decided, and told to nobody
            actions = [
                Emit("stopped", {"epoch": self._core.epoch, "code": int(code), "message": message}),
                Send(None, r.Stop(code, message)),
                Finish(int(code), message),
            ]
        self._do([action for action in actions if not isinstance(action, Keep)])
        return self.end()

    def end(self) -> tuple[int, str]:
        """After the last one; the exit code and the message that goes with it."""
        assert self._finish is not None
        with contextlib.suppress(StoreError):  # that it has ended is kept already
            self._memory.clear()  # before the agents leave: nobody is to go on with a job that is over
        self._say_goodbye()
        self._write_state_hash()
        if self._finish.code:
            self._run.error(self._finish.code, self._finish.message)
        self._write_status()
        self._run.close()
        self._absences.close()
        self._hub.close()
        return self._finish.code, self._finish.message

    def _tell_standstill(self) -> None:
        seconds = self._clock.stood_still()
        if seconds:
            self._run.event("stood_still", epoch=self._core.epoch, seconds=round(seconds, 3))
            print(
                f"deadpool: the coordinator stood still for {seconds:.1f} s (stopped, paused or swapped out); nobody "
                "is late for that, and nodes whose connection has ended meanwhile have time to come back",
                file=sys.stderr,
                flush=True,
            )

    def _packet(self, identity: bytes, packet: bytes) -> None:
        try:
            record = r.decode_from_agent(packet)
        except r.RecordError as err:
            self._refuse(str(err))
            return
        now = self._clock.now()
        if isinstance(record, _OF_TOOLS):
            self._request(identity, record, now)
            return
        if isinstance(record, r.Enlist):
            self._enlist(identity, record, now)
            return
        node = record.node
        state = self._core.nodes.get(node)
        if identity != self._identities[node]:
            self._refuse(f"{identity!r} speaks for node {node}")
            if isinstance(record, r.Join) and identity.startswith(b"node-"):  # it would try for ever
                why = f"node {node} is of a run of this job that is over; job {self._settings.job_id} runs now"
                self._reply(identity, r.Stop(Exit.FENCED, why))
            return
        cause = misfit(record, self._core.job.world_size, self._core.epoch)
        if cause:
            self._refuse(f"node {node}: {cause}")
            return
        if state is not None and state.gone and not isinstance(record, r.Join):
            return  # a node that was declared lost has no say any more
        self._connected.add(node)
        if isinstance(record, r.Join):
            self._absences.over(node)
            self._broadcast.joined(node)
        elif isinstance(record, r.Behind):
            if whole := self._broadcast.behind(node):
                self._hub.send(identity, whole)
            return
        step = self._took(record)
        self._do(self._core.received(record, now), step)

    def _took(self, record: r.AgentRecord) -> dict[str, Any] | None:
        """What a node has told of its own progress, for the status; the fields of a ``step`` event if it is one."""
        if isinstance(record, r.Committed):
            self._committed[record.node] = record.generation
            return None
        step = r.STEPS.get(type(record))
        if step is None:
            return None
        epoch, node = int(getattr(record, "epoch", 0)), int(getattr(record, "node", -1))
        if self._steps.get(node, (-1, ""))[0] > epoch:
            return None
        self._steps[node] = (epoch, step)
        return {"epoch": epoch, "node": node, "step": step}

    def _enlist(self, identity: bytes, record: r.Enlist, now: float) -> None:
        if now < self._no_places_until or self._core.awaits_agents:
            # Whoever got a place from the coordinator before this one tells it first, and a place is free only once
            # its agent is given up: that of a machine that comes back beside its coordinator. It asks again.
            return
        nodes = self._core.nodes.items()
        joined = {n for n, s in nodes if s.agent_pid}
        answer = self._enlistment.answer(record, joined, {n for n, s in nodes if s.gone})
        if answer is None:
            error, node, actions = self._core.add_spare(record.host, now, record.node)
            if error:
                return  # not in the middle of a recovery: it asks again
            answer = self._enlistment.comes_back(record, node)
            self._do(actions)
        self._reply(identity, answer)

    def _reply(self, identity: bytes, record: r.CoordinatorRecord) -> None:
        """To one who is in no assignment: a tool, or a node that asks for a place."""
        points.reach_record("coordinator", record)
        self._hub.send(identity, r.encode(record))

    def _request(self, identity: bytes, record: r.Inject | r.Drain | r.AddSpare, now: float) -> None:
        """What a command-line tool asks for."""
        core = self._core
        reply: r.InjectReply | r.SpareAdded
        match record:
            case r.Inject():
                fault = record.fault
                error, actions = self._inject(fault, now)
                reply = r.InjectReply(error)
                if not error:
                    self._run.event(
                        "inject",
                        epoch=core.epoch,
                        node=fault.node,
                        iteration=fault.iteration,
                        fault=fault.kind,
                        point=fault.point,
                    )
            case r.Drain() if record.cancel:
                error, actions = core.cancel_drain(record.node, now)
                reply = r.InjectReply(error)
            case r.Drain():
                error, actions = core.drain(record.node, now)
                reply = r.InjectReply(error, bool(error) and core.cannot_drain(record.node)[1])
            case r.AddSpare():
                error, node, actions = core.add_spare(record.host, now)
                reply = r.SpareAdded(error, node, later=core.phase is Phase.STARTING)
        self._do(actions)  # first: a node that was promised a place has one, whatever becomes of this process
        self._reply(identity, reply)

    def _inject(self, fault: r.Fault, now: float) -> tuple[str, list[Action]]:
        if fault.point:
            if fault.point not in points.POINTS:
                near = difflib.get_close_matches(fault.point, points.names(), 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                return f"there is no crash point {fault.point}{hint} (deadpool inject --list shows all)", []
            if points.POINTS[fault.point][0] == "coordinator":
                points.arm(fault.point, -1, _die)
                return "", []
        if fault.kind == "kill-coordinator":
            _die()
        return self._core.inject(fault, now)

    def _refuse(self, cause: str) -> None:
        self._refused += 1
        if self._refused <= _MOST_REFUSALS_TOLD:  # the rest is only counted, in status.json
            self._run.event("refused", epoch=self._core.epoch, cause=cause)
        self._status_stale = True

    def _gone(self, identity: bytes) -> None:
        name = identity.decode(errors="replace")
        self._enlistment.left(name.removeprefix("enlist-"))
        number = name.removeprefix("node-").partition("@")[0]
        if not number.isdecimal() or identity != self._identities[int(number)]:
            return
        node = int(number)
        now, stood_still = self._clock.now(), self._clock.just_woke(self._core.job.deadlines.lease)
        self._do(self._core.node_away(node, now, stood_still))
        if not self._core.awaits(node):
            self._connected.discard(node)
        elif (vault := self._core.nodes[node].vault) is not None and not self._absences.began(node, vault):
            self._do(self._core.node_lives(node, now))

    def _do(self, actions: list[Action], step: dict[str, Any] | None = None) -> None:
        if not actions and step is None:
            return
        # What a coordinator that starts again must know comes first, then messages, then the log: a recovery does not
        # wait for that. Events bear the time of the decision.
        decided = time.time()
        kept = [action for action in actions if isinstance(action, Keep)]
        if kept:
            parts = {name: part for action in kept for name, part in action.parts.items()}
            if (now := parts.get("now", {})).get("waits_s") is not None:  # whoever reads it has no clock but the wall's
                parts["now"] = {**now, "waits_until": self._unix() + now["waits_s"]}
            self._memory.write(parts)
            points.reach("coordinator.persisted")
        for action in actions:
            if isinstance(action, Send):
                points.reach_record("coordinator", action.record)
                nodes = [action.node] if action.node is not None else self._core.members.present()
                for node, packet in self._broadcast.packets(action.record, nodes):
                    self._hub.send(self._identities[node], packet)
        events = {action.event for action in actions if isinstance(action, Emit)}
        if events & _STATUS_FIRST:
            self._write_status()
        elif "declared" in events:  # what thousands of nodes say next does not wait for it
            self._status_due = max(self._status_due, self._clock.now() + _STATUS_WAITS * self._status_cost)
        if step is not None:
            self._run.note("step", t=decided, **step)
        for action in actions:
            if isinstance(action, Emit):
                more = self._what_runs() if action.event == "started" else {}
                self._run.event(action.event, t=decided, **action.fields, **more)
                if action.event == "placed":
                    for line in in_words(action.fields):
                        print(f"[deadpool] {line}", file=sys.stderr, flush=True)
                if action.event.startswith(_TOLD) and "message" in action.fields:
                    print(f"deadpool: {action.fields['message']}", file=sys.stderr, flush=True)
            elif isinstance(action, Finish):
                self._finish = action
        self._status_stale = self._status_stale or bool(actions) or step is not None

    def _what_runs(self) -> dict[str, Any]:
        """The script with its arguments, and the versions of this node, for the report."""
        command = list(self._settings.agent.get("command", ()))
        return {"command": command[3:], "versions": _versions()}  # without python -m deadpool_megatron.worker

    def _say_goodbye(self) -> None:
        """Wait until every agent has ended its workers and left, within a deadline."""
        left = self._connected - {n for n, s in self._core.nodes.items() if s.gone}

        def last_words(identity: bytes, packet: bytes) -> None:
            try:
                record = r.decode_from_agent(packet)
            except r.RecordError as err:
                self._refuse(str(err))
                return
            if isinstance(record, r.StateHash):
                self._core.seen.state_hash(record)
            elif isinstance(record, r.Join) and self._finish is not None:  # it may not have heard of the end
                self._reply(identity, r.Stop(self._finish.code, self._finish.message))

        self._hub.farewell(map(self._identities.__getitem__, left), _FAREWELL_S, last_words)

    def _write_state_hash(self) -> None:
        path, hashes = self._settings.state_hash, self._core.seen.state_hashes
        if path and hashes:
            content = {"coordinates": {str(rank): hashes[rank] for rank in sorted(hashes)}}
            temporary = f"{path}.{os.urandom(4).hex()}"
            try:
                with open(temporary, "w") as f:
                    json.dump(content, f, indent=1)
                os.replace(temporary, path)
            except OSError as err:  # the job has ended as it has
                print(f"deadpool: --deadpool-state-hash {path}: {err.strerror}", file=sys.stderr, flush=True)

    def _write_status(self) -> None:
        begun, core = self._worked(), self._core
        gap = max(_STATUS_INTERVAL_S, self._status_cost / (_STATUS_SHARE / (1 if core.recovery is None else 4)))
        self._status_due = self._clock.now() + gap
        coordinates: list[dict[str, Any]] = []
        for rank, slot in enumerate(core.assignment):
            info = core.coordinates.get(rank)
            state = core.nodes[slot.node]
            epoch, step = self._steps.get(slot.node, (-1, ""))
            coordinates.append(
                {
                    "rank": rank,
                    "tp": info.tp if info else None,
                    "pp": info.pp if info else None,
                    "dp": info.dp if info else None,
                    "node": slot.node,
                    "local_rank": slot.local,
                    "pid": state.pids.get(slot.local),
                    "state": "lost" if state.gone else core.phase.value,
                    "step": step if epoch == core.epoch else None,
                    "generation": self._committed.get(slot.node),
                }
            )
        self._run.status(
            {
                "t": time.time(),
                "phase": core.phase.value,
                "end": None if core.end is None else {"code": core.end[0], "message": core.end[1]},
                "deadpool": core.job.deadpool,
                "epoch": core.epoch,
                "iteration": core.iteration,
                "nodes": [
                    {"node": n, "name": s.name, "agent_pid": s.agent_pid, "role": s.role, **self._known_of(n)}
                    for n, s in sorted(core.nodes.items())
                ],
                "coordinates": coordinates,
                "spares": [
                    {
                        "node": n,
                        "pids": [s.pids[i] for i in sorted(s.pids)],
                        "state": "parked" if len(s.parked) >= core.job.slots_per_node else "starting",
                        "rehearses": sorted(s.rehearses),
                        "rehearsed": sorted(s.rehearsed),
                        "unrehearsed": s.unrehearsed,
                        "checked": s.checked,
                        "unfit": s.unfit,
                    }
                    for n, s in sorted(core.nodes.items())
                    if s.role == "spare"
                ],
                "drains": self._pending_drains(),
                "covered": core.covered,
                "replicas": core.replicas,
                "generation": {"committed": core.committed, "durable": core.durable},
                "protection": core.protection.status(),
                "behind": asdict(core.seen.lag) if core.seen.lag is not None else None,
                "refused": {"malformed": self._refused + self._hub.refused, "vaults": core.seen.refusals},
                "snapshot": core.seen.snapshots.summary(),
                "coordinator_pid": os.getpid(),
                "coordinator_host": _HOST,
                "again_s": gap + _STATUS_SIGN_OF_LIFE_S,
                "control": {"store_writes": self._memory.writes, "store_bytes": self._memory.written_bytes},
            }
        )
        self._status_stale = False
        self._status_cost = self._worked() - begun  # not what it waited for: a directory may hang for a second

    def _pending_drains(self) -> list[dict[str, Any]]:
        """Nodes that are to be taken away: the one whose turn it is, and those that `drain_sources` name besides."""
        now, wanted = self._core.drain_under_way, self._drains.refused if self._drains is not None else {}
        under_way = [] if now is None else [{"node": now[0], "state": now[1]}]
        others = [{"node": node, "state": why} for node, why in wanted.items() if now is None or node != now[0]]
        return under_way + others

    def _known_of(self, node: int) -> dict[str, Any]:
        """What is not the same of all nodes: left out where there is nothing to say."""
        failures, core = self._core.nodes[node].record.failures, self._core
        out: dict[str, Any] = {}
        if failures:
            out["failures"] = [[each.when, each.kind, each.cause] for each in failures]
            out["lemon"] = core.members.failures(node) > 0
        if standbys := core.nodes[node].standbys:
            out["standbys"] = {str(local): pid for local, pid in standbys.items()}
        if labels := core.protection.labels(node):
            out["domains"] = dict(labels)
        return out


@functools.cache
def _versions() -> dict[str, str]:
    """Of what runs on this node."""
    versions = {"Python": platform.python_version()}
    for name in ("deadpool-megatron", "torch", "megatron-core"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _die() -> None:
    points.announce("kill-coordinator", "the coordinator", sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)
