"""An agent's connection to the coordinator, wherever that is now."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import zmq

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.link.link import Spoke, agent_identity
from deadpool_megatron.cluster.store import open_store
from deadpool_megatron.cluster.store.leadership import Follower


class Uplink:
    """One thread uses it. Nothing blocks.

    Args:
        poller: has what this listens to; the agent gives the descriptors and sockets that are ready.

    Attributes:
        malformed: packets that were no records.
    """

    def __init__(self, settings: AgentSettings, poller: zmq.Poller) -> None:
        self._s = settings
        self._poller = poller
        self._endpoint = settings.coordinator
        self._spoke = self._connect()
        self._follower = Follower(lambda: open_store(*settings.store)) if settings.store else None
        if self._follower is not None:
            poller.register(self._follower.fd, zmq.POLLIN)
        self.malformed = 0

    def _connect(self) -> Spoke:
        spoke = Spoke(
            self._endpoint, agent_identity(self._s.job_id, self._s.node), self._s.secret, self._s.config.lease
        )
        self._poller.register(spoke.monitor, zmq.POLLIN)
        self._poller.register(spoke.socket, zmq.POLLIN)
        return spoke

    @property
    def connected(self) -> bool:
        """The coordinator is there."""
        return self._spoke.connected

    def has_come_up(self, ready: Collection[object]) -> bool:
        """The connection is there, for the first time or again: the coordinator may have forgotten this node."""
        return self._spoke.monitor in ready and self._spoke.changed() and self._spoke.connected

    def moved(self, ready: Collection[object]) -> r.Address | None:
        """Where the rendezvous store is, once the coordinator has moved; None when it has not.

        The new connection is introduced like the first; the old one is not heard any more.
        """
        if self._follower is None or self._follower.fd not in ready or (place := self._follower.found()) is None:
            return None
        self._poller.unregister(self._spoke.monitor)
        self._poller.unregister(self._spoke.socket)
        self._spoke.close(linger_ms=0)
        self._endpoint = f"{place.host}:{place.port}"
        self._spoke = self._connect()
        return r.Address(place.host, place.store_port)

    def records(self, ready: Collection[object]) -> Iterator[r.CoordinatorRecord]:
        """What the coordinator has told since."""
        if self._spoke.socket not in ready:
            return
        while (packet := self._spoke.receive()) is not None:
            try:
                record = r.decode_from_coordinator(packet)
            except r.RecordError:
                self.malformed += 1
                continue
            yield record

    def follow(self) -> None:
        """Call often: while the coordinator is gone it is looked for where a new one would say that it listens."""
        self._spoke.look()
        if self._follower is None:
            return
        if self._spoke.connected:
            self._follower.rest()
        else:
            host, port = self._endpoint.rsplit(":", 1)
            self._follower.look((host, int(port)))

    def post(self, packet: bytes) -> None:
        """Send one packet if the connection is up, else drop it: what counts is told again when it comes up."""
        self._spoke.post(packet)

    def close(self) -> None:
        """Give queued packets a second to leave, then close."""
        if self._follower is not None:
            self._follower.rest()
        self._spoke.close()
