"""Find and end the connections of Gloo, from outside of Gloo.

Nothing in torch ends a Gloo operation from another thread. Shutting down its sockets does (when every rank does it).
A Gloo device is one epoll descriptor watched by one thread, with its listening socket in it. So a device is known by
(epoll descriptor, inode of the listener), and what /proc/self/fdinfo says the epoll watches *now* are exactly the
connections to end: no list of descriptors to keep, no danger of hitting another library's socket through a reused
descriptor number. Listening sockets are left alone: shutting one down ends the process (std::terminate in Gloo).
"""

import contextlib
import os
import re
import socket
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

_TCP_ESTABLISHED = 1
_TARGET = re.compile(r"^tfd: *(\d+) .* ino:([0-9a-f]+)", re.MULTILINE)  # "tfd: 7 events: 19 data: 55d0 pos:0 ino:1f2e"


@dataclass(frozen=True, slots=True)
class GlooDevice:
    epoll_fd: int
    listener_inode: int


def _watched(epoll_fd: int) -> Iterator[tuple[int, int]]:
    """(descriptor, inode) of everything an epoll descriptor watches; nothing if it is closed by now."""
    try:
        with open(f"/proc/self/fdinfo/{epoll_fd}", encoding="ascii") as info:
            text = info.read()
    except OSError:
        return
    for fd, inode in _TARGET.findall(text):
        yield int(fd), int(inode, 16)


def _open_socket(fd: int, inode: int) -> socket.socket | None:
    """A duplicate of the socket behind `fd` if it is still the one with this inode."""
    try:
        copy = os.dup(fd)
    except OSError:
        return None
    try:
        if os.fstat(copy).st_ino == inode:
            return socket.socket(fileno=copy)
    except OSError:
        pass  # a pipe or eventfd of the loop
    os.close(copy)
    return None


def _is_listener(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _devices() -> set[GlooDevice]:
    """Epolls of this process with a listening stream socket in them (Gloo devices, and whoever looks like one)."""
    found: set[GlooDevice] = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") != "anon_inode:[eventpoll]":
                continue
        except OSError:
            continue
        for fd, inode in _watched(int(name)):
            if (sock := _open_socket(fd, inode)) is not None:
                with sock:
                    if _is_listener(sock):
                        found.add(GlooDevice(int(name), inode))
    return found


class GlooConnections:
    """The Gloo devices of this process, and the end of their connections. A connection is known by its inode."""

    def __init__(self) -> None:
        self._known: set[GlooDevice] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[GlooDevice]]:
        """Devices that appear inside the block are Gloo's: put it around whatever creates a Gloo backend or device.
        Yields a set that holds them after the block."""
        fresh: set[GlooDevice] = set()
        before = _devices()
        try:
            yield fresh
        finally:
            fresh |= _devices() - before
            self._known |= fresh

    def of(self, devices: Collection[GlooDevice]) -> set[int]:
        """The connections of these devices, ended ones that are still open included."""
        found: set[int] = set()
        for inode, sock in self._connections(devices):
            sock.close()
            found.add(inode)
        return found

    def fresh(self, devices: Collection[GlooDevice], seen: set[tuple[int, int]]) -> set[int]:
        """The connections of these devices that are not in `seen`, which this adds to: (descriptor, inode)."""
        new = {each for device in devices for each in _watched(device.epoll_fd)} - seen
        seen |= new
        found: set[int] = set()
        for fd, inode in new:
            if (sock := _open_socket(fd, inode)) is not None:
                with sock:
                    if not _is_listener(sock):
                        found.add(inode)
        return found

    def shutdown(self, spare: Collection[int] = frozenset()) -> int:
        """Shut down all connections of all devices but those to spare, from any thread. Never blocks. Returns how
        many."""
        return self._end(lambda inode: inode not in spare)

    def shutdown_only(self, these: Collection[int]) -> int:
        """Shut down these connections, where they are still there."""
        return self._end(lambda inode: inode in these) if these else 0

    def established(self) -> set[int]:
        """The connections that neither end has ended."""
        found: set[int] = set()
        for inode, sock in self._connections():
            with sock, contextlib.suppress(OSError):  # not TCP
                if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_ESTABLISHED:
                    found.add(inode)
        return found

    def _end(self, chosen: Callable[[int], bool]) -> int:
        count = 0
        for inode, sock in self._connections():
            with sock, contextlib.suppress(OSError):  # not connected (yet, or any more)
                if chosen(inode):
                    sock.shutdown(socket.SHUT_RDWR)
                    count += 1
        return count

    def _connections(self, devices: Collection[GlooDevice] | None = None) -> Iterator[tuple[int, socket.socket]]:
        """Inode and a duplicate, to be closed by the caller, of each connection of these (or all) devices."""
        for device in list(self._known if devices is None else devices):
            watched = list(_watched(device.epoll_fd))
            if device.listener_inode not in {inode for _, inode in watched}:
                self._known.discard(device)  # destroyed; the number may be another epoll by now
                continue
            for fd, inode in watched:
                if (sock := _open_socket(fd, inode)) is None:
                    continue
                if _is_listener(sock):
                    sock.close()
                else:
                    yield inode, sock
