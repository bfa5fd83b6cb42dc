"""`deadpool agent` and `deadpool coordinator`: one machine's part of a job.

::

    machine of node 0                        machine of node 1
    deadpool agent                           deadpool agent
      |- coordinator  <----- Enlist ---------- |   (secret: file, or job.json in the shared run directory)
      |- agent of node 0                       |- agent of node 1
           |- workers                               |- workers

The command itself does no work of the job: it starts its children, passes signals on, and tells why it all ended. On
the coordinator's machine it lives until the coordinator has ended, even if that node's agent is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deadpool_megatron.cluster.link.ports import address_towards
from deadpool_megatron.cluster.notices import INTERRUPT
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import EMBEDDED, StoreError, open_store, towards
from deadpool_megatron.cluster.store.leadership import Place, known_place
from deadpool_megatron.compat import UserError
from deadpool_megatron.config import ConfigError
from deadpool_megatron.launcher.agent_options import AgentPlan, check_agent
from deadpool_megatron.launcher.enlisting import (
    Interrupted,
    Lifeline,
    Moved,
    Unreached,
    Waiting,
    enlist,
    is_ours,
    resolve,
)
from deadpool_megatron.launcher.plan import LaunchError, check_transport
from deadpool_megatron.launcher.processes import CoordinatorProcess, Processes, agent_settings, coordinator_settings
from deadpool_megatron.launcher.seat import Seat, job_lives
from deadpool_megatron.launcher.secret import SecretSource
from deadpool_megatron.launcher.serving import Serving, Signals
from deadpool_megatron.launcher.tee import Tee, show_end
from deadpool_megatron.launcher.torchrun import let_torchrun_go
from deadpool_megatron.vault import clean_leftovers

_END_GRACE_S = 12.0


@dataclass(frozen=True, slots=True)
class _Host:
    """What it takes to start the coordinator on this machine."""

    plan: AgentPlan
    address: str
    processes: Processes
    source: SecretSource
    seat: Seat

    def start(self, port: int, going_on: bool = False) -> tuple[CoordinatorProcess | None, int]:
        """The coordinator, listening; or None and the exit code it ended with. The seat is ours.

        It goes on with the job that the store knows of, if that lives (or is known to: ``going_on``).
        """
        plan, seat = self.plan, self.seat
        place = known_place(seat.store)
        resume = place is not None and (going_on or job_lives(seat.store))
        secret = (self.source.find() if resume else None) or self.source.make()
        job_id = place.job_id if resume and place is not None else f"{os.getpid()}-{secrets.token_hex(4)}"
        bind = self.address if is_ours(self.address) else "0.0.0.0"  # a service's address is nobody's
        launch = dataclasses.replace(plan.launch, host=self.address)
        settings = coordinator_settings(launch, job_id, secret, bind, port, plan.join_s, plan.job_name)
        if resume and place is not None:
            settings = dataclasses.replace(settings, resume=True)
            if place.host == self.address:
                settings = dataclasses.replace(settings, store_port=place.store_port)
            print(f"deadpool: the coordinator goes on here, at {self.address}", file=sys.stderr, flush=True)
        hosted = CoordinatorProcess(self.processes, settings, seat.leadership, seat.moves)
        return (hosted, 0) if hosted.port else (None, hosted.wait()[0] or Exit.FAILED)

    def find_or_start(
        self, port: int, until: float, interrupted: Callable[[], bool]
    ) -> tuple[Place | None, CoordinatorProcess | None, int]:
        """Where the elected coordinator is; where the seat is free, or always ours, as of `start`.

        Raises as `Seat.find_or_take`.
        """
        if not self.seat.moves:
            return None, *self.start(port)
        waiting = Waiting(until)
        while (place := self.seat.find_or_take(until, interrupted)) is None:
            try:
                hosted, code = self.start(port)
            except StoreError as err:
                if time.monotonic() >= until:
                    raise
                waiting.because(partial(str, err))
            else:
                if code != Exit.DEPOSED:
                    return None, hosted, code
            self.seat.leadership.resign()
        return place, None, 0

    def gone_on(self, hosted: CoordinatorProcess) -> tuple[int, str] | None:
        """The coordinator here has ended, or leads no more (then it is ended): how the job has. None: it is there
        again; with `Exit.DEPOSED` `find_or_start` is to look for another one, who may be here again.
        """
        end: tuple[int, str] | None = (Exit.DEPOSED, "")
        if self.seat.leadership.lost:
            hosted.kill()
        else:
            end = hosted.revive()
        if end is not None and end[0] == Exit.DEPOSED:
            self.seat.leadership.resign()
        return end


@contextlib.contextmanager
def _only_one_here(port: int) -> Iterator[bool]:
    """Whether this command may host the coordinator of that port: one of several on one machine."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mark:
        try:
            mark.bind(f"\0deadpool-coordinator-{port}")  # the kernel forgets it with the process
        except OSError:
            yield False
        else:
            yield True


