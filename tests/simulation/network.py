"""The nodes' network: who reaches whom, and the connections between agents and coordinator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from deadpool_megatron.cluster.core.core import ABSENCE
from simulation.world import Pipe, World

if TYPE_CHECKING:
    from simulation.headquarters import Headquarters
    from simulation.host import Host

__all__ = ["HQ", "Link", "Network"]

HQ = -1  # the coordinator's machine


class Network:
    """One-way cuts around nodes, and connections that are reset."""

    def __init__(self, world: World, replaced: float, chance: random.Random) -> None:
        """``replaced``: how likely a packet's connection is replaced just after it was sent, by this ``chance``."""
        self._world = world
        self._replaced = replaced
        self._chance = chance
        self.mute: set[int] = set()  # nothing that these nodes send arrives
        self.deaf: set[int] = set()  # nothing arrives at these
        self.resets = 0.0  # how likely a connection for shards breaks
        self.garbling = 0.0  # how likely what is read of a shard arrives changed, at the first try
        self.on_heal: list[Callable[[], None]] = []

    def passes(self, source: int, target: int) -> bool:
        """Packets get from one machine to the other."""
        return source == target or (source not in self.mute and target not in self.deaf)

    def both(self, a: int, b: int) -> bool:
        """A connection between them works."""
        return self.passes(a, b) and self.passes(b, a)

    def breaks(self) -> bool:
        """This connection is reset."""
        return self.resets > 0 and self._world.chance.random() < self.resets

    def garbles(self) -> bool:
        """This one does."""
        return self.garbling > 0 and self._world.chance.random() < self.garbling

    def replaces(self) -> bool:
        """This connection between agent and coordinator is replaced now."""
        return self._replaced > 0 and self._chance.random() < self._replaced

    def healed(self) -> None:
        """What waited for a cut to end goes on."""
        for call in list(self.on_heal):
            call()


