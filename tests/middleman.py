"""Who sits between an agent and its coordinator."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading

__all__ = ["Middleman"]


class Middleman:
    """Passes on what an agent and the hub say to each other, until it is told to do something to it."""

    def __init__(self, port: int, spared: int = 0) -> None:
        """``spared``: so many connections, the first ones, are left alone."""
        self._hub_port = port
        self._spared = spared
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._meddling: tuple[str, str] | None = None
        self.past: dict[str, list[bytes]] = {"to hub": [], "to agent": []}  # of all connections
        self._chance = random.Random(1)
        self._open: list[socket.socket] = []
        self._cut: set[socket.socket] = set()
        self._kept: set[socket.socket] = set()
        self._dropped: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def meddle(self, way: str, how: str) -> None:
        """With what comes next on this way."""
        self._meddling = way, how

    @property
    def meddled(self) -> bool:
        """It has."""
        return self._meddling is None

    def reset(self, hub_hears: bool = True) -> None:
        """The newest connection, at both ends, with whatever is on its way.

        ``hub_hears``: False: only at the agent's end, so that its next connection takes the place of one that stays.
        """
        agent, hub = self._open
        if not hub_hears:
            self._kept.add(hub)
        for each in (agent, hub) if hub_hears else (agent,):
            self._cut.add(each)
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RD)

    def drop(self) -> None:
        """From now on nothing that either end of the newest connection says comes to the other, its end neither."""
        self._dropped.update(self._open)

    def hang_up(self) -> None:
        """Both hear all that was sent, and then the end."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """No more connections."""
        self._listener.close()
        self.hang_up()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                agent = self._listener.accept()[0]
                hub = socket.create_connection(("127.0.0.1", self._hub_port))
                self._spared -= 1
                spared, self._open = self._spared >= 0, [agent, hub]
                for ends, way in (((agent, hub), "to hub"), ((hub, agent), "to agent")):
                    threading.Thread(target=self._pass_on, args=(*ends, way, spared), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, way: str, spared: bool) -> None:
        held, mine = b"", len(self.past[way])
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if source in self._dropped:
                    continue
                out = [held, data]
                if not spared and self._meddling is not None and self._meddling[0] == way:
                    how, self._meddling = self._meddling[1], None
                    held, out = self._done(how, way, data, mine)
                    if how == "reflected":
                        source.sendall(data)
                else:
                    held = b""
                self.past[way].append(data)
                target.sendall(b"".join(reversed(out)))
        with contextlib.suppress(OSError):
            if source in self._dropped:
                return
            if source in self._cut:
                source.close()
                if target not in self._kept:
                    target.close()
            else:
                target.shutdown(socket.SHUT_WR)

    def _done(self, how: str, way: str, data: bytes, mine: int) -> tuple[bytes, list[bytes]]:
        """What is kept for later, and what is sent, last first."""
        at, older = self._chance.randrange(len(data)), self.past[way]
        match how:
            case "flipped":
                return b"", [data[:at] + bytes([data[at] ^ 1 << self._chance.randrange(8)]) + data[at + 1 :]]
            case "marked as a part" | "marked as a command":  # in the frame's flags, which CURVE does not authenticate
                return b"", [bytes([data[0] ^ (1 if how.endswith("part") else 4)]) + data[1:]]
            case "changed":  # what CURVE does authenticate
                return b"", [data[:-1] + bytes([data[-1] ^ 1])]
            case "of another length":
                return b"", [data[:1] + bytes([data[1] ^ 0x7F]) + data[2:]]
            case "cut":
                return b"", [data[:at]]
            case "twice":
                return b"", [data, data]
            case "late":
                return data, []
            case "repeated":  # of this connection
                return b"", [self._chance.choice(older[mine:] or [data]), data]
            case "of an older connection":
                return b"", [data, self._chance.choice(older[:mine] or [b""])]
            case "noise":
                return b"", [data, self._chance.randbytes(at)]
        return b"", [data]
