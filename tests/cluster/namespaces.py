"""Network namespaces as hosts, on a network whose every link a test can cut, slow down and heal, each way by itself.

Each host has one TAP interface; what it sends arrives here and is handed on by a thread. So no kernel module for faults
is needed, and a cut is what a pulled cable is: no packet, no goodbye.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import selectors
import shutil
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Final

__all__ = ["Network", "why_not"]

_TUNSETIFF: Final = 0x400454CA
_TAP, _NO_INFORMATION = 0x0002, 0x1000
_MTU: Final = 60000
_names = iter(range(1 << 20))


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, timeout=30)


def why_not() -> str:
    """Why there can be no such network here; empty when there can."""
    if shutil.which("ip") is None:
        return "no ip command here (Debian and Ubuntu: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"dptry{os.getpid()}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        _ip("netns", "add", name)
    except (OSError, subprocess.SubprocessError) as err:
        return f"network namespaces are not allowed here: {err}"
    _ip("netns", "del", name)
    return ""


@dataclass
class _Way:
    """One direction between two hosts."""

    cut: bool = False
    delay_s: float = 0.0
    loss: float = 0.0


class Network:
    """Hosts 0 to ``hosts`` - 1. A context manager; afterwards nothing of it is left.

    Attributes:
        lost: frames that did not arrive, for a test to see that its fault was one.
    """

    def __init__(self, hosts: int) -> None:
        self.names = [f"dp{os.getpid()}-{next(_names)}" for _ in range(hosts)]
        self.lost = 0
        self._ways = {(a, b): _Way() for a in range(hosts) for b in range(hosts) if a != b}
        self._random = random.Random(1)
        self._taps: list[int] = []
        self._late: list[tuple[float, int, int, bytes]] = []
        self._stop = threading.Event()
        try:
            for host, name in enumerate(self.names):
                self._make(host, name)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._carry, name="network", daemon=True)
        self._thread.start()

    def _make(self, host: int, name: str) -> None:
        _ip("netns", "add", name)
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._taps.append(tap)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode()[:15], _TAP | _NO_INFORMATION))
        _ip("link", "set", name[:15], "netns", name, "name", "eth0")
        for line in (
            f"link set eth0 mtu {_MTU} address {_mac(host)} up",
            "link set lo up",
            f"addr add {self.address(host)}/24 dev eth0",
        ):
            _ip("-n", name, *line.split())
        for other in range(len(self.names)):  # nobody has to ask who has an address
            if other != host:
                _ip("-n", name, *f"neigh add {self.address(other)} lladdr {_mac(other)} dev eth0 nud permanent".split())

    def address(self, host: int) -> str:
        """Its address, the same in every network: only its hosts can see each other."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int) -> list[str]:
        """What makes a command run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    # ---- faults

    def cut(self, host: int, out: bool = True, into: bool = True) -> None:
        """From now on nothing that a host sends arrives (``out``), nothing arrives there (``into``)."""
        for (a, b), way in self._ways.items():
            way.cut = way.cut or (out and a == host) or (into and b == host)

    def worsen(self, delay_s: float, loss: float) -> None:
        """Every frame takes longer; a share of them is lost."""
        for way in self._ways.values():
            way.delay_s, way.loss = delay_s, loss

    def heal(self) -> None:
        """The network is as it was."""
        for way in self._ways.values():
            way.cut, way.delay_s, way.loss = False, 0.0, 0.0

    # ---- the network

    def _carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            for host, tap in enumerate(self._taps):
                selector.register(tap, selectors.EVENT_READ, host)
            while not self._stop.is_set():
                wait = max(0.0, self._late[0][0] - time.monotonic()) if self._late else 0.1
                for key, _ in selector.select(min(wait, 0.1)):
                    for _ in range(64):
                        try:
                            frame = os.read(key.fd, 1 << 16)
                        except OSError:
                            break
                        self._route(key.data, frame)
                while self._late and self._late[0][0] <= time.monotonic():
                    _, _, to, frame = heapq.heappop(self._late)
                    self._hand(to, frame)

    def _route(self, source: int, frame: bytes) -> None:
        for to in range(len(self._taps)):
            if to == source or frame[:6] != bytes.fromhex(_mac(to).replace(":", "")):
                continue
            way = self._ways[source, to]
            if way.cut or self._random.random() < way.loss:
                self.lost += 1
            elif way.delay_s:
                heapq.heappush(self._late, (time.monotonic() + way.delay_s, next(_names), to, frame))
            else:
                self._hand(to, frame)

    def _hand(self, to: int, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # a full queue drops, as a switch does
            os.write(self._taps[to], frame)

    # ---- the end

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the network down. The processes on its hosts must have ended."""
        self._stop.set()
        if hasattr(self, "_thread"):
            self._thread.join(5)
        for tap in self._taps:
            os.close(tap)
        for name in self.names:
            with contextlib.suppress(subprocess.SubprocessError):
                _ip("netns", "del", name)


def _mac(host: int) -> str:
    return f"02:00:00:00:00:{host + 1:02x}"
