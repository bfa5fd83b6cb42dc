"""``python -m deadpool_bench.timed SCRIPT [ARGS]``, or as a script: SCRIPT with every iteration timed.

For `deadpool bench overhead`. In one process, blocks of iterations with and without what is measured alternate: the
snapshots of DeadPool, or Megatron's own checkpoint of every iteration. Each rank appends a line of JSON to its file
when a block is over, between two iterations and counted in neither, so that a job that is ended loses its last block::

    {"block": 0, "on": true, "agent": 4711, "agent_s": 0.12, "rows": [{"iteration": 10, "seconds": 0.3, "cpu": 0.29}]}

``block`` is -1 for the warm-up. ``agent_s`` is CPU seconds of the node's agent, whose process id is ``agent``; ``cpu``
this process's. With snapshots a row has an ``account`` too. The last line has the ``timeline`` of the last iteration,
which is not measured. Nothing is written once the job was disturbed: a process that begins an iteration again, or has
the place of another one, would measure a recovery.

Read from the environment:

* ``BENCH_TIMED_OUT``: directory that gets ``rank-R.jsonl``, empty when the job begins
* ``BENCH_TIMED_WHAT``: ``snapshot``, ``checkpoint`` or ``nothing`` (no blocks)
* ``BENCH_TIMED_BLOCK``: iterations a block, ``BENCH_TIMED_WARMUP``: iterations before the first block
* ``BENCH_TIMED_TRACE``: 1 to trace one iteration of rank 0 with torch's profiler (a GPU's timeline), at the end
* ``BENCH_TIMED_CORES``: processors this process moves to, as in ``0-3,8``, and after a colon those of the thread that
  copies into the vault; without it, all stay where they are
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import runpy
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deadpool_megatron.cluster.agent.pinning import pin_threads
from deadpool_megatron.snapshot.engine import COPIER, CopyTotals
from deadpool_megatron.vault import parse_cpus


def block_is_on(iteration: int, warmup: int, block: int) -> bool:
    """Is the measured thing on in this iteration? Blocks come as on, off, off, on, and again, so that drift cancels."""
    if iteration < warmup:
        return True
    return ((iteration - warmup) // block) % 4 in (0, 3)


def _agent_cpu_s() -> float:
    """CPU seconds of the parent process, which is this node's agent."""
    fields = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Timeline:
    """When passes begin, and when slices land in the vault, in the next iteration of a trainer; seconds, bytes.

    Attributes:
        marks: (moment, what begins) of the training thread.
        copies: (begin, end, bytes) of each slice.
    """

    def __init__(self, trainer: Any) -> None:
        self.marks: list[tuple[float, str]] = []
        self.copies: list[tuple[float, float, int]] = []
        marked = {
            "begin": (trainer, "begin"),
            "forward": (trainer, "tick"),
            "gate": (trainer._snapshotter, "gate"),
            "end": (trainer, "end"),
        }
        for what, (owner, name) in marked.items():
            setattr(owner, name, self._marking(what, getattr(owner, name)))
        trainer._engine.totals = _Landings(trainer._engine.totals, self.copies)

    def _marking(self, what: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            if not self.marks or self.marks[-1][1] != "end":  # after that the gate is passed once more
                self.marks.append((time.perf_counter(), "backward" if kwargs.get("backward") else what))
            return method(*args, **kwargs)

        return marked


class _Landings(CopyTotals):
    """An engine's totals, which grow by a slice's bytes and then by its time."""

    def __init__(self, totals: CopyTotals, copies: list[tuple[float, float, int]]) -> None:
        self._copies: list[tuple[float, float, int]] | None = None
        super().__init__(**asdict(totals))
        self._before, self._copies = self.landed_bytes, copies

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "busy_s" and self._copies is not None:
            now = time.perf_counter()
            self._copies.append((now - (value - self.busy_s), now, self.landed_bytes - self._before))
            self._before = self.landed_bytes
        super().__setattr__(name, value)


@dataclass(slots=True)
class _Recorder:
    out: Path
    what: str
    block: int
    warmup: int
    trace: bool
    copier: str  # processors of the thread that copies into the vault; empty: where the others are
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _number: int = -2  # of the block; none has begun
    _on: bool | None = None
    _agent_s: float = 0.0
    _began: tuple[int, float, float] | None = None
    _timeline: _Timeline | None = None
    _path: Path | None = None  # None once the job was disturbed

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"rank-{os.environ['RANK']}.jsonl"
        self._path = None if path.exists() else path
        if self._path:
            self._path.touch()

    def begin(self, iteration: int) -> None:
        """An iteration begins: account for the one before, switch, then read the clocks."""
        if self._began and iteration <= self._began[0]:
            self._path = None
        self._ended()
        number = max(-1, (iteration - self.warmup) // self.block)
        if number != self._number:
            if self._rows:
                agent_s = _agent_cpu_s()
                self._write(block=self._number, on=self._on, agent_s=agent_s - self._agent_s, rows=self._rows)
            on = self.what != "nothing" and block_is_on(iteration, self.warmup, self.block)
            if on != self._on:
                self._switch(on)
            self._move_copier()
            self._rows, self._number, self._on, self._agent_s = [], number, on, _agent_cpu_s()
        if _is_last(iteration) and _trainer() is not None:
            self._timeline = _Timeline(_trainer())
        self._began = (iteration, time.perf_counter(), time.process_time())

    def _move_copier(self) -> None:
        for thread in threading.enumerate() if self.copier else ():
            if thread.name == COPIER and thread.native_id is not None:
                os.sched_setaffinity(thread.native_id, parse_cpus(self.copier))

    def _ended(self) -> None:
        """The iteration that has begun is over: its times, and what DeadPool says of it."""
        if self._began is None:
            return
        iteration, wall, cpu = self._began
        row = {"iteration": iteration, "seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        trainer = _trainer()
        self._rows.append(row if trainer is None else {**row, "account": trainer.account()})

    def _switch(self, on: bool) -> None:
        if self.what == "snapshot":
            trainer = _trainer()
            if trainer is not None:
                trainer.paused = not on
        elif self.what == "checkpoint":
            from megatron.training import get_args

            args = get_args()
            args.save_interval = 1 if on else None
            if not on and args.rank == 0:
                for old in sorted(Path(args.save).glob("iter_*"))[:-1]:  # all but the newest
                    shutil.rmtree(old, ignore_errors=True)

    def end(self) -> None:
        """Write the timeline, if there is one."""
        if self._timeline is not None:
            self._write(timeline={"marks": self._timeline.marks, "copies": self._timeline.copies})

    def _write(self, **what: Any) -> None:
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps({"agent": os.getppid(), **what}) + "\n")


def _trainer() -> Any:
    from deadpool_megatron.megatron.trainer import MegatronTrainer

    return MegatronTrainer.latest


def _timed(train_step: Callable[..., Any], recorder: _Recorder) -> Callable[..., Any]:
    signature = inspect.signature(train_step)

    @functools.wraps(train_step)
    def timed(*args: Any, **kwargs: Any) -> Any:
        iteration = signature.bind(*args, **kwargs).arguments["iteration"]
        recorder.begin(iteration)
        if not (recorder.trace and _is_last(iteration) and int(os.environ["RANK"]) == 0):
            return train_step(*args, **kwargs)
        import torch

        with torch.profiler.profile() as profile:
            result = train_step(*args, **kwargs)
        profile.export_chrome_trace(str(recorder.out / "trace.json.gz"))
        return result

    return timed


def _is_last(iteration: int) -> bool:
    from megatron.training import get_args

    return bool(iteration + 1 == get_args().train_iters)


def main() -> None:
    """Run the script named on the command line, timed."""
    env = os.environ
    cores, _, copier = env.get("BENCH_TIMED_CORES", "").partition(":")
    recorder = _Recorder(
        Path(env["BENCH_TIMED_OUT"]),
        env["BENCH_TIMED_WHAT"],
        int(env["BENCH_TIMED_BLOCK"]),
        int(env["BENCH_TIMED_WARMUP"]),
        env.get("BENCH_TIMED_TRACE") == "1",
        copier,
    )
    if cores:
        pin_threads(parse_cpus(cores))
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    from megatron.training import training

    training.train_step = _timed(training.train_step, recorder)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        recorder.end()


if __name__ == "__main__":
    main()
