"""What `deadpool agent` does while the job runs: wait for the end of what matters here.

That is the coordinator where it is ours, else the agent. With an elected coordinator it may become ours in between, and
may cease to be.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

import zmq

from deadpool_megatron.cluster.link.awake import AwakeClock
from deadpool_megatron.cluster.link.link import Spoke
from deadpool_megatron.cluster.notices import INTERRUPT, PREEMPT, WARNINGS
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import open_store
from deadpool_megatron.cluster.store.leadership import Follower, Place
from deadpool_megatron.launcher.agent_options import AgentPlan
from deadpool_megatron.launcher.enlisting import Lifeline
from deadpool_megatron.launcher.plan import LaunchError
from deadpool_megatron.launcher.processes import CoordinatorProcess, code_of
from deadpool_megatron.launcher.seat import Seat

_HAND_OVER_S: Final = 15.0  # longer than a coordinator's goodbye at the end of a job
_LONGEST_LOOK_S: Final = 5.0


class Signals:
    """SIGINT and SIGTERM as something to poll, and what takes the notices that the machines are wanted soon.

    Args:
        preempts: the first SIGTERM is such a notice.
    """

    def __init__(self, preempts: bool) -> None:
        self.caught: list[int] = []
        self.preempt: Callable[[], None] = lambda: None
        self._preempts = preempts
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.socket = ours
        self._theirs = theirs
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
            signal.signal(signum, lambda number, frame: self._take(number))

    def _take(self, signum: int) -> None:
        if signum in WARNINGS:
            self.preempt()
        elif signum == signal.SIGTERM and self._preempts:
            self._preempts = False
            self.preempt()
        else:
            self.caught.append(signum)

    def interrupted(self) -> bool:
        """Whether one has come."""
        return bool(self.caught)

    @property
    def code(self) -> Exit:
        """How the command ends for the first of them."""
        return code_of(self.caught[0])


class Serving:
    """Either process may be missing: `deadpool coordinator` has no agent, most agents no coordinator.

    Attributes:
        agent_left_well: called once this node's part in the job has ended, and not by a failure; must not block.
    """

    def __init__(
        self,
        plan: AgentPlan,
        signals: Signals,
        hosted: CoordinatorProcess | None,
        agent: subprocess.Popen[bytes] | None = None,
        lifeline: Lifeline | None = None,
    ) -> None:
        self._plan = plan
        self._signals = signals
        self._hosted = hosted
        self._agent = agent
        self._lifeline = lifeline
        self._seat: Seat | None = None
        self._follower: Follower | None = None
        self._passed_on = 0
        self._won = False  # the election, and the coordinator is still to be started
        self._agent_ended: float | None = None
        self._clock = AwakeClock(_LONGEST_LOOK_S)  # a coordinator is not gone for as long as this machine stood still
        self._why = ""
        self._left = False
        self.agent_left_well: Callable[[], None] = lambda: None

    def may_lead(
        self, seat: Seat, place: tuple[str, int], secret: bytes, start: Callable[[], CoordinatorProcess | None]
    ) -> None:
        """The coordinator is elected: it may move here, by ``start``, or from one ``place`` to another."""
        config = self._plan.launch.config
        self._seat, self._place, self._secret, self._start = seat, place, secret, start
        self._follower = Follower(lambda: open_store(config.store, self._plan.launch.run_dir, self._plan.job_name))

    @property
    def hosts(self) -> bool:
        """The coordinator is ours."""
        return self._hosted is not None

    def close(self) -> None:
        """No more looking for anybody."""
        for each in (self._seat, self._follower):
            if each is not None:
                each.rest()
        if self._lifeline is not None:
            self._lifeline.close()

    def run(self) -> tuple[int, str]:
        """To the end of the job, or of this node in it. Returns the exit code, and one line or nothing."""
        while True:
            hosted = self._hosted
            main = hosted.process if hosted is not None else self._agent
            assert main is not None
            self._until_end(main)
            if main.poll() is None:
                self._change_seats()
                continue
            if hosted is None:
                break
            if self._why or self._signals.caught:
                hosted.interrupt(*self._signals.caught[:1])
            end = hosted.revive()
            if end is None:
                continue
            if end[0] == Exit.DEPOSED and self._seat is not None:
                self._leave_seat()
                continue
            if self._why and end[0] == Exit.INTERRUPTED:  # else the job had an end, and that node's agent heard of it
                return Exit.USAGE, self._why
            self._agent_left(end[0])
            return (self._signals.code if self._signals.caught else end[0]), end[1]
        code = main.wait()
        self._agent_left(code)
        if self._why:
            return Exit.RECOVERY_FAILED, self._why
        if self._signals.caught:
            return self._signals.code, "interrupted; the job goes on without this node while there are spares"
        if code < 0:
            return 128 - code, f"its agent was ended by signal {-code}"
        return code, ""

    # ---- an elected coordinator

    def _seat_changes(self) -> bool:
        """Whether `_change_seats` has something to do."""
        if self._seat is None:
            return False
        if self._hosted is None:
            return self._won
        if self._agent_ended is None and self._agent is not None and self._agent.poll() is not None:
            self._agent_ended = time.monotonic()
        late = self._agent_ended is not None and time.monotonic() - self._agent_ended > _HAND_OVER_S
        return self._seat.leadership.lost or late

    def _change_seats(self) -> None:
        assert self._seat is not None
        if self._hosted is None:
            self._won = False
            try:
                self._hosted = self._start()
            except (OSError, LaunchError) as err:  # the store does not answer, for instance
                print(f"deadpool: the coordinator cannot go on here: {err}", file=sys.stderr, flush=True)
            if self._hosted is None:
                self._seat.leadership.resign()  # it could not start here; it said why
            elif self._follower is not None:
                self._follower.rest()
        else:
            self._leave_seat()

    def _leave_seat(self) -> None:
        """Somebody else is to lead: because etcd has not heard of us for a lease, or this node is out of the job."""
        assert self._seat is not None and self._hosted is not None
        self._hosted.kill()
        self._hosted = None
        self._seat.leadership.resign()
        if self._lifeline is not None:
            self._lifeline.gone_since = self._lifeline.gone_since or self._clock.now()

    def _look_for_coordinator(self) -> None:
        if self._seat is None or self._follower is None or self._hosted is not None or self._lifeline is None:
            return
        if self._lifeline.gone_since is None:
            self._seat.rest()
            self._follower.rest()
        elif self._agent is not None and self._agent.poll() is None:
            self._seat.campaign()
            self._follower.look(self._place)

    def _go_to(self, place: Place, poller: zmq.Poller) -> None:
        assert self._lifeline is not None
        since = self._lifeline.gone_since
        poller.unregister(self._lifeline.fd)
        self._lifeline.close()
        self._place = (place.host, place.port)
        name = f"enlist-{secrets.token_hex(8)}"
        spoke = Spoke(f"{place.host}:{place.port}", name, self._secret, self._plan.launch.config.lease)
        self._lifeline = Lifeline(spoke)
        self._lifeline.gone_since = since
        poller.register(self._lifeline.fd, zmq.POLLIN)

    # ---- waiting

    def _agent_left(self, code: int | None) -> None:
        if not self._left and code == Exit.OK:
            self._left = True
            self.agent_left_well()

    def _until_end(self, main: subprocess.Popen[bytes]) -> None:
        """Until ``main`` has ended, or the seat changes. Notes why this command made it end, if it did."""
        signals, hosted, agent = self._signals, self._hosted, self._agent
        poller = zmq.Poller()
        ends = {os.pidfd_open(p.pid): p for p in (main, agent) if p is not None and p.poll() is None}
        for fd in [*ends, signals.socket.fileno()]:
            poller.register(fd, zmq.POLLIN)
        if self._lifeline is not None and hosted is None:
            poller.register(self._lifeline.fd, zmq.POLLIN)
        if self._seat is not None and self._follower is not None:
            poller.register(self._seat.fd, zmq.POLLIN)
            poller.register(self._follower.fd, zmq.POLLIN)
        signals.preempt = hosted.preempt if hosted is not None else lambda: main.send_signal(PREEMPT)
        while main.poll() is None and not self._seat_changes():
            for fd, _ in poller.poll(1000):
                if fd == signals.socket.fileno():
                    signals.socket.recv(64)
                elif self._seat is not None and fd == self._seat.fd:
                    self._won = self._seat.won() or self._won
                elif self._follower is not None and fd == self._follower.fd:
                    if (place := self._follower.found()) is not None and hosted is None:
                        self._go_to(place, poller)
                elif isinstance(fd, int) and ends[fd] is agent:
                    poller.unregister(fd)
                    self._agent_left(agent.poll())
                    if agent.poll() == Exit.USAGE and hosted is not None and not self._why:
                        self._why = "this machine's agent could not start, so there is no job"
                        hosted.interrupt()
            if self._lifeline is not None and hosted is None:
                self._lifeline.look(self._clock.now())
            self._look_for_coordinator()
            if len(signals.caught) > self._passed_on:
                self._passed_on = len(signals.caught)
                if hosted is not None:
                    hosted.interrupt(signals.caught[0])
                else:
                    main.send_signal(INTERRUPT)
            self._give_up(main)
        if hosted is None:  # else one that is started again hears of it
            signals.preempt = lambda: None
        for fd in ends:
            os.close(fd)

    def _give_up(self, main: subprocess.Popen[bytes]) -> None:
        gone_since = self._lifeline.gone_since if self._lifeline is not None and self._hosted is None else None
        if gone_since is not None and not self._why and self._clock.now() - gone_since > self._plan.gone_s:
            self._why = f"the coordinator has been gone for {self._plan.gone_s:g} s; the job is over"
            main.send_signal(INTERRUPT)
