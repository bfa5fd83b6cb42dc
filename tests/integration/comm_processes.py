"""Ranks as real processes for the communicator tests: the driver's side and the worker's side.

A test module is its own worker program: `run(__file__, scenario, ...)` starts `python FILE SCENARIO` once per rank
(and once per spare), hosts the store, reports deaths through it, and collects each worker's result.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deadpool_bench.harness.forking import fork_module
from deadpool_megatron.comm import Communicators
from deadpool_megatron.comm.table import backend_of
from jobs import torch_server
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
OURS = (ROOT, ROOT / "tests", ROOT / "tests" / "integration")
LOOPBACK = "127.0.0.1"
NEVER_S = 3600.0  # longer than any test: what would end only with this deadline is ended by the test's limit, and fails
NO_DEADLINES = {"form_timeout_s": NEVER_S, "operation_timeout_s": NEVER_S}


class Worker:
    """What a scenario gets: who it is, the store, the communicators, and a watcher that aborts on declared faults."""

    def __init__(self) -> None:
        self.spare = os.environ.get("SPARE") == "1"
        self.world = int(os.environ["WORLD_SIZE"])
        self.rank = int(os.environ["RANK"]) if not self.spare else -1
        self.store = self._client()
        self._watch = self._client()
        options = json.loads(os.environ["INSTALL"])
        self.comm = Communicators.install(standby=self.spare, **options)
        self.comm.prepare(self.store)
        self.aborted_at: dict[int, float] = {}
        self.reports: list[Any] = []

    @staticmethod
    def _client() -> dist.TCPStore:
        return dist.TCPStore(LOOPBACK, int(os.environ["STORE"]), None, False, timeout=timedelta(seconds=NEVER_S))

    def become(self, rank: int) -> None:
        """A spare takes a coordinate."""
        self.rank = rank
        os.environ["RANK"] = str(rank)

    def init(self) -> None:
        """WORLD, over the driver's store on active ranks."""
        if self.spare:
            dist.init_process_group("gloo", rank=self.rank, world_size=self.world)
        else:
            store = dist.PrefixStore("first", self._client())
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world)

    def watch(self, start: int = 0) -> None:
        """Abort whenever key fault/<n> appears, n counting up."""

        def loop() -> None:
            n = start
            while True:
                self._watch.wait([f"fault/{n}"], timedelta(seconds=NEVER_S))
                self.aborted_at[n] = time.monotonic()
                self.reports.append(self.comm.abort())
                n += 1

        threading.Thread(target=loop, daemon=True).start()

    def await_abort(self, count: int) -> None:
        """Until the watcher's abort number `count` (from 1) has returned."""
        until(lambda: len(self.reports) >= count, f"abort {count}", 0.001)

    def idle(self) -> None:
        """Until Gloo's threads have put down what is finished: that takes a moment longer than the wait for it."""
        busy = self.comm._waits.release.busy
        until(lambda: all(busy(backend_of(r, "gloo")) == set() for r in self.comm.groups()), "idle threads", 0.001)

    def meet(self, name: str, count: int | None = None) -> None:
        """Barrier over the store, for the tests' own order; not a communicator."""
        want = count or self.world
        if self.store.add(f"meet/{name}", 1) == want:
            self.store.set(f"met/{name}", b"1")
        self.store.wait([f"met/{name}"], timedelta(seconds=NEVER_S))


def until_retired() -> None:
    """Until the background has let go of the backends that the last epochs retired."""
    until(lambda: not any(t.name == "deadpool-retire" for t in threading.enumerate()), "the end of what was retired")


def exchange(groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Point-to-point traffic (alone: a monitored barrier) in each group, so that no epoch can keep it as it is."""
    for group in groups:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        if len(ranks) == 1:
            dist.monitored_barrier(group=group)
            continue
        me = ranks.index(dist.get_rank())
        sent, got = torch.full((2,), float(me)), torch.empty(2)
        ring = [
            dist.P2POp(dist.isend, sent, ranks[(me + 1) % len(ranks)], group),
            dist.P2POp(dist.irecv, got, ranks[(me - 1) % len(ranks)], group),
        ]
        for work in dist.batch_isend_irecv(ring):
            work.wait()
        assert got.eq((me - 1) % len(ranks)).all()


def worker_main(scenarios: dict[str, Callable[[Worker], Any]]) -> None:
    """Entry of a worker process."""
    torch.set_num_threads(1)
    if after := os.environ.get("DUMP_AFTER_S"):
        faulthandler.dump_traceback_later(float(after), exit=False)  # for a person looking for a hang
    worker = Worker()
    try:
        result = {"ok": scenarios[sys.argv[1]](worker)}
    except BaseException:  # noqa: BLE001 - process boundary: the driver shows it
        result = {"error": traceback.format_exc()}
    worker.store.set(f"result/{os.environ['ID']}", json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # old backends may still be ending in the background; nothing here needs them


def run(
    file: str,
    scenario: str,
    *,
    world: int,
    spares: int = 0,
    deaths_are_faults: bool = True,
    install: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
) -> dict[int, Any]:
    """Run one scenario. Returns results by process number (ranks first, then spares); a killed one has none.

    The first death sets key fault/0 (second fault/1 ...), with the dead rank under victim/<n>. Fails on any worker's
    error. The communicators' own deadlines do not end anything, unless ``install`` says so.
    """
    server = dist.TCPStore(LOOPBACK, 0, None, True, wait_for_workers=False, timeout=timedelta(seconds=30))
    base = dict(
        os.environ,
        STORE=str(server.port),
        WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
        TORCHDYNAMO_DISABLE="1",
        PYTHONWARNINGS="ignore",
        TORCH_CPP_LOG_LEVEL="ERROR",
        PYTHONPATH=os.pathsep.join([*map(str, OURS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        INSTALL=json.dumps(NO_DEADLINES | (install or {})),
        **(env or {}),
    )
    processes: dict[int, subprocess.Popen[bytes]] = {}
    for i in range(world + spares):
        mine = dict(base, ID=str(i), RANK=str(i))
        if i >= world:
            mine["SPARE"] = "1"
        if env is None:
            processes[i] = fork_module(str(torch_server().address), file, [scenario], mine)
        else:
            processes[i] = subprocess.Popen([sys.executable, file, scenario], env=mine)
    results: dict[int, Any] = {}
    errors: list[str] = []
    pending = set(processes)
    deaths = 0

    def over() -> bool:
        nonlocal deaths
        for i in sorted(pending):
            code = processes[i].poll()
            if code is None:
                continue
            pending.discard(i)
            if server.check([f"result/{i}"]):
                result = json.loads(server.get(f"result/{i}"))
                if "error" in result:
                    errors.append(f"process {i}:\n{result['error']}")
                else:
                    results[i] = result["ok"]
            elif code == -signal.SIGKILL and deaths_are_faults:
                server.set(f"victim/{deaths}", str(i))
                server.set(f"fault/{deaths}", b"1")
                deaths += 1
            else:
                errors.append(f"process {i} ended with {code} and no result")
        return not pending or bool(errors)

    try:
        until(over, lambda: f"the end of processes {sorted(pending)}", 0.002)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
    assert not errors, "\n".join(errors)
    return results


def kill_self() -> None:
    """Die as a lost node does: no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)
