"""``python -m deadpool_megatron.megatron.timed SCRIPT [ARGS]``, or as a script: SCRIPT with every iteration timed.

For `deadpool bench overhead`. In one process, blocks of iterations with and without what is measured alternate: the
snapshots of DeadPool, or Megatron's own checkpoint of every iteration. Nothing is written before the end.

Read from the environment:

* ``BENCH_TIMED_OUT``: directory that gets ``rank-R.json``
* ``BENCH_TIMED_WHAT``: ``snapshot``, ``checkpoint`` or ``nothing`` (no blocks)
* ``BENCH_TIMED_BLOCK``: iterations a block, ``BENCH_TIMED_WARMUP``: iterations before the first block
* ``BENCH_TIMED_TRACE``: 1 to trace one iteration of rank 0 with torch's profiler (a GPU's timeline), at the end
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["block_is_on", "main"]


def block_is_on(iteration: int, warmup: int, block: int) -> bool:
    """Is the measured thing on in this iteration? Blocks come as on, off, off, on, and again, so that drift cancels."""
    if iteration < warmup:
        return True
    return ((iteration - warmup) // block) % 4 in (0, 3)


def _agent_cpu_s() -> float:
    """CPU seconds of the parent process, which is this node's agent."""
    fields = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class _Recorder:
    out: Path
    what: str
    block: int
    warmup: int
    trace: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    agent_cpu: list[tuple[int, float]] = field(default_factory=list)
    _was_on: bool | None = None
    _profiler: Any = None

    def begin(self, iteration: int) -> None:
        """An iteration begins: switch, then read the clocks."""
        on = self.what != "nothing" and block_is_on(iteration, self.warmup, self.block)
        self._note()
        if on != self._was_on:
            self._switch(on)
            self._was_on = on
            self.agent_cpu.append((iteration, _agent_cpu_s()))
        if _is_last(iteration) and _trainer() is not None:
            _trainer().trace()
        self.rows.append({"iteration": iteration, "on": on, "begin": time.perf_counter(), "cpu": time.process_time()})

    def _note(self) -> None:
        """What DeadPool says of the iteration that has just ended."""
        trainer = _trainer()
        if self.rows and trainer is not None:
            self.rows[-1]["account"] = trainer.account()

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
                _remove_checkpoints(Path(args.save))

    def end(self) -> None:
        """Write everything."""
        self._note()
        rank = int(os.environ["RANK"])
        self.out.mkdir(parents=True, exist_ok=True)
        trainer = _trainer()
        content = {
            "rank": rank,
            "what": self.what,
            "end": time.perf_counter(),
            "cpu_end": time.process_time(),
            "rows": self.rows,
            "agent_cpu": [*self.agent_cpu, (len(self.rows), _agent_cpu_s())],
            "timeline": trainer.traced() if trainer is not None else None,
        }
        (self.out / f"rank-{rank}.json").write_text(json.dumps(content))


def _remove_checkpoints(directory: Path) -> None:
    """All but the newest."""
    for old in sorted(directory.glob("iter_*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def _trainer() -> Any:
    from deadpool_megatron.megatron.trainer import MegatronTrainer

    return MegatronTrainer.latest


def _timed(train_step: Callable[..., Any], recorder: _Recorder) -> Callable[..., Any]:
    import inspect

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
        recorder.out.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(recorder.out / "trace.json.gz"))
        return result

    return timed


def _is_last(iteration: int) -> bool:
    from megatron.training import get_args

    return bool(iteration + 1 == get_args().train_iters)


def main() -> None:
    """Run the script named on the command line, timed."""
    env = os.environ
    recorder = _Recorder(
        Path(env["BENCH_TIMED_OUT"]),
        env["BENCH_TIMED_WHAT"],
        int(env["BENCH_TIMED_BLOCK"]),
        int(env["BENCH_TIMED_WARMUP"]),
        env.get("BENCH_TIMED_TRACE") == "1",
    )
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    from megatron.training import training

    training.train_step = _timed(training.train_step, recorder)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if recorder.rows:
            recorder.end()


if __name__ == "__main__":
    main()
