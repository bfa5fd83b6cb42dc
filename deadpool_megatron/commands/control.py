"""`deadpool inject`, `deadpool drain`, `deadpool join`: commands that speak to a running job."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import time
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.link.link import Spoke
from deadpool_megatron.cluster.notices import INTERRUPT, PREEMPT, WARNINGS
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.launcher.processes import Processes, metrics_port
from deadpool_megatron.observe import JOB, EventTail, NotWhole, read_whole
from deadpool_megatron.observe.commands import add_run_dir
from deadpool_megatron.options import count, host_name, number

_ANSWER_S = 10.0
_POLL_S = 0.05
_SIGN = re.compile(r"xid:[1-9]\d{0,2}")
_TRIES = 5  # of a request that may be made twice


class _NoJob(Exception):
    """The job cannot be reached, or refuses; the message is one line.

    ``later``: it may not refuse in a moment. ``cut``: the coordinator ended before it answered.
    """

    def __init__(self, message: str, later: bool = False, cut: bool = False) -> None:
        super().__init__(message)
        self.later = later
        self.cut = cut


def _job(run_dir: str) -> dict[str, Any]:
    path = Path(run_dir) / JOB
    try:
        return read_whole(path, ("coordinator", "secret", "lease", "agent"))
    except NotWhole as err:
        raise _NoJob(str(err)) from None
    except OSError as err:
        raise _NoJob(f"no job at {path}: {err.strerror}; name its directory with --run-dir") from None


def _ask(job: dict[str, Any], run_dir: str, record: msgspec.Struct) -> r.InjectReply | r.SpareAdded:
    name = f"tool-{os.urandom(8).hex()}"  # nobody else's, on no machine
    spoke = Spoke(job["coordinator"], name, bytes.fromhex(job["secret"]), float(job["lease"]))
    try:
        packet = _answer(spoke, run_dir) if spoke.send(r.encode(record), _ANSWER_S) else None
        there = spoke.connected
    finally:
        spoke.close()
    if packet is None:
        why = "stopped, or another version of DeadPool" if there else "it is over, or not on this machine"
        raise _NoJob(f"the job of {run_dir} does not answer: {why}")
    reply = r.decode_from_coordinator(packet)
    assert isinstance(reply, r.InjectReply | r.SpareAdded)
    if reply.error:
        raise _NoJob(reply.error, reply.later)
    return reply


def _ask_until(
    run_dir: str, record: msgspec.Struct, end: float = math.inf
) -> tuple[dict[str, Any], r.InjectReply | r.SpareAdded]:
    """Ask for what may be asked twice, again while the job may not refuse it in a moment, until ``end``; the job as it
    answered, and the answer. Raises `_NoJob`, with ``cut`` if a coordinator ended that may have heard it."""
    cuts, told = 0, ""
    while True:
        try:
            job = _job(run_dir)
            return job, _ask(job, run_dir, record)
        except _NoJob as err:
            cuts += err.cut
            if not err.later or cuts == _TRIES or time.monotonic() >= end:
                err.cut = cuts > 0
                raise
            if not err.cut and str(err) != told:
                told = str(err)
                print(f"deadpool: waiting: {told}", file=sys.stderr)
        time.sleep(10 * _POLL_S)


def _answer(spoke: Spoke, run_dir: str) -> bytes | None:
    """Raises `_NoJob` when the connection ends before the answer: the request was heard, or is lost."""
    end = time.monotonic() + _ANSWER_S
    while time.monotonic() < end:
        packet = spoke.receive(_POLL_S)
        if packet is not None:
            return packet
        spoke.changed()
        if spoke.ended:
            raise _NoJob(
                f"the coordinator of {run_dir} ended while it was asked; it is started again: look at deadpool status "
                "whether it was done, else ask again",
                later=True,
                cut=True,
            )
    return None


def _fail(message: str) -> int:
    print(f"deadpool: {message}", file=sys.stderr)
    return Exit.USAGE


# ---- inject


def inject(options: argparse.Namespace) -> int:
    if options.list:
        width = max(map(len, points.POINTS))
        for name, (where, what) in points.POINTS.items():
            print(f"{name:{width}}  {where:11}  {what}")
        return Exit.OK
    if options.node is None and (options.sign or options.fault) not in ("abort", "kill-coordinator"):
        return _fail(f"--{'sign' if options.sign else 'fault'} {options.sign or options.fault} needs --node")
    node = -1 if options.node is None else options.node
    kind: r.FaultKind = "sign" if options.sign else options.fault
    if kind == "sign" and not _SIGN.fullmatch(options.sign or ""):
        return _fail(f"--sign {options.sign or '(none given)'}: not the sign of a machine, as in xid:149")
    if kind == "sign" and (options.at_iteration is not None or options.at):
        return _fail("--sign is told at once: without --at-iteration and --at")
    fault = r.Fault(
        kind,
        node,
        options.local,
        options.at_iteration,
        options.at_tick,
        options.at or "",
        options.seconds,
        options.sign or "",
    )
    if fault.kind == "fail-check" and (options.at_iteration is not None or options.at):
        return _fail("--fault fail-check is armed at once: without --at-iteration and --at")
    if fault.kind == "slow" and not fault.seconds:
        return _fail("--fault slow needs --seconds, how much longer a microbatch takes from then on")
    if fault.kind in ("raise", "hang", "slow") and fault.iteration is None and not fault.point:
        return _fail(f"--fault {fault.kind} happens on the training thread: say where with --at-iteration or --at")
    try:
        _ask(_job(options.run_dir), options.run_dir, r.Inject(fault))
    except _NoJob as err:
        if fault.kind == "kill-coordinator" and err.cut:
            print("deadpool: kill-coordinator, now")
            return Exit.OK
        return _fail(str(err))
    when = "now" if fault.iteration is None else f"in iteration {fault.iteration}"
    if fault.point:
        when = f"at {fault.point}" + ("" if fault.iteration is None else f", iteration {fault.iteration} or later")
    place = "" if options.node is None else f" on node {options.node}"
    print(f"deadpool: {options.sign or options.fault}{place}, {when}")
    return Exit.OK


# ---- drain


def drain(options: argparse.Namespace) -> int:
    """`deadpool drain` after parsing: returns when the node may be taken away, with ``--cancel`` when it stays."""
    if options.cancel:
        try:
            _ask(_job(options.run_dir), options.run_dir, r.Drain(options.node, cancel=True))
        except _NoJob as err:
            return _fail(str(err))
        print(f"deadpool: node {options.node} stays")
        return Exit.OK
    events = EventTail(options.run_dir)
    events.read()  # those from now on: another machine's clock would not tell which they are
    try:
        _drained(options, events)
    except _NoJob as err:
        return _fail(str(err))
    print(f"deadpool: node {options.node} is drained and may be taken away")
    return Exit.OK


def _drained(options: argparse.Namespace, events: EventTail) -> None:
    """Until the node is. Raises `_NoJob`: it is not."""
    node, end = options.node, time.monotonic() + options.timeout
    left = _ask_to_drain(options, end)
    while not left:
        if time.monotonic() >= end:
            raise _NoJob(
                f"node {node} is not drained after {options.timeout:g} s, and the job goes on to try; deadpool status "
                f"says what it waits for, deadpool drain --node {node} --cancel calls it off"
            )
        asks = False
        for event in events.read():
            name, here = event["event"], event.get("node") == node
            asks = asks or name == "coordinator_back"
            if name == "rehearsing":
                print(f"deadpool: node {event['node']} sets up what node {node} does, while training goes on")
            elif name == "left" and here:
                return
            elif name == "detected" and here and "local" not in event:  # else it is one worker's end
                raise _NoJob(f"node {node} was lost while it was drained: {event['cause']}")
            elif name == "stays" and here:
                raise _NoJob(f"node {node} is not drained, training goes on: {event['cause']}")
            elif name in ("stopped", "finished"):
                raise _NoJob(f"the job ended before node {node} was drained")
        if asks:  # what the coordinator before this one did last it may not have written down
            left = _ask_to_drain(options, end, again=True)
        time.sleep(_POLL_S)


def _ask_to_drain(options: argparse.Namespace, end: float, again: bool = False) -> bool:
    """Ask until the node is being drained; True when it is already. Raises `_NoJob`: it cannot be.

    Args:
        again: a coordinator that has ended may have heard it.
    """
    try:
        _ask_until(options.run_dir, r.Drain(options.node), end)
        return False
    except _NoJob as err:
        why = str(err)
        if (again or err.cut) and why.endswith(("is being drained already", "has left already")):
            return why.endswith("has left already")
        raise


# ---- join


def join(options: argparse.Namespace) -> int:
    """`deadpool join` after parsing: runs an agent as a new spare of the job, to its end.

    A job that is starting, perhaps anew with fewer replicas, is waited for.
    """
    try:  # (a number that was given before a cut is forgotten when nobody comes with it)
        job, reply = _ask_until(options.run_dir, r.AddSpare(options.host or ""))
    except _NoJob as err:
        return _fail(str(err))
    assert isinstance(reply, r.SpareAdded)
    settings = msgspec.convert(job["agent"], AgentSettings)
    host = options.host or settings.host
    settings = replace(
        settings,
        node=reply.node,
        coordinator=job["coordinator"],
        host=host,
        metrics_port=metrics_port(settings.config, reply.node, host),
    )
    process = Processes().start("agent", settings, 0 if options.detach else INTERRUPT, stdout=subprocess.DEVNULL)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: process.send_signal(INTERRUPT))
    for signum in WARNINGS:
        signal.signal(signum, lambda number, frame: process.send_signal(PREEMPT))
    print(f"deadpool: node {reply.node} joins the job of {options.run_dir} as a spare", flush=True)
    if options.detach:
        return Exit.OK
    code = process.wait()
    return code if code >= 0 else Exit.FAILED


def add_commands(commands: Any) -> None:
    """Add the three commands to the parser of `deadpool`."""
    command = commands.add_parser("inject", help="make a part of a running job fail, to see it recover")
    command.set_defaults(run=inject)
    add = command.add_argument
    add_run_dir(command)
    add("--node", type=count(), metavar="N", help="the node (not for abort and kill-coordinator)")
    add(
        "--fault",
        choices=typing.get_args(r.FaultKind),
        default="kill",
        help="kill: SIGKILL for the agent and all its workers (default); kill-worker, kill-agent, kill-coordinator: "
        "for one process; stop, stop-agent: SIGSTOP for a worker or the whole node; hang: a worker's training thread "
        "sleeps; raise: an error in its code; crash: SIGSEGV; slow: every microbatch takes --seconds longer; corrupt: "
        "bytes of its newest copy in the vault are overwritten; fail-check: a spare's worker fails its checks; sign: "
        "nothing fails (see --sign); abort: nobody dies, all communicators are aborted and re-formed",
    )
    add("--local", type=count(), default=0, metavar="I", help="local index of the worker (default: 0)")
    add("--at-iteration", type=count(), metavar="K", help="in iteration K (from 0; default: now)")
    add(
        "--at-tick",
        type=count(1),
        default=1,
        metavar="T",
        help="at the T-th forward or backward pass of that iteration (default: 1, the first)",
    )
    add("--at", metavar="POINT", help="when the process passes this crash point (see --list)")
    add("--seconds", type=number(), default=0.0, metavar="S", help="for slow")
    add(
        "--sign",
        metavar="SIGN",
        help="nothing fails, but the node's machine tells of this sign, as xid:149, which decides whom the next "
        "minute's failures are blamed on",
    )
    add("--list", action="store_true", help="show all crash points")

    command = commands.add_parser(
        "drain", help="move a node's coordinates to a spare at the next step boundary, so that it can be taken away"
    )
    command.set_defaults(run=drain)
    add_run_dir(command)
    command.add_argument("--node", type=count(), required=True, metavar="N", help="the node")
    command.add_argument(
        "--timeout", type=number(), default=600.0, metavar="S", help="seconds to wait for it (default: 600)"
    )
    command.add_argument("--cancel", action="store_true", help="the node stays: call off a drain that is under way")

    command = commands.add_parser("join", help="add this machine to a running job as a new spare node")
    command.set_defaults(run=join)
    add_run_dir(command)
    command.add_argument(
        "--host",
        type=host_name,
        metavar="ADDRESS",
        help="address at which the other nodes reach this one (default: the job's)",
    )
    command.add_argument("--detach", action="store_true", help="return at once; the node goes on in the background")
