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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq

from deadpool_megatron.checks import LaunchError, check_transport
from deadpool_megatron.cluster import Exit
from deadpool_megatron.config import ConfigError
from deadpool_megatron.multinode.enlisting import Interrupted, Lifeline, address_towards, enlist, is_ours, resolve
from deadpool_megatron.multinode.options import AgentPlan, check_agent
from deadpool_megatron.multinode.secret import SecretSource
from deadpool_megatron.processes import (
    INTERRUPT,
    PREEMPT,
    CoordinatorProcess,
    Processes,
    agent_settings,
    coordinator_settings,
)
from deadpool_megatron.tee import Tee
from deadpool_megatron.vault import clean_leftovers, process_alive
from deadpool_megatron.versions import UserError

__all__ = ["run_agent", "run_coordinator"]

_END_GRACE_S = 12.0


class _Signals:
    """SIGINT and SIGTERM as something to poll."""

    def __init__(self) -> None:
        self.caught: list[int] = []
        self.preempt: Callable[[], None] | None = None  # takes the first SIGTERM, if it is set
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.socket = ours
        self._theirs = theirs
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda number, frame: self._take(number))

    def _take(self, signum: int) -> None:
        preempt, self.preempt = (self.preempt, None) if signum == signal.SIGTERM else (None, self.preempt)
        if preempt is not None:
            preempt()
        else:
            self.caught.append(signum)

    def interrupted(self) -> bool:
        """Whether one has come."""
        return bool(self.caught)


def _start_coordinator(
    plan: AgentPlan, address: str, processes: Processes, source: SecretSource
) -> tuple[CoordinatorProcess | None, int]:
    """The coordinator, listening; or None and the exit code it ended with."""
    job_id = f"{os.getpid()}-{secrets.token_hex(4)}"
    bind = address if is_ours(address) else "0.0.0.0"  # a service's address is nobody's
    settings = coordinator_settings(
        dataclasses.replace(plan.launch, host=address), job_id, source.make(), bind, plan.endpoint[1], plan.join_s
    )
    hosted = CoordinatorProcess(processes, settings)
    if not hosted.port:
        return None, hosted.wait()[0] or Exit.FAILED
    return hosted, 0


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
    except Interrupted:
        print("deadpool: interrupted before the job began", file=sys.stderr)
        return Exit.INTERRUPTED


def run_coordinator(options: argparse.Namespace) -> int:
    """`deadpool coordinator` after parsing: the coordinator alone, for a machine that does not train."""
    return _boundary(lambda: _coordinate(check_agent(options, os.environ)))


def _coordinate(plan: AgentPlan) -> int:
    signals = _Signals()
    processes = Processes()
    source = SecretSource(plan.secret_file, os.environ, plan.launch.run_dir, plan.job_name)
    address = resolve(plan.endpoint[0], time.monotonic() + plan.join_s, signals.interrupted)
    try:
        hosted, code = _start_coordinator(plan, address, processes, source)
        if hosted is None:
            return code
        code, message = _serve(plan, hosted, None, None, signals)
        if message:
            print(f"deadpool: {message}", file=sys.stderr)
        return code
    finally:
        processes.end(_END_GRACE_S)


def run_agent(options: argparse.Namespace) -> int:
    """`deadpool agent` after parsing: this machine's node, and the coordinator where it belongs here."""
    return _boundary(lambda: _agent(check_agent(options, os.environ)))


def _agent(plan: AgentPlan) -> int:
    check_transport(plan.launch.config)
    signals = _Signals()
    processes = Processes()
    source = SecretSource(plan.secret_file, os.environ, plan.launch.run_dir, plan.job_name)
    until = time.monotonic() + plan.join_s
    address = resolve(plan.endpoint[0], until, signals.interrupted)
    port = plan.endpoint[1]
    with contextlib.ExitStack() as stack:
        stack.callback(clean_leftovers, plan.launch.shm_directory, process_alive)  # what a killed agent could not free
        stack.callback(processes.end, _END_GRACE_S)
        hosts = plan.hosts
        if hosts is None:
            hosts = is_ours(address) and stack.enter_context(_only_one_here(port))
        hosted: CoordinatorProcess | None = None
        if hosts:
            hosted, code = _start_coordinator(plan, address, processes, source)
            if hosted is None:
                return code
            port = hosted.port
        try:
            answer, secret, spoke = enlist(plan, address, port, source, until, signals.interrupted)
        except Interrupted:
            if hosted is not None:
                return _stop(hosted)
            raise
        lifeline = Lifeline(spoke)
        stack.callback(lifeline.close)
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
        )
        agent = processes.start("agent", settings | {"tells_end": hosted is None}, stdout=subprocess.DEVNULL)
        tee = _tee(plan, answer.node)
        code, message = _serve(plan, hosted, agent, lifeline, signals)
        if tee is not None:
            tee.stop()
        if message:
            where = "" if hosted is not None else f"node {answer.node}: "
            print(f"deadpool: {where}{message}", file=sys.stderr)
        return code