def _boundary(run: Callable[[], int]) -> int:
    try:
        return run()
    except (LaunchError, ConfigError, UserError, OSError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE


def _interruptible(run: Callable[[AgentPlan, Signals], int], plan: AgentPlan) -> int:
    signals = Signals(plan.launch.config.on_preempt)
    try:
        return run(plan, signals)
    except Interrupted:
        print("deadpool: interrupted before the job began", file=sys.stderr)
        return signals.code


def run_coordinator(options: argparse.Namespace) -> int:
    """`deadpool coordinator` after parsing: the coordinator alone, for a machine that does not train."""
    return _boundary(lambda: _interruptible(_coordinate, check_agent(options, os.environ)))


def _coordinate(plan: AgentPlan, signals: Signals) -> int:
    processes = Processes()
    source = SecretSource(plan.secret_file, os.environ, plan.launch.run_dir, plan.job_name)
    if plan.launch.config.store != EMBEDDED:
        raise LaunchError("with --deadpool-store etcd the agents elect the coordinator; leave this command out")
    address = resolve(plan.endpoint[0], time.monotonic() + plan.join_s, signals.interrupted)
    seat = Seat(plan, open_store(EMBEDDED, plan.launch.run_dir, plan.job_name))
    try:
        _take(plan, seat)
        hosted, code = _Host(plan, address, processes, source, seat).start(plan.endpoint[1])
        if hosted is None:
            return code
        code, message = Serving(plan, signals, hosted).run()
        show_end(code, message, plan.launch.run_dir)
        return code
    finally:
        processes.end(_END_GRACE_S)
        seat.close()


def _take(plan: AgentPlan, seat: Seat) -> None:
    if not seat.take():
        raise LaunchError(f"--run-dir {plan.launch.run_dir}: another job's coordinator runs there; give each its own")


def run_agent(options: argparse.Namespace) -> int:
    """`deadpool agent` after parsing: this machine's node, and the coordinator where it belongs here."""
    return _boundary(lambda: _interruptible(_agent, check_agent(options, os.environ)))


def _agent(plan: AgentPlan, signals: Signals) -> int:
    check_transport(plan.launch.config)
    processes = Processes()
    source = SecretSource(plan.secret_file, os.environ, plan.launch.run_dir, plan.job_name)
    until = time.monotonic() + plan.join_s
    moves = plan.launch.config.store != EMBEDDED
    own = plan.local_addr or (address_towards(towards(plan.launch.config.store)) if moves else "")
    address = own if moves else resolve(plan.endpoint[0], until, signals.interrupted)
    port = plan.endpoint[1]
    with contextlib.ExitStack() as stack:
        stack.callback(clean_leftovers, plan.launch.shm_directory)  # what a killed agent could not free
        stack.callback(processes.end, _END_GRACE_S)
        hosts = False if moves else plan.hosts
        if hosts is None:
            hosts = is_ours(address) and stack.enter_context(_only_one_here(port))
        seat: Seat | None = None
        host: _Host | None = None
        hosted: CoordinatorProcess | None = None
        if hosts or moves:
            seat = Seat(plan, open_store(plan.launch.config.store, plan.launch.run_dir, plan.job_name))
            stack.callback(seat.close)
            host = _Host(plan, address, processes, source, seat)
            if not moves:
                _take(plan, seat)
        place: Place | None = None

        def moved() -> bool:
            if hosted is not None and seat is not None:
                return seat.leadership.lost or hosted.process.poll() is not None
            with contextlib.suppress(StoreError):
                return place is not None and seat is not None and seat.place() != place
            return False

        led = False  # there was a coordinator once: what is wrong since then may pass
        while True:
            if host is not None and hosted is None:
                try:
                    place, hosted, code = host.find_or_start(plan.endpoint[1], until, signals.interrupted)
                except (StoreError, LaunchError) as err:
                    if not led:
                        raise
                    return _nobody_leads(plan, err)
                led = moves
                if place is not None:
                    address, port = place.host, place.port
                elif hosted is not None:
                    address, port = host.address, hosted.port
                else:
                    return code
            try:
                answer, secret, spoke = enlist(plan, address, port, source, until, signals.interrupted, moved)
                break
            except Moved:
                if hosted is None or host is None:
                    continue
                end = host.gone_on(hosted)
                if end is not None and end[0] != Exit.DEPOSED:
                    show_end(*end, plan.launch.run_dir)
                    return end[0]
                hosted = hosted if end is None else None
            except Unreached as err:
                if not led:
                    raise
                return _nobody_leads(plan, err)
            except Interrupted:
                if hosted is None:
                    raise
                hosted.interrupt(signals.caught[0])
                print(f"deadpool: {hosted.wait()[1]}", file=sys.stderr)
                return signals.code
        lifeline = Lifeline(spoke)
        Path(plan.launch.log_dir).mkdir(parents=True, exist_ok=True)
        settings = agent_settings(
            plan.launch,
            answer.node,
            answer.job_id,
            secret,
            (address, port),
            answer.store_port,
            plan.local_addr or address_towards(address),
            adopt=plan.adopt,
            store_name=plan.job_name if moves else "",
        )
        settings = dataclasses.replace(settings, tells_end=hosted is None)
        # Without this command the node is lost; where the job ends with it, it may leave in good order.
        signum = signal.SIGTERM if hosted is not None else INTERRUPT
        agent = processes.start("agent", settings, signum, stdout=subprocess.DEVNULL)
        tee = _tee(plan, answer.node)
        serving = Serving(plan, signals, hosted, agent, lifeline)
        stack.callback(serving.close)
        if plan.adopt:
            farewell = threading.Thread(target=let_torchrun_go, args=(os.environ,), name="farewell")
            serving.agent_left_well = farewell.start
            stack.callback(_join, farewell)
        if moves and seat is not None and host is not None:
            the_host = host
            serving.may_lead(seat, (address, port), secret, lambda: the_host.start(plan.endpoint[1], going_on=True)[0])
        code, message = serving.run()
        if tee is not None:
            tee.stop()
        where = "" if serving.hosts else f"node {answer.node}: "
        show_end(code, message and where + message, plan.launch.run_dir)
        return code


def _nobody_leads(plan: AgentPlan, why: Exception) -> int:
    """The job had a coordinator: the same command may have more luck later."""
    show_end(Exit.RECOVERY_FAILED, str(why), plan.launch.run_dir)
    return Exit.RECOVERY_FAILED


def _join(thread: threading.Thread) -> None:
    if thread.ident is not None:  # it was started
        thread.join()


def _tee(plan: AgentPlan, node: int) -> Tee | None:
    """Show the output of this node's workers; the log directory may hold everybody's."""
    launch = plan.launch
    if launch.tee == "none":
        return None
    slots = [i for i in range(launch.slots_per_node) if plan.local_ranks is None or i in plan.local_ranks]
    names = {f"{kind}-node{node}-{i}" for i in slots for kind in ("spare", "standby")}
    if node < launch.nodes - launch.spare_nodes:
        names |= {f"rank-{node * launch.slots_per_node + i}" for i in slots}
    # (that of who has rehearsed a coordinate, too: it goes on there)
    return Tee(Path(launch.log_dir), lambda log: log in names or log.rpartition("-rank-")[0] in names)
