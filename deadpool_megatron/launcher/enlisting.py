"""Finding the coordinator and asking it for a place; noticing when it is gone."""

from __future__ import annotations

import secrets
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.link.link import Spoke
from deadpool_megatron.launcher.plan import LaunchError
from deadpool_megatron.launcher.secret import SecretSource

if TYPE_CHECKING:
    from deadpool_megatron.launcher.agent_options import AgentPlan

_ASK_AGAIN_S = 5.0
_SILENT_S, _SAY_AGAIN_S = 10.0, 60.0
_LOOK_S = 0.25


class Interrupted(Exception):
    """The user wants the end before the job has begun."""


class Unreached(LaunchError):
    """Nobody listens where the coordinator is to be."""


class Moved(Exception):
    """The coordinator is not where it was asked for a place any more."""


def resolve(host: str, until: float, interrupted: Callable[[], bool]) -> str:
    """The IPv4 address of ``host``, asked for again until ``until``: a pod's name may come after its container.

    Raises LaunchError or Interrupted.
    """
    waiting = Waiting(until)
    while True:
        try:
            return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        except OSError as err:
            why = f"--rdzv-endpoint {host}: {err.strerror or err}"
            if time.monotonic() >= until:
                raise LaunchError(why) from None
            waiting.because(partial(str, why))
        if interrupted():
            raise Interrupted
        time.sleep(_LOOK_S)  # a name service cannot be waited for


class Waiting:
    """Tells the user what is waited for, soon and then now and then: it may be a mistake that nothing mends."""

    def __init__(self, until: float) -> None:
        self._until = until
        self._begun = time.monotonic()
        self._due = self._begun + _SILENT_S

    def because(self, why: Callable[[], str]) -> None:
        """This is why nothing has come of it so far."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _SAY_AGAIN_S
            left = max(0.0, self._until - now)
            print(f"deadpool: {why()} (tries go on for {left:.0f} s)", file=sys.stderr, flush=True)


def is_ours(address: str) -> bool:
    """Whether ``address`` belongs to this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def enlist(
    plan: AgentPlan,
    address: str,
    port: int,
    source: SecretSource,
    until: float,
    interrupted: Callable[[], bool],
    moved: Callable[[], bool],
) -> tuple[r.Enlisted, bytes, Spoke]:
    """Ask the coordinator for a place until it answers; returns its answer, the secret, and the open connection.

    Raises LaunchError at ``until`` (monotonic seconds; `Unreached` where nobody listens) or when there is no place,
    Interrupted, Moved once ``moved``.
    """
    job = plan.launch
    token = secrets.token_hex(8)
    request = r.encode(
        r.Enlist(
            token, socket.gethostname(), plan.node, job.nodes, job.spare_nodes, job.slots_per_node, job.config.flags()
        )
    )
    spoke: Spoke | None = None
    secret: bytes | None = None
    asked = 0.0
    knows = False  # the secret is the job's
    begun = looked = time.monotonic()
    waiting = Waiting(until)
    try:
        while time.monotonic() < until:
            if interrupted():
                raise Interrupted
            if spoke is not None:
                spoke.changed()
                knows = spoke.connected
            waited, unknown = time.monotonic() - begun, secret is None
            waiting.because(partial(_why_no_answer, address, port, waited, unknown, source, knows))
            if time.monotonic() - looked > _ASK_AGAIN_S:
                looked = time.monotonic()
                if moved():
                    raise Moved
            found = source.find()
            if found is None:
                time.sleep(_LOOK_S)  # a file on a shared file system cannot be waited for
                continue
            if found != secret:
                if spoke is not None:
                    spoke.close()
                spoke = Spoke(f"{address}:{port}", f"enlist-{token}", found, job.config.lease)
                secret, asked = found, 0.0
            assert spoke is not None and secret is not None
            if time.monotonic() - asked > _ASK_AGAIN_S:
                asked = time.monotonic() if spoke.send(request, _LOOK_S) else 0.0
            packet = spoke.receive(_LOOK_S)
            if packet is None:
                continue
            answer = r.decode_from_coordinator(packet)
            if not isinstance(answer, r.Enlisted):
                continue
            if answer.error:
                raise LaunchError(answer.error)
            kept, spoke = spoke, None
            return answer, secret, kept
    finally:
        if spoke is not None:
            spoke.close()
    why = _why_no_answer(address, port, plan.join_s, secret is None, source, knows)
    raise (Unreached if _unreached(address, port) else LaunchError)(why)


def _unreached(address: str, port: int) -> str:
    """Why nobody can be spoken to there; may be empty."""
    try:
        socket.create_connection((address, port), 3.0).close()
    except OSError as err:
        return err.strerror or str(err)
    return ""


def _why_no_answer(
    address: str, port: int, waited_s: float, no_secret: bool, source: SecretSource, connected: bool
) -> str:
    if unreached := _unreached(address, port):
        return (
            f"nothing listens at {address}:{port} ({unreached}) after {waited_s:.0f} s: is node 0 (or "
            "`deadpool coordinator`) up, and --rdzv-endpoint its address?"
        )
    if no_secret:
        return source.why_none()
    if connected:
        return (
            f"the coordinator at {address}:{port} is there but has no place to give after {waited_s:.0f} s: the job is "
            "starting or ending (it takes nodes in while it trains), or another version of DeadPool runs there"
        )
    return (
        f"{address}:{port} listens but does not answer: it has another secret (another --run-dir, secret file or "
        "--rdzv-id), or is no coordinator"
    )


class Lifeline:
    """The connection to the coordinator, kept open to notice its end.

    ``fd`` is to be polled.
    """

    def __init__(self, spoke: Spoke) -> None:
        self._spoke = spoke
        self.fd = spoke.monitor
        self.gone_since: float | None = None

    def look(self, now: float) -> None:
        """Take in what has happened to the connection; call often."""
        self._spoke.changed()
        self._spoke.look()
        self.gone_since = None if self._spoke.connected else self.gone_since or now

    def close(self) -> None:
        self._spoke.close()
