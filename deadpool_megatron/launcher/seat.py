"""The coordinator's seat, as one `deadpool agent` sees it: whether it is here, and when it may be taken.

With the embedded store it is where the endpoint is, from the beginning to the end. With etcd it is wherever the
election put it: first at whichever agent was there first, and when that one is gone, at another.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from deadpool_megatron.cluster.coordinator.saved_state import of_this_version, read_state
from deadpool_megatron.cluster.link.reach import reached
from deadpool_megatron.cluster.store import EMBEDDED, Store, StoreError
from deadpool_megatron.cluster.store.leadership import LEADER, STATE, Leadership, Place, known_place
from deadpool_megatron.launcher.agent_options import AgentPlan
from deadpool_megatron.launcher.enlisting import Interrupted, Waiting
from deadpool_megatron.launcher.plan import LaunchError

_ASKED: Final = 32  # of a large job's nodes


def job_lives(store: Store) -> bool:
    """Whether the job that the store knows of goes on without a coordinator: most of the nodes asked are there.

    A machine that comes back must go on with it; a job whose nodes are all gone is over, whatever the store says.
    Takes a second at most. Raises StoreError.
    """
    state = read_state(store)
    if state is None:
        return False
    with of_this_version():
        nodes = state["members"]["nodes"]
        vaults = [tuple(vault) for _, role, _, vault, *_ in nodes if vault and role not in ("lost", "left")]
    asked = vaults[:: max(1, len(vaults) // _ASKED)]
    return reached([(host, port) for host, port in asked]) * 2 >= len(asked) > 0


class Seat:
    """One candidate's view. ``fd`` becomes readable when `won` has something.

    Args:
        moves: another node may take the seat (etcd).
    """

    def __init__(self, plan: AgentPlan, store: Store) -> None:
        self.store = store
        self.moves = plan.launch.config.store != EMBEDDED
        self.leadership = Leadership(store, plan.launch.config.lease)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._candidates = plan.launch.nodes
        self._stop: threading.Event | None = None

    def take(self) -> bool:
        """At the start: whether the seat is ours. Raises StoreError."""
        return self.leadership.take() is not None

    def place(self) -> Place | None:
        """Where the coordinator is, if there is one now. Raises StoreError."""
        place, leader = known_place(self.store), self.store.get(LEADER)
        return place if place is not None and leader is not None and leader.revision == place.term else None

    def campaign(self) -> None:
        """There seems to be no coordinator: try for the seat, in the background, until `rest`."""
        if self.moves and self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), name="deadpool-campaign", daemon=True).start()

    def rest(self) -> None:
        """There is one."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def won(self) -> bool:
        """Whether a campaign was won, and there is a job to go on with."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        self.rest()
        return True

    def _run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            if self.leadership.campaign(self._candidates, stop.is_set) is None:
                return
            try:
                if self.store.get(STATE + "now") is not None and not stop.is_set():
                    os.eventfd_write(self.fd, 1)
                    return
            except StoreError:
                pass
            self.leadership.resign()  # the job has ended, or somebody else has come first
            stop.wait(1.0)

    def find_or_take(self, until: float, interrupted: Callable[[], bool]) -> Place | None:
        """Where the coordinator is; None: the seat was free, and is ours. Waits for one that is about to come, and for
        a store that does not answer.

        Raises LaunchError or StoreError at ``until`` (monotonic), or Interrupted.
        """
        waiting = Waiting(until)
        while not interrupted():
            why: Exception
            try:
                if (place := self.place()) is not None:
                    return place
                if self.store.get(LEADER) is None and self.take():
                    return None
                why = LaunchError("no coordinator has been elected: are the other nodes up, with the same --rdzv-id?")
            except StoreError as err:
                why = err
            if time.monotonic() >= until:
                raise why
            waiting.because(partial(str, why))
            time.sleep(0.2)  # once, at the start
        raise Interrupted

    def close(self) -> None:
        """Give the seat back, and the store."""
        self.rest()
        self.leadership.resign()
        self.store.close()
