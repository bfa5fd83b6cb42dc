"""The coordinator's machine: the production `Coordinator` turn by turn, its store, and its launcher."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.coordinator.coordinator import Coordinator, CoordinatorSettings
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.coordinator.saved_state import read_state
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.job import JobSpec
from deadpool_megatron.cluster.link.link import Hub
from deadpool_megatron.cluster.store import Deposed, Guard, Lease, Store
from deadpool_megatron.cluster.store.base import Entry, Watch
from deadpool_megatron.durable import Lease as DirectoryLease
from deadpool_megatron.durable import this_process
from deadpool_megatron.durable.lease import BEAT_S, take
from deadpool_megatron.durable.start import look_again, survey
from deadpool_megatron.observe import RunDirectory
from deadpool_megatron.observe.recoveries import Story
from deadpool_megatron.observe.rundir import Thinned
from simulation.durable import Directory
from simulation.network import Link
from simulation.world import Process, World

__all__ = ["Headquarters", "RunDisk"]

SECRET = bytes(32)
_GUARD = Guard("leader", 1)


class _Crash(BaseException):
    """The coordinator's process dies here."""


class _Disk(Store):
    """A store that is a dictionary. ``fuse``: the writer dies at this write, half of the time after it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._entries: dict[str, Entry] = {_GUARD.key: Entry(b"", _GUARD.revision)}
        self._revision = _GUARD.revision
        self.fuse: int | None = None

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def put(self, values: Mapping[str, bytes], lease: Lease | None = None, guard: Guard | None = None) -> int:
        if guard is not None and self._entries[guard.key].revision != guard.revision:
            raise Deposed("the leadership is over")
        dies = self.fuse is not None and self.fuse <= 0
        if self.fuse is not None:
            self.fuse -= 1
        if dies and self._world.chance.random() < 0.5:
            raise _Crash
        self._revision += 1
        self._entries |= {key: Entry(value, self._revision) for key, value in values.items()}
        if dies:
            raise _Crash
        return self._revision

    def delete(self, prefix: str, guard: Guard | None = None) -> None:
        for key in [key for key in self._entries if key.startswith(prefix)]:
            del self._entries[key]

    def compare_and_set(self, key: str, revision: int, value: bytes, lease: Lease | None = None) -> int:
        raise NotImplementedError("nobody campaigns here")

    def _grant(self, ttl_s: float) -> Lease:
        raise NotImplementedError("nobody campaigns here")

    def _follow(self, key: str, watch: Watch) -> None:
        raise NotImplementedError("nobody campaigns here")


class _Hub(Hub):
    """Takes what the network brings, packets before ends of connections; dies after ``fuse`` packets sent."""

    def __init__(self, links: Callable[[int], Link | None], answered: Callable[[str, bytes], None]) -> None:
        self.port = 1
        self._answered = answered
        self.refused = 0
        self._links = links
        self.packets: list[tuple[bytes, bytes, int]] = []  # and the number of the connection
        self.ends: list[tuple[bytes, int]] = []
        self._newest: dict[bytes, int] = {}
        self.fuse: int | None = None

    def wait(
        self,
        timeout_s: float,
        on_packet: Callable[[bytes, bytes], None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        while self.packets:
            identity, packet, number = self.packets.pop(0)
            self._newest[identity] = number
            on_packet(identity, packet)
        while self.ends:
            identity, number = self.ends.pop(0)
            if self._newest.get(identity, number + 1) <= number:  # else nothing came over it, or there is another one
                del self._newest[identity]
                on_gone(identity)

    def send(self, identity: bytes, packet: bytes) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise _Crash
        name = identity.decode()
        if not name.endswith("@job"):
            self._answered(name, packet)
        elif (link := self._links(int(name.removeprefix("node-").removesuffix("@job")))) is not None:
            link.send(packet)

    def farewell(self, to: Iterable[bytes], within_s: float, on_packet: Callable[[bytes, bytes], None]) -> None:
        return

    def close(self) -> None:
        return


class RunDisk:
    """The file system of the run directory.

    Attributes:
        error: with which nothing can be written; 0: all can.
        events: the file's bytes, of all lives of the coordinator.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.error = 0
        self.events = bytearray()

    def check(self) -> None:
        """Raises OSError."""
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def write(self, data: bytearray) -> int:
        """A part of it fits, perhaps."""
        self.check()
        count = len(data) if self._chance.random() < 0.9 else self._chance.randint(1, len(data))
        self.events += data[:count]
        return count


