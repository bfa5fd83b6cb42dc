"""What the coordinator itself takes of a processor, without sockets: the real one and simulated agents, in one process.

The coordinator decodes, judges, decides, keeps, encodes and writes as ever. Packets go from list to list, and only its
turns are timed: what the thread that has all connections takes is not in it, nor is what a busy machine adds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from deadpool_bench.control_plane.swarm import Swarm, SwarmSettings
from deadpool_megatron.cluster.coordinator.coordinator import Coordinator, CoordinatorSettings
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec, Phase, gather_s
from deadpool_megatron.cluster.link.link import Hub, Spoke, agent_identity
from deadpool_megatron.cluster.store import EMBEDDED, StoreError, open_store
from deadpool_megatron.cluster.store.leadership import Leadership

_JOB: Final = "decisions"
_LEASE_S: Final = 3600.0  # nobody is silent here
_ITERATIONS: Final = 10
_AT_A_TIME: Final = 20  # commits that a turn finds, as of a thousand nodes within 20 ms


class _Hub(Hub):
    """Takes what agents have posted, and posts to them."""

    def __init__(self) -> None:
        self.port = 1
        self.refused = 0
        self.packets: list[tuple[bytes, bytes]] = []
        self.ends: list[bytes] = []
        self.agents: dict[bytes, deque[bytes]] = {}

    def wait(
        self,
        timeout_s: float,
        on_packet: Callable[[bytes, bytes], None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        packets, self.packets = self.packets, []
        for identity, packet in packets:
            on_packet(identity, packet)
        ends, self.ends = self.ends, []
        for identity in ends:
            on_gone(identity)

    def send(self, identity: bytes, packet: bytes) -> None:
        if (inbox := self.agents.get(identity)) is not None:
            inbox.append(packet)

    def farewell(self, to: Iterable[bytes], within_s: float, on_packet: Callable[[bytes, bytes], None]) -> None:
        return

    def close(self) -> None:
        return


class _Spoke(Spoke):
    """An agent's end, up from the first look on."""

    def __init__(self, hub: _Hub, identity: bytes) -> None:
        self.connected = False
        self._hub, self._identity = hub, identity
        self._inbox = hub.agents[identity] = deque[bytes]()

    def changed(self) -> bool:
        first, self.connected = not self.connected, True
        return first

    def post(self, packet: bytes) -> bool:
        self._hub.packets.append((self._identity, packet))
        return True

    def receive(self, timeout_s: float = 0.0) -> bytes | None:
        return self._inbox.popleft() if self._inbox else None

    def close(self, linger_ms: int = 1000) -> None:
        del self._hub.agents[self._identity]


class Decisions:
    """One job, whose agents all do at once what they are told."""

    def __init__(self, directory: Path, active: int, spares: int, slots: int) -> None:
        self._hub = _Hub()
        nodes, deadlines = active + spares, Deadlines(_LEASE_S, _LEASE_S, _LEASE_S, _LEASE_S)
        job = JobSpec(nodes, spares, slots, True, deadlines, gather_s=gather_s(nodes))
        self._store = open_store(EMBEDDED, directory / "run", _JOB)
        self._leadership = Leadership(self._store, _LEASE_S)
        guard = self._leadership.take()
        if guard is None:
            raise StoreError("somebody else leads this job")
        settings = CoordinatorSettings("127.0.0.1", "127.0.0.1", 1, bytes(32), str(directory / "run"), 1, _JOB)
        enlistment = Enlistment(job, [], _JOB, 1)
        self._coordinator = Coordinator(job, settings, enlistment, self._store, guard, self._hub, ask=_refuses)
        self._coordinator.begin(lambda port: None)
        self._swarm = Swarm(SwarmSettings("", "", _JOB, _LEASE_S, [], active, slots))
        self.nodes = range(active)
        self._took_s = 0.0
        for node in range(nodes):
            identity = agent_identity(_JOB, node).encode()
            self._swarm.add(node, _Spoke(self._hub, identity))
        self._until(lambda: self.core.phase is Phase.RUNNING)

    @property
    def core(self) -> Any:
        """What decides."""
        return self._coordinator._core

    def commits(self) -> float:
        """Seconds that one node's commit takes, with its share of telling all that they have it."""
        self._took_s = 0.0
        for generation in range(_ITERATIONS):
            for i, agent in enumerate(each for each in self._swarm.agents.values() if each.ranks):
                self._swarm.commit(agent, generation)
                if i % _AT_A_TIME == 0:
                    self._turn()
            self._until(lambda generation=generation: self.core.committed == generation)  # type: ignore[misc]
        return self._took_s / _ITERATIONS / len(self.nodes)

    def kill(self, node: int) -> float:
        """A node is lost; seconds until all train again."""
        self._swarm.agents.pop(node).spoke.close()
        return self._recovery(lambda: self._hub.ends.append(agent_identity(_JOB, node).encode()))

    def restart(self, workers: dict[int, list[int]]) -> float:
        """These workers end, by node and local index, and new ones take their places; the same."""

        def strike() -> None:
            for node, locals_ in workers.items():
                self._swarm.restart(node, locals_)

        return self._recovery(strike)

    def _recovery(self, strike: Callable[[], object]) -> float:
        self._took_s, epoch = 0.0, self.core.epoch
        strike()
        self._until(lambda: self.core.epoch > epoch and self.core.recovery is None)
        return self._took_s

    def _until(self, so: Callable[[], bool]) -> None:
        while not so():
            self._turn()
            for agent in list(self._swarm.agents.values()):
                self._swarm.serve(agent)

    def _turn(self) -> None:
        begun = time.thread_time()
        self._coordinator.turn(0.0)
        self._took_s += time.thread_time() - begun

    def close(self) -> None:
        """Leave the directory to others."""
        self._coordinator.interrupt()
        self._turn()
        self._coordinator.end()
        self._leadership.resign()
        self._store.close()


def _refuses(vault: object, tell: Callable[[bool], None]) -> Callable[[], None]:
    """A node that is away has ended."""
    tell(True)
    return lambda: None


def dealt(workers: int, a_node: int, among: list[int]) -> dict[int, list[int]]:
    """So many workers, by node and local index: ``a_node`` of each of as many nodes as it takes, far apart."""
    nodes = -(-workers // a_node)
    return {among[i * len(among) // nodes]: [*range(min(a_node, workers - i * a_node))] for i in range(nodes)}
