"""`deadpool doctor`: is this machine, or this allocation, fit for a run?"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from deadpool_megatron.options import count, host_name, number

_USAGE = 2
_MOST = 10**6  # GiB, MiB or seconds


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool doctor`."""
    add = parser.add_argument
    add("--shm-directory", default="/dev/shm", metavar="DIR", help="where the vaults will be (default: /dev/shm)")
    add(
        "--vault-gib",
        type=number(0, _MOST),
        default=0.0,
        metavar="G",
        help="GiB the vault of a node takes (default: not known)",
    )
    add("--meet", metavar="HOST:PORT", help="measure between nodes: where node 0 is; run this on every node")
    add("--nnodes", type=count(1), metavar="N", help="with --meet: how many nodes (default: SLURM_JOB_NUM_NODES)")
    add("--node-rank", type=count(), metavar="I", help="with --meet: this one's number (default: SLURM_NODEID)")
    add(
        "--address",
        type=host_name,
        metavar="IP",
        help="with --meet: this node's address (default: the one towards HOST)",
    )
    add("--secret-file", metavar="FILE", help="with --meet: 64 hex digits, the same on all nodes")
    add(
        "--mib",
        type=count(1, _MOST),
        default=256,
        metavar="M",
        help="with --meet: MiB sent over each link (default: 256)",
    )
    add(
        "--deadline",
        type=number(1e-3, _MOST),
        default=120.0,
        metavar="S",
        help="with --meet: seconds to wait (default: 120)",
    )


def run_doctor(options: argparse.Namespace) -> int:
    """`deadpool doctor` after parsing; 1 when this machine is not fit for a run."""
    from deadpool_megatron.doctor.machine import Finding, check_machine, show_findings
    from deadpool_megatron.doctor.network import MeetingError

    def findings() -> Iterator[Finding]:
        yield from check_machine(options.shm_directory, int(options.vault_gib * (1 << 30)))
        if options.meet:
            yield from _meet(options)

    try:
        return int(show_findings(findings(), print) > 0)
    except (MeetingError, OSError, ValueError) as err:
        print(f"deadpool: --meet {options.meet}: {err}", file=sys.stderr)
        return _USAGE


def _meet(options: argparse.Namespace) -> list[Any]:
    from deadpool_megatron.cluster.link.ports import address_towards
    from deadpool_megatron.doctor.network import MeetingError, host_meeting, join_meeting

    host, _, port_text = options.meet.rpartition(":")
    if not host or not port_text.isdecimal() or int(port_text) > 65535:
        raise ValueError("expected HOST:PORT, with a port up to 65535")
    rank = _number(options.node_rank, "SLURM_NODEID", "--node-rank")
    nodes = _number(options.nnodes, "SLURM_JOB_NUM_NODES", "--nnodes")
    if not 0 <= rank < nodes:
        raise ValueError(f"--node-rank {rank} is not one of {nodes} nodes, 0 to {nodes - 1}")
    secret = _secret(options.secret_file)
    target = socket.gethostbyname(host)
    address = options.address or address_towards(target)
    if rank != 0:
        return join_meeting(f"{target}:{port_text}", rank, address, secret, options.deadline)
    errors: list[BaseException] = []
    ports: list[int] = []
    listening = threading.Event()

    def announce(port: int) -> None:
        ports.append(port)
        listening.set()

    def hold() -> None:
        try:
            host_meeting(target, int(port_text), nodes, secret, options.mib << 20, options.deadline, announce)
        except (MeetingError, OSError) as err:
            errors.append(err)
            listening.set()

    meeting = threading.Thread(target=hold, name="doctor-meeting", daemon=True)
    meeting.start()
    if not listening.wait(options.deadline):
        raise MeetingError(f"{target}: no meeting point could be opened within {options.deadline:g} s; try again")
    if errors:
        raise errors[0]
    try:
        return join_meeting(f"{target}:{ports[0]}", rank, address, secret, options.deadline + 5.0)
    except MeetingError:
        if errors:  # the meeting point knows better why
            raise errors[0] from None
        raise
    finally:
        meeting.join(5.0)


def _number(given: int | None, variable: str, flag: str) -> int:
    if given is not None:
        return given
    if variable in os.environ:
        return int(os.environ[variable])
    raise ValueError(f"{flag} is needed (there is no {variable})")


def _secret(path: str | None) -> bytes:
    path = path or os.environ.get("DEADPOOL_SECRET_FILE")
    text = open(path).read().strip() if path else os.environ.get("DEADPOOL_SECRET", "")  # noqa: SIM115
    if not text:
        raise ValueError("a secret is needed: --secret-file FILE or DEADPOOL_SECRET_FILE, 64 hex digits, as in "
                         "'openssl rand -hex 32 > FILE'")  # fmt: skip
    secret = bytes.fromhex(text)
    if len(secret) != 32:
        raise ValueError(f"the secret has {len(text)} hex digits, not 64")
    return secret