class _Log(RunDirectory):
    """Events go to whoever judges the run, and, with a disk, to a file of it as in production."""

    def __init__(self, seen: Callable[[str, dict[str, Any]], None], disk: RunDisk | None) -> None:
        self._seen = seen
        self._disk = disk
        self.noted = self._dropped = 0
        self.path = Path("run")
        self._waiting, self._thinned = bytearray(), Thinned()
        self._newest, self._told, self._lock, self._aside = {}, [], threading.Lock(), None
        self._failing = set()
        self._story = Story()
        self._job = {}
        if disk is not None:
            self.begun = len(disk.events)
            self._waiting += b"\n" if disk.events and not disk.events.endswith(b"\n") else b""

    def note(self, event: str, **fields: Any) -> None:
        self._seen(event, fields)
        if self._disk is not None:
            self.noted += 1
            super().note(event, **fields)

    def flush(self) -> None:
        if self._disk is not None:
            super().flush()

    def status(self, status: dict[str, Any]) -> None:
        if self._disk is not None:
            super().status(status)

    def _write(self, data: bytearray) -> int:
        assert self._disk is not None
        return self._disk.write(data)

    def _append(self, text: str) -> None:
        assert self._disk is not None
        self._disk.check()

    def _replace(self, name: str, text: bytes, mode: int) -> None:
        if self._disk is not None:
            self._disk.check()

    def close(self) -> None:
        return

    def missing(self) -> int:
        """Events of this life that are neither in the file nor counted as dropped, once there is room."""
        assert self._disk is not None
        self._disk.error = 0
        self.flush()
        lines = [json.loads(line) for line in bytes(self._disk.events[self.begun :]).split(b"\n")[1:-1] if line]
        first = bytes(self._disk.events[self.begun :]).split(b"\n")[0]
        whole = len(lines) + bool(first and self._is_event(first))
        dropped = sum(line["lines"] for line in lines if line["event"] == "unwritten")
        return self.noted - whole - dropped

    @staticmethod
    def _is_event(line: bytes) -> bool:
        with contextlib.suppress(ValueError):
            return "event" in json.loads(line)
        return False


