"""A node's vault in a process of its own, driven over its standard input; for tests of transfers between processes.

One JSON list a line: a method of `_Node` and its arguments; one JSON value a line comes back, ``{"error": ...}`` with
the name and the message when a VaultError was raised. ``run`` says how to start one.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from deadpool_megatron.vault import Replicator, SlotWriter, Target, Vault, VaultError, VaultServer, Version
from deadpool_megatron.vault.direct import Direct
from deadpool_megatron.vault.errors import DirectFailed
from deadpool_megatron.vault.transfer import fetch
from deadpool_megatron.vault.wire import Deadlines

SECRET = bytes(range(32))
NEVER_S = 3600.0  # longer than any test


def content(seed: int, size: int) -> np.ndarray:
    """The unique state of a generation in these tests."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def failures(replicator: Replicator) -> dict[int, str]:
    """Why the last attempt to send failed, by rank; ranks whose last attempt went well have no entry."""
    with replicator._changed:
        return {s.rank: s.failure for senders in replicator._senders.values() for s in senders if s.failure}


class _Node:
    def __init__(self, number: int, chunk_bytes: int, direct: bool, patience_s: float) -> None:
        self.deadlines = Deadlines(connect=patience_s, idle=patience_s, backoff=0.02, backoff_limit=0.1, late=0.0)
        self.direct = Direct(f"node-{number}-{os.getpid()}") if direct else None
        self.vault = Vault(f"d{os.getppid()}", number, chunk_bytes=chunk_bytes)
        self.server = VaultServer(self.vault, SECRET, "127.0.0.1", deadlines=self.deadlines, direct=self.direct)
        self.server.start()
        self.commits: queue.Queue[tuple[int, int, int]] = queue.Queue()
        self.replicator = Replicator(
            self.vault, SECRET, lambda *c: self.commits.put(c), self.deadlines, direct=self.direct
        )
        self.writers: dict[int, SlotWriter] = {}

    def port(self) -> int:
        return self.server.port

    def write(self, rank: int, unique: int, generation: int, share: float = 1.0, epoch: int = 0) -> bool:
        """Write a generation, or the first part of one."""
        if rank not in self.writers:
            self.writers[rank] = SlotWriter(self.vault.allocate_own(rank, unique, 4096).path)
        writer = self.writers[rank]
        if writer.open(epoch, generation, b"small state of %d" % generation) is None:
            return False
        writer.buffer[:] = content(generation, unique)
        if share < 1.0:
            writer.publish(int(share * unique))
        else:
            writer.complete()
        self.replicator.notify(rank)
        return True

    def rewrite(self, rank: int, unique: int, generations: int) -> list[int]:
        """Generation after generation as a worker writes them, whatever is read of them; those that were committed."""
        for generation in range(generations):
            writer = self.writers[rank]
            while writer.open(0, generation, b"g%d" % generation) is None:
                time.sleep(0.001)
            writer.buffer[:] = generation % 251
            writer.publish(unique)
            self.replicator.notify(rank)
            time.sleep(0.002 * (generation % 5))
        writer.complete()
        self.replicator.notify(rank)
        done = [self.commits.get()[2]]
        while not self.commits.empty():
            done.append(self.commits.get()[2])
        return done

    def targets(self, epoch: int, rank: int, *ports: int) -> None:
        self.replicator.set_targets(epoch, {rank: [Target("127.0.0.1", port) for port in ports]})

    def committed(self) -> list[int]:
        """The next commit."""
        return list(self.commits.get())

    def set_committed(self, epoch: int, generation: int) -> None:
        self.vault.set_committed(epoch, generation)

    def set_epoch(self, epoch: int) -> None:
        self.server.set_epoch(epoch)

    def plan(self, rank: int, unique: int) -> None:
        self.server.set_plan({rank: unique})

    def fetch(self, port: int, rank: int, epoch: int, version_epoch: int, generation: int) -> int:
        place = ("127.0.0.1", port)
        return fetch(
            self.vault,
            SECRET,
            place,
            rank,
            epoch,
            Version(version_epoch, generation),
            self.deadlines,
            direct=self.direct,
        )

    def drop(self, rank: int) -> None:
        self.vault.drop(rank)

    def reserve(self, rank: int, unique: int, peer: bool) -> None:
        """Take the memory ahead."""
        self.vault.drop(rank)
        if peer:
            self.vault.allocate_peer(rank, unique, 4096)
        else:
            self.vault.allocate_own(rank, unique, 4096)

    def forget(self, rank: int) -> None:
        """The worker of ``rank`` is gone."""
        self.writers.pop(rank).close()

    def held(self, rank: int) -> list[list[Any]]:
        return [[h.epoch, h.generation, h.kind] for h in self.vault.holdings().ranks.get(rank, ())]

    def arenas(self) -> list[list[Any]]:
        return [[a.info.rank, a.info.kind] for a in self.vault.arenas()]

    def equal(self, rank: int, kind: Any, epoch: int, generation: int) -> bool:
        """Whether a held version is, byte for byte, what its owner wrote."""
        arena, slot = self.vault.find(rank, Version(epoch, generation), (kind,))
        small = bytes(slot.small[: slot.small_bytes])
        same = np.array_equal(np.frombuffer(slot.unique, np.uint8), content(generation, arena.info.unique_bytes))
        slot.verify()
        return same and small == b"small state of %d" % generation

    def bytes_read(self) -> int:
        return self.direct.bytes_read if self.direct is not None else -1

    def lost(self) -> int:
        """How much memory is kept for reads that have not ended, once another is registered."""
        assert self.direct is not None
        for arena in self.vault.arenas():
            self.direct.region(arena)
        return len(self.direct.lost)

    def failures(self, rank: int) -> str:
        return failures(self.replicator).get(rank, "")

    def refusals(self) -> dict[str, int]:
        return self.server.refusals

    def break_windows(self, by: int) -> None:
        """From now on this node's windows are wrong by so many bytes: as of an owner gone mad."""
        assert self.direct is not None
        good = self.direct.window

        def bad(*args: Any) -> Any:
            window = good(*args)
            return type(window)(window.agent, window.number, window.small, window.unique + by)

        self.direct.window = bad  # type: ignore[method-assign]

    def break_registration(self) -> None:
        """From now on no memory of this node can be registered, as when the limit of locked memory is too low."""
        assert self.direct is not None

        def fails(arena: Any) -> Any:
            raise DirectFailed(f"{arena.path} cannot be registered")

        self.direct.region = fails  # type: ignore[method-assign]

    def stop_when_read(self) -> None:
        """This process stops (SIGSTOP) as soon as somebody has its window."""
        assert self.direct is not None
        receive = self.direct.receive

        def stop(channel: Any) -> Any:
            os.kill(os.getpid(), signal.SIGSTOP)
            return receive(channel)

        self.direct.receive = stop  # type: ignore[method-assign]

    def close(self) -> None:
        self.replicator.stop()
        self.server.stop()
        self.vault.close()