def _stop(hosted: CoordinatorProcess) -> int:
    hosted.interrupt()
    _, message = hosted.wait()
    print(f"deadpool: {message}", file=sys.stderr)
    return Exit.INTERRUPTED


def _serve(
    plan: AgentPlan,
    hosted: CoordinatorProcess | None,
    agent: subprocess.Popen[Any] | None,
    lifeline: Lifeline | None,
    signals: _Signals,
) -> tuple[int, str]:
    """Wait for the end of what matters here: the coordinator if it is ours, else the agent."""
    why = ""
    while True:
        main = hosted.process if hosted is not None else agent
        assert main is not None
        why = _until_end(plan, main, agent, hosted, lifeline, signals) or why
        if hosted is None:
            break
        if why or signals.caught:
            hosted.interrupt()
        end = hosted.revive()
        if end is not None:
            code, message = end
            if why:
                return Exit.USAGE, why
            return (Exit.INTERRUPTED if signals.caught else code), message
    code = main.wait()
    if why:
        return Exit.FAILED, why
    if signals.caught:
        return Exit.INTERRUPTED, "interrupted; the job goes on without this node while there are spares"
    if code < 0:
        return 128 - code, f"its agent was ended by signal {-code}"
    return code, ""


def _until_end(
    plan: AgentPlan,
    main: subprocess.Popen[Any],
    agent: subprocess.Popen[Any] | None,
    hosted: CoordinatorProcess | None,
    lifeline: Lifeline | None,
    signals: _Signals,
) -> str:
    """Until ``main`` has ended. Returns why this command made it end, if it did for a reason of its own."""
    poller = zmq.Poller()
    ends = {os.pidfd_open(p.pid): p for p in (main, agent) if p is not None and p.poll() is None}
    for fd in [*ends, signals.socket.fileno()]:
        poller.register(fd, zmq.POLLIN)
    if lifeline is not None and hosted is None:
        poller.register(lifeline.fd, zmq.POLLIN)
    passed_on = 0
    why = ""
    if plan.launch.config.on_preempt:
        signals.preempt = lambda: main.send_signal(PREEMPT)
    while main.poll() is None:
        for fd, _ in poller.poll(1000):
            if lifeline is not None and fd is lifeline.fd:
                lifeline.look()
            elif fd == signals.socket.fileno():
                signals.socket.recv(64)
            elif isinstance(fd, int) and ends[fd] is agent:
                poller.unregister(fd)
                if agent.poll() == Exit.USAGE and hosted is not None and not why:
                    why = "this machine's agent could not start, so there is no job"
                    main.terminate()
        if len(signals.caught) > passed_on:
            passed_on = len(signals.caught)
            main.send_signal(INTERRUPT if hosted is not None else signal.SIGTERM)
        gone_since = lifeline.gone_since if lifeline is not None and hosted is None else None
        if gone_since is not None and not why and time.monotonic() - gone_since > plan.gone_s:
            why = f"the coordinator has been gone for {plan.gone_s:g} s; the job is over"
            main.terminate()
    signals.preempt = None
    for fd in ends:
        os.close(fd)
    return why


def _tee(plan: AgentPlan, node: int) -> Tee | None:
    """Show the output of this node's workers; the log directory may hold everybody's."""
    launch = plan.launch
    if launch.tee == "none":
        return None
    slots = [i for i in range(launch.slots_per_node) if plan.local_ranks is None or i in plan.local_ranks]
    names = {f"spare-node{node}-{i}" for i in slots}
    if node < launch.nodes - launch.spare_nodes:
        names |= {f"rank-{node * launch.slots_per_node + i}" for i in slots}
    return Tee(Path(launch.log_dir), names.__contains__)
