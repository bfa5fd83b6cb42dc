"""Find and end the connections of Gloo, from outside of Gloo.

Nothing in torch ends a Gloo operation from another thread. Shutting down its sockets does (when every rank does it).
A Gloo device is one epoll descriptor watched by one thread, with its listening socket in it. So a device is known by
(epoll descriptor, inode of the listener), and what /proc/self/fdinfo says the epoll watches *now* are exactly the
connections to end: no list of descriptors to keep, no danger of hitting another library's socket through a reused
descriptor number. Listening sockets are left alone: shutting one down ends the process (std::terminate in Gloo).
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GlooDevice:
    """One Gloo event loop of this process."""

    epoll_fd: int
    listener_inode: int


def _watched(epoll_fd: int) -> Iterator[tuple[int, int]]:
    """(descriptor, inode) of everything an epoll descriptor watches; nothing if it is closed by now."""
    try:
        with open(f"/proc/self/fdinfo/{epoll_fd}", encoding="ascii") as info:
            lines = info.readlines()
    except OSError:
        return
    for line in lines:
        fields = line.replace(":", " ").split()  # "tfd: 7 events: 19 data: 55d0 pos:0 ino:1f2e sdev:8"
        if fields[:1] == ["tfd"] and "ino" in fields:
            yield int(fields[1]), int(fields[fields.index("ino") + 1], 16)


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
    """The Gloo devices of this process, and the end of their connections."""

    def __init__(self) -> None:
        self._known: set[GlooDevice] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Devices that appear inside the block are Gloo's: put it around whatever creates a Gloo backend or device."""
        before = _devices()
        try:
            yield
        finally:
            self._known |= _devices() - before

    def shutdown(self) -> int:
        """Shut down all connections of all devices, from any thread. Never blocks. Returns how many."""
        count = 0
        for device in list(self._known):
            watched = list(_watched(device.epoll_fd))
            if device.listener_inode not in {inode for _, inode in watched}:
                self._known.discard(device)  # destroyed; the number may be another epoll by now
                continue
            for fd, inode in watched:
                if (sock := _open_socket(fd, inode)) is None:
                    continue
                with sock:
                    try:
                        if not _is_listener(sock):
                            sock.shutdown(socket.SHUT_RDWR)
                            count += 1
                    except OSError:
                        pass  # not connected (yet, or any more)
        return count
