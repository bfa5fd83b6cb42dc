"""Several `deadpool agent` commands, each as if on a machine of its own; the run directory is shared.

Waits end with the test's own limit, and `Machines.end` leaves none of their processes behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from deadpool_bench.harness.jobs import describe
from deadpool_bench.harness.ports import free_ports
from deadpool_megatron.jobs.descendants import Descendants
from deadpool_megatron.jobs.job import CLI
from jobs import Job, environment, set_pace
from waiting import until

__all__ = ["Machines", "MachinesJob", "free_port", "torchrun_environments"]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    (port,) = free_ports(1)
    return port


class Machines:
    """The commands of one job, numbered as they were started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "runs" / "latest"
        self.port = free_port()
        self.started: list[subprocess.Popen[bytes]] = []
        self.descendants = Descendants()
        self.pace = directory / "pace"  # of `PACED`
        set_pace(self.pace, 0)
        self._of_each: list[Descendants] = []

    def start(
        self,
        options: Sequence[str],
        script: Sequence[str],
        env: dict[str, str] | None = None,
        command: str = "agent",
        prefix: Sequence[str] = (),
    ) -> None:
        """Start the next one; ``prefix`` makes it run somewhere else."""
        # A fork server is in the network of the tests.
        cli = CLI if prefix else (sys.executable, "-m", "deadpool_bench.harness.forking")
        self.start_command([*prefix, *cli, command, *options, *script], env, forked=not prefix)

    def start_command(self, command: Sequence[str], env: dict[str, str] | None = None, forked: bool = False) -> None:
        """Start any command as the next one; ``forked``: as of `jobs.environment`."""
        self._of_each.append(mine := Descendants(self.descendants))
        with open(self.directory / f"machine-{len(self.started)}.out", "wb") as out:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(env, forked) | {"PACE_FILE": str(self.pace)} | mine.environment,
                cwd=self.directory,
                start_new_session=True,
            )
        self.started.append(process)

    def output(self, number: int) -> str:
        """Everything a command and what it started wrote to the terminal."""
        return (self.directory / f"machine-{number}.out").read_text(errors="replace")

    def until(self, what: str, find: Callable[[], Any]) -> Any:
        """Poll until ``find`` gives something."""
        return until(find, lambda: f"{what}\n{self.outputs()}", 0.05)

    def outputs(self) -> str:
        """All outputs, for a failure's message."""
        return "\n".join(f"machine {n}:\n{self.output(n)[-3000:]}" for n in range(len(self.started)))

    def code(self, number: int) -> int:
        """The exit code of one of them."""
        process = self.started[number]
        self.until(f"end of machine {number}", lambda: process.poll() is not None)
        assert process.returncode is not None
        return process.returncode

    def codes(self) -> list[int]:
        """The exit codes of all."""
        return [self.code(number) for number in range(len(self.started))]

    def processes(self) -> list[psutil.Process]:
        """All commands and everything they have started that lives."""
        return self.descendants.living()

    def kill_tree(self, number: int) -> None:
        """A machine is gone: SIGKILL for the command and everything under it, as one blow."""
        everyone = self._of_each[number].living()
        for blow in (psutil.Process.suspend, psutil.Process.kill):  # nobody hears of another's end
            for each in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    blow(each)

    def until_gone(self) -> None:
        """Until none of their processes lives."""
        alive = self.descendants.living
        until(lambda: not alive(), lambda: f"the end of {[describe(p) for p in alive()]}", 0.05)

    def end(self) -> None:
        """End whatever is left, each process by its id."""
        for command in self.started:
            if command.poll() is None:
                command.send_signal(signal.SIGTERM)
        for command in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(20)
        self.descendants.kill(10)
        for command in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(10)


class MachinesJob(Job):
    """The job of some machines, to be looked at like any other; they start and end it."""

    def __init__(self, machines: Machines) -> None:
        self.run_dir = machines.run_dir
        self.hash_file = Path(f"{machines.run_dir}.hash.json")
        self.process = machines.started[0]
        self._out = machines.directory / "machine-0.out"
        self._environment = environment({"PACE_FILE": str(machines.pace)}, forked=True)
        self._descendants = machines.descendants


def torchrun_environments(
    directory: Path, lines: Sequence[Sequence[str]], script: Sequence[str], count: int
) -> list[dict[str, object]]:
    """What the workers of real torchruns found (``env-RANK`` beside the script), which are then removed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *line, *script],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for line in lines
    ]
    try:
        assert [p.wait() for p in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
    files = [directory / f"env-{rank}" for rank in range(count)]
    out = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return out
