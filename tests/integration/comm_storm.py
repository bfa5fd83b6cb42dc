"""Aborts in a row at random moments of whatever a job is doing. For a job of any kind, Megatron's too:

storm = AbortStorm(comm, client, rank, world, count=200, seed=1)   # client: () -> a new TCPStore client
storm.start()
while not storm.over:
    try:
        train_step()
    except RuntimeError:
        storm.recover()       # waits for this rank's abort, re-forms; then put the state back and go on
"""

import random
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from comm_processes import NEVER_S
from deadpool_megatron.comm import Communicators
from deadpool_megatron.comm.reports import ReformReport


class AbortStorm:
    """Epochs `first_epoch` ... `first_epoch + count - 1`, each begun by an abort on all ranks at the same moment.

    Rank 0 decides when (`pause_s`, drawn from `seed`, after all have recovered from the one before).
    """

    def __init__(
        self,
        comm: Communicators,
        client: Callable[[], dist.TCPStore],
        rank: int,
        world: int,
        *,
        count: int,
        seed: int,
        first_epoch: int = 1,
        pause_s: tuple[float, float] = (0.0, 0.3),
    ) -> None:
        self.over = False
        self.freed_s: list[float] = []
        """Seconds from each abort until the training thread called `recover`."""
        self.reforms: list[ReformReport] = []
        self.aborts: list[Any] = []
        self._comm, self._rank, self._world = comm, rank, world
        self._epochs = range(first_epoch, first_epoch + count)
        self._random, self._pause = random.Random(seed), pause_s
        self._store, self._watch, self._decide = client(), client(), client()
        self._aborted = {epoch: threading.Event() for epoch in self._epochs}
        self._aborted_at: dict[int, float] = {}

    def start(self) -> None:
        threading.Thread(target=self._watcher, daemon=True).start()
        if self._rank == 0:
            threading.Thread(target=self._decider, daemon=True).start()

    def _decider(self) -> None:
        for epoch in self._epochs:
            time.sleep(self._random.uniform(*self._pause))
            self._decide.set(f"storm/{epoch}", b"1")
            self._decide.wait([f"storm/{epoch}/recovered"], timedelta(seconds=NEVER_S))

    def _watcher(self) -> None:
        for epoch in self._epochs:
            self._watch.wait([f"storm/{epoch}"], timedelta(seconds=NEVER_S))
            self._aborted_at[epoch] = time.monotonic()
            self.aborts.append(self._comm.abort())
            self._aborted[epoch].set()

    def recover(self) -> None:
        """On the training thread, after any communication error. Blocks until this rank's abort came and all ranks
        re-formed. `over` is set by the last one."""
        now = time.monotonic()
        epoch = self._epochs[len(self.reforms)]
        if not self._aborted[epoch].wait(60):
            raise AssertionError(f"epoch {epoch}: an operation failed without an abort")
        self.freed_s.append(now - self._aborted_at[epoch])
        self.reforms.append(self._comm.reform(epoch, self._store))
        if self._store.add(f"storm/{epoch}/count", 1) == self._world:
            self._store.set(f"storm/{epoch}/recovered", b"1")
        self.over = epoch == self._epochs[-1]