class Headquarters:
    """The coordinator, through all its lives.

    Args:
        links: by node, its connection.
        lease: of the durable directory, where it is this job's already.
        run_disk: of the run directory; None: nothing is written.
        seen: called with each event of the job's log.
        answers: whether an agent's port refuses, or says a word; None: neither.
        ports: how long it takes to hear it; None: at once.

    Attributes:
        torn: the last one died in the middle of something, so that what it did last may not be in the log.
        died_at: when.
        knows_directory: this one could look what is durable.
    """

    def __init__(
        self,
        world: World,
        job: JobSpec,
        directory: Directory,
        links: Callable[[int], Link | None],
        all_links: Callable[[], Iterable[Link]],
        seen: Callable[[str, dict[str, Any]], None],
        lease: DirectoryLease | None = None,
        run_disk: RunDisk | None = None,
        answers: Callable[[r.Address], bool | None] = lambda vault: None,
        ports: random.Random | None = None,
    ) -> None:
        self.world = world
        self.job = job
        self.directory = directory
        self._links = links
        self._all_links = all_links
        self._seen = seen
        self._answers, self._ports = answers, ports
        self.disk = _Disk(world)
        self.process = Process(world, "coordinator")
        self.lives = 0
        self.torn = False
        self.died_at = 0.0
        self.knows_directory = True
        self.ended: tuple[int, str] | None = None
        self._enlistment = Enlistment(job, [], "job", 1)
        self._lease = lease
        self.run_disk = run_disk
        self._due = 0.0
        self._asked = 0
        self._tools: dict[str, Callable[[r.InjectReply | r.SpareAdded | None], None]] = {}
        self._start()

    @property
    def core(self) -> Core:
        """What decides; of the present life."""
        return self.coordinator._core

    @property
    def listens(self) -> bool:
        """Who connects is answered."""
        return self.process.alive and not self.process.frozen and self.ended is None

    def _start(self) -> None:
        self.hub = _Hub(self._links, self._answered)
        settings = CoordinatorSettings("hq", "hq", 1, SECRET, "", 1, "job", resume=self.lives > 0)
        job, lease = self._with_directory()
        self.log = log = _Log(self._seen, self.run_disk)
        self.lives += 1
        self.coordinator = Coordinator(
            job,
            settings,
            self._enlistment,
            self.disk,
            _GUARD,
            self.hub,
            log,
            self.world.clock,
            self.world.chance,
            lease=lease,
            worked=lambda: 0.0,
            unix=self.world.clock,
            ask=self._ask_port,
        )
        try:
            self.coordinator.begin(lambda port: None)
        except _Crash:
            self._crashed()
            return
        self._arm(0.0)

    def _with_directory(self) -> tuple[JobSpec, DirectoryLease | None]:
        """As `launcher.node`: the first coordinator makes the durable directory its job's, later ones go on with it."""
        spec, store = self.job.durable, self.directory
        if spec is None or not spec.directory:
            return self.job, None
        kept = read_state(self.disk) if self.lives else None
        world_size = self.job.world_size if kept is None else kept["members"]["world_size"]
        owner = this_process(spec.job)
        if self.lives:
            spec = replace(spec, job=f"{spec.job}r{self.lives}")
            lease = DirectoryLease(store, 0, owner)
            self.knows_directory = True
            found = look_again(store, lease, "auto", world_size, -1, self._could_not_look)
        else:
            lease = self._lease or take(store, owner, lambda line: None, self.world.clock)
            found = survey(store, "auto", world_size, -1, True)
        self._lease = lease
        self._renew(self.process, lease)
        return replace(self.job, durable=replace(spec, complete=found.usable, recut=found.recut)), lease

    def _could_not_look(self, line: str) -> None:
        self.knows_directory = False
        self.world.say("hq", line)

    def _renew(self, process: Process, lease: DirectoryLease) -> None:
        """As the thread of `Lease.keep`."""
        with contextlib.suppress(OSError):
            if self.ended is not None or not lease.renew():
                return
        process.later(BEAT_S, self._renew, process, lease)

    def _arm(self, seconds: float) -> None:
        self._due = self.world.now + max(seconds, 0.001)
        self.process.later(self._due - self.world.now, self._turn, self._due)

    def _turn(self, due: float) -> None:
        if due != self._due or self.ended is not None:
            return
        coordinator = self.coordinator
        try:
            coordinator.turn(0.0)
            if coordinator.finished:
                self.ended = coordinator.end()
                if self._lease is not None:
                    self._lease.resign()
                return
        except _Crash:
            self._crashed()
            return
        self._arm(coordinator.timeout())

    # ---- what comes

    def arrive(self, node: int, packet: bytes, number: int) -> None:
        """A packet of a node's agent, over this connection of it."""
        if self.ended is not None:
            return
        if self.world.trace is not None:
            self.world.say(f"n{node} -> hq", str(r.decode_from_agent(packet)).replace(f"pid={os.getpid()}, ", ""))
        self.hub.packets.append((f"node-{node}@job".encode(), packet, number))
        self._soon()

    def gone(self, node: int, number: int) -> None:
        """This connection of a node has ended."""
        self.hub.ends.append((f"node-{node}@job".encode(), number))
        self._soon()

    def _ask_port(self, vault: r.Address, tell: Callable[[bool], None]) -> Callable[[], None]:
        """As the thread of `Absences`."""
        process, stopped, ports = self.process, threading.Event(), self._ports or random.Random(0)

        def look(told: bool = False) -> None:
            if stopped.is_set():
                return
            refused = self._answers(vault)
            if refused or (refused is False and not told):
                tell(refused)
                self._soon()
            if not refused:
                process.later(ports.uniform(0.01, 0.1), look, told or refused is not None)

        if self._ports is None:
            look()
        else:
            process.later(ports.uniform(0.0005, 0.01), look)
        return stopped.set

    def _soon(self) -> None:
        if self._due > self.world.now + 0.003:
            self._arm(0.003)

    def ask(
        self, record: r.Drain | r.AddSpare, answered: Callable[[r.InjectReply | r.SpareAdded | None], None]
    ) -> None:
        """A command-line tool asks; ``answered`` with None: nobody is there."""
        if not self.listens:
            answered(None)
            return
        self._asked += 1
        name = f"tool-{self._asked}"
        self._tools[name] = answered
        self.hub.packets.append((name.encode(), r.encode(record), 0))
        self._soon()

    def _answered(self, name: str, packet: bytes) -> None:
        record = r.decode_from_coordinator(packet)
        self.world.say(f"hq -> {name}", record)
        assert isinstance(record, r.InjectReply | r.SpareAdded)
        self._tools.pop(name)(record)

    # ---- its end, and the launcher

    def crash(self) -> None:
        """SIGKILL, now."""
        if self.process.alive and self.ended is None:
            self._crashed()
            self.torn = False

    def crash_soon(self, kind: int, count: int) -> None:
        """It dies at a write to the store (0), or in the middle of telling the agents (1)."""
        if kind:
            self.hub.fuse = count
        else:
            self.disk.fuse = count

    def _crashed(self) -> None:
        world = self.world
        world.say("hq", "the coordinator is dead")
        self.torn, self.died_at = True, world.now
        self.disk.fuse = None
        self.process.die()
        self.process = Process(world, "coordinator")
        self.process.alive = False
        for link in self._all_links():
            if link.heard:
                link.close_hubs_end()
        tools, self._tools = self._tools, {}
        for answered in tools.values():
            answered(None)
        launcher = Process(world, "launcher")
        launcher.later(world.chance.uniform(0.3, 2.0), self._again)

    def _again(self) -> None:
        if self.ended is None:
            self.world.say("hq", "the coordinator is started again")
            self.process.alive = True
            self._due = 0.0
            self._start()
