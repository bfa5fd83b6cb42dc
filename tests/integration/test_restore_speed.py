"""The promise: a shard comes back at the speed of the link. Holder and restorer are two processes, as on two nodes."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
import time

import pytest

from deadpool_megatron.vault import SlotWriter, Vault, VaultServer, Version, fetch
from deadpool_megatron.vault.wire import Deadlines

SECRET = bytes(range(32))
SIZE = 256 << 20
PATIENT = Deadlines(connect=60.0, idle=60.0)


def _serve() -> None:
    """The holder: the shard through the real server, and the same bytes through a bare socket."""
    vault = Vault(f"h{os.getpid()}", 0)
    writer = SlotWriter(vault.allocate_own(0, SIZE, 4096).path)
    writer.open(0, 1, b"x")
    writer.buffer[:] = 5
    writer.complete()
    while vault.checksum(0):
        pass
    server = VaultServer(vault, SECRET, "127.0.0.1")
    server.start()
    bare = socket.create_server(("127.0.0.1", 0))
    arena = vault.arena(0, "own")
    assert arena is not None
    view = arena.slots[0].unique

    def send(sock: socket.socket) -> None:
        part, parts = sock.recv(2)
        sock.sendall(view[SIZE * part // parts : SIZE * (part + 1) // parts])
        sock.close()

    def accept() -> None:
        while True:
            threading.Thread(target=send, args=(bare.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(server.port, bare.getsockname()[1], flush=True)
    sys.stdin.read()  # until the test closes it
    server.stop()
    vault.close()


def _bare_seconds(port: int, into: memoryview, streams: int) -> float:
    def one(part: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(bytes((part, streams)))
            view = into[SIZE * part // streams : SIZE * (part + 1) // streams]
            while view:
                view = view[sock.recv_into(view) :]

    threads = [threading.Thread(target=one, args=(part,)) for part in range(streams)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


@pytest.mark.perf
@pytest.mark.timeout(240)
def test_a_verified_restore_comes_near_the_loopbacks_throughput() -> None:
    command = [sys.executable, "-c", "import test_restore_speed as t; t._serve()"]
    here = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": here}
    )
    vault = Vault(f"r{os.getpid()}", 1)
    try:
        assert holder.stdout is not None and holder.stdin is not None
        port, bare = map(int, holder.stdout.readline().split())
        vault.allocate_own(0, SIZE, 4096)
        arena = vault.arena(0, "own")
        assert arena is not None
        shares: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(4):  # a machine that does other things too spoils single rounds
            for streams, share in shares.items():
                for _ in range(5):
                    raw = _bare_seconds(bare, arena.slots[1].unique, streams)
                    arena.slots[0].reopen(0)
                    start = time.perf_counter()
                    fetch(vault, SECRET, ("127.0.0.1", port), 0, 0, Version(0, 1), PATIENT, streams)
                    share.append(raw / (time.perf_counter() - start))
                    arena.slots[0].give_up(arena.slots[0].turn)
                    arena.slots[1].give_up(arena.slots[1].turn)
            if statistics.median(shares[2]) >= 0.8:
                break
        for streams, share in shares.items():
            low, middle, high = min(share), statistics.median(share), max(share)
            print(f"{streams} streams: {middle:.2f} of the bare socket's throughput ({low:.2f} to {high:.2f})")
        # What a restore uses. The aim is 0.8; medians of single runs on two cores lie between 0.79 and 0.96.
        assert statistics.median(shares[2]) >= 0.7
        holder.stdin.close()
        holder.wait()
    finally:
        holder.kill()
        vault.close()