class Link:
    """An agent's connection to the coordinator, as ZeroMQ keeps it: heartbeats, reconnection, both ends' views.

    What is sent over one that a cut has stopped arrives when that ends, unless an end has given the connection up.
    """

    def __init__(self, world: World, network: Network, host: Host, hq: Headquarters, lease: float) -> None:
        self._world = world
        self._network = network
        self._host = host
        self._hq = hq
        self._lease = lease
        self.up = False  # at the agent's end
        self.heard = False  # at the coordinator's end
        self.ever = False
        self.was_reset = False  # by somebody in between, when it ended last
        self.late_up = self.late_down = 0.0  # seconds that packets take longer
        self._number = 0
        self._accepted = 0
        self._dropped = 0  # the one that somebody in between has forgotten
        self._up = Pipe(world, 0.0005, 0.02, far=True)
        self._down = Pipe(world, 0.0005, 0.02, far=True)
        self._stuck_up: list[tuple[int, bytes]] = []
        self._stuck_down: list[tuple[int, bytes]] = []
        self._silent_since: float | None = None
        self._unanswered_since: float | None = None
        network.on_heal.append(self.look)

    # ---- the connection

    def connect(self) -> None:
        """The agent tries, again and again."""
        if self.up or not self._host.alive:
            return
        if self._hq.listens and self._network.both(self._host.node, HQ):
            self._number += 1
            self._accepted = self._number
            self.heard = self.up = self.ever = True
            self.was_reset = False
            self._stuck_up.clear()
            self._stuck_down.clear()
            self._silent_since = self._unanswered_since = None
            self._world.say(f"n{self._host.node}", "connected")
            self._host.agent.introduce()
            self.look()
        else:
            chance = self._world.chance
            wait = chance.uniform(0.1, 0.5) if chance.random() < 0.8 else chance.uniform(0.5, 3.0)
            self._host.process.later(wait, self.connect)

    def _replace(self) -> None:
        """The agent's end has gone and is there again before the coordinator's notices: what was on the way is lost."""
        if self.up and self.heard and not self._hq.process.frozen:
            self.up = False
            self._world.say(f"n{self._host.node}", "its connection is replaced")
            self.connect()

    def reset(self, lost: bool, seconds: float) -> None:
        """Somebody between the two ends the connection; the agent tries again so many seconds later.

        ``lost``: what is on its way to the coordinator does not arrive.
        """
        if self.up and self.heard and self._network.both(self._host.node, HQ):
            self._world.say(f"n{self._host.node}", "its connection is reset")
            self.up, self.was_reset = False, True
            if lost:
                self._ended(self._accepted)
            else:
                self._up.send(self._hq.process, self._ended, self._accepted)
            self._host.process.later(seconds, self.connect)

    def drop(self) -> None:
        """From now on nothing comes through this connection, its end neither, as after a firewall forgets it."""
        if self.up and self.heard and self._network.both(self._host.node, HQ):
            self._world.say(f"n{self._host.node}", "its connection is dropped")
            self._dropped, self.was_reset = self._number, True
            self._stuck_up.clear()
            self._stuck_down.clear()
            self.look()

    @property
    def unsteady(self) -> bool:
        """The agent has to connect again, whether it knows it or not."""
        return self.was_reset and (not self.up or self._number == self._dropped)

    def _passes(self, source: int, target: int) -> bool:
        return self._number != self._dropped and self._network.passes(source, target)

    def close_agents_end(self) -> None:
        """The agent's end is gone: it died where the machine lives on, or it gave the connection up."""
        self.up = False
        if self._passes(self._host.node, HQ):
            number = self._accepted
            self._up.send(self._hq.process, self._ended, number)
        if self._host.alive:
            self._host.process.later(self._world.chance.uniform(0.05, 0.3), self.connect)

    def close_hubs_end(self) -> None:
        """The coordinator's end is gone."""
        self.heard = False
        if self._passes(HQ, self._host.node):
            self._down.send(self._host.process, self._hung_up, self._number)

    def _hung_up(self, number: int) -> None:
        if number == self._number and self.up:
            self.up = False
            self._world.say(f"n{self._host.node}", "the coordinator's end is closed")
            self._host.process.later(self._world.chance.uniform(0.05, 0.3), self.connect)

    def _ended(self, number: int) -> None:
        if number == self._accepted and self.heard:
            self.heard = False
            self._hq.gone(self._host.node, number)

    # ---- heartbeats

    def look(self) -> None:
        """Something that may stop heartbeats has begun or ended."""
        host, now = self._host, self._world.now
        up = host.alive and not host.process.frozen and self._passes(host.node, HQ)
        down = self._hq.listens and self._passes(HQ, host.node)
        if self._network.passes(host.node, HQ):
            stuck, self._stuck_up = self._stuck_up, []
            for number, packet in stuck:
                self._up.send(self._hq.process, self._arrive_up, number, packet)
        if self._network.passes(HQ, host.node):
            stuck, self._stuck_down = self._stuck_down, []
            for number, packet in stuck:
                self._down.send(host.process, self._arrive_down, number, packet)
        if self.up and not self.heard and self._number != self._dropped and self._network.both(host.node, HQ):
            self._down.send(host.process, self._hung_up, self._number)  # its packets are answered with a reset
        if up and down:
            self._silent_since = self._unanswered_since = None
            return
        chance = self._world.chance
        if self.heard and self._silent_since is None and not up:
            self._silent_since = now
            lost = chance.uniform(0.4, 1.0)  # is it, if it does not come back
            silent = self._lease * max(0.45, lost - ABSENCE)
            self._world.push(now + silent, self._hq.process, self._silent, now)
        if self.up and self._unanswered_since is None and not down:
            self._unanswered_since = now
            self._world.push(now + self._lease * chance.uniform(1.0, 2.0), host.process, self._unanswered, now)

    def _silent(self, since: float) -> None:
        if since == self._silent_since and self.heard:
            self._world.say(f"n{self._host.node}", "silent for the coordinator")
            self._silent_since = None
            self.close_hubs_end()
            self._hq.gone(self._host.node, self._accepted)

    def _unanswered(self, since: float) -> None:
        if since == self._unanswered_since and self.up:
            self._world.say(f"n{self._host.node}", "the coordinator does not answer")
            self._unanswered_since = None
            self.close_agents_end()

    # ---- packets

    def post(self, packet: bytes) -> None:
        """The agent sends; dropped while there is no connection."""
        if self.up:
            self._up.send(self._hq.process, self._arrive_up, self._number, packet, late=self.late_up)
            self._perhaps_replace()

    def _perhaps_replace(self) -> None:
        if self._network.replaces():
            self._world.push(self._world.now, self._host.process, self._replace)

    def _arrive_up(self, number: int, packet: bytes) -> None:
        if number == self._dropped or number != self._accepted or not self.heard:
            return
        if self._stuck_up or not self._network.passes(self._host.node, HQ):
            self._stuck_up.append((number, packet))
        else:
            self._hq.arrive(self._host.node, packet, number)

    def send(self, packet: bytes) -> None:
        """The coordinator sends; dropped while there is no connection."""
        if self.heard:
            self._down.send(self._host.process, self._arrive_down, self._accepted, packet, late=self.late_down)
            self._perhaps_replace()

    def _arrive_down(self, number: int, packet: bytes) -> None:
        if number == self._dropped or number != self._number or not self.up:
            return
        if self._stuck_down or not self._network.passes(HQ, self._host.node):
            self._stuck_down.append((number, packet))
        else:
            self._host.told(packet)