def main(number: int, chunk_bytes: int, direct: int, patience_s: float) -> None:
    node = _Node(number, chunk_bytes, bool(direct), patience_s)
    print(json.dumps(node.port()), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = getattr(node, name)(*arguments)
        except VaultError as err:
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps(answer), flush=True)
    node.close()


class NodeProcess:
    """A node in another process; its methods are those of `_Node`."""

    def __init__(
        self,
        number: int,
        chunk_bytes: int = 1 << 16,
        direct: bool = True,
        ucx: str = "tcp",
        patience_s: float = NEVER_S,
    ) -> None:
        """``patience_s``: after which it takes for lost who says nothing."""
        here = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
        code = f"import vault_processes as v; v.main({number}, {chunk_bytes}, {int(direct)}, {patience_s})"
        env = os.environ | {"PYTHONPATH": here, "UCX_TLS": ucx, "UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.port = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue  # a line of some library
        raise AssertionError(f"node ended with {self.process.wait(10)}")

    def tell(self, name: str, *arguments: Any) -> None:
        """Call a method and do not wait; the answer must be taken with `answer`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        return self._answer()

    def __call__(self, name: str, *arguments: Any) -> Any:
        self.tell(name, *arguments)
        answer = self._answer()
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Let it free its memory; kill it when it does not."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
