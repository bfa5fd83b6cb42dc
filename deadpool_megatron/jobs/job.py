"""Whole jobs, started through the real `deadpool` command, watched through their run directory, ended by process id.

There is one way to start a job from a program; the demo's is this, and what measures and tests jobs adds to it. Every
wait has a deadline, and whatever its user does, `Job.end` leaves none of the job's processes behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from deadpool_megatron.jobs.descendants import Descendants
from deadpool_megatron.observe import EVENTS, STATUS, follow_events

CLI = (sys.executable, "-m", "deadpool_megatron.cli")
_END_S = 40.0
_KILL_S = 10.0
_POLL_S = 0.02


def start_cli(
    arguments: Sequence[str], environment: Mapping[str, str], directory: Path | None = None, **streams: Any
) -> subprocess.Popen[Any]:
    """Start a `deadpool` command; ``streams`` as of Popen.

    In a session of its own: Ctrl-C reaches only the caller, which then ends the command in order.
    """
    return subprocess.Popen(
        [*CLI, *arguments], stdin=subprocess.DEVNULL, env=environment, cwd=directory, start_new_session=True, **streams
    )


class JobError(RuntimeError):
    """A job did not do what it should; the message is one line."""


class Job:
    """One `deadpool launch` in a subprocess. A context manager: whatever happens, the job is ended.

    Args:
        run_dir: its run directory; what the launcher and all below it write goes to a file beside it, ``.out``.
        launch: options of `deadpool launch`, without ``--run-dir`` and ``--tee``.
        script: the training script and its arguments.
        environment: the launcher's, this process's own when None.
        directory: where the launcher runs, here when None.

    Attributes:
        clock: seconds, for all deadlines; a subclass may have another one.
        start: starts a `deadpool` command, as `start_cli`; a subclass may have another one.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)
    start: Callable[..., subprocess.Popen[Any]] = staticmethod(start_cli)

    def __init__(
        self,
        run_dir: Path,
        launch: Sequence[str],
        script: Sequence[str],
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._out = Path(f"{run_dir}.out")
        self._descendants = Descendants()
        self._environment = dict(os.environ if environment is None else environment) | self._descendants.environment
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        for name in (EVENTS, STATUS):  # of an older run; they would be taken for this one's
            (run_dir / name).unlink(missing_ok=True)
        with open(self._out, "wb") as out:
            self.process = self.start(
                ["launch", "--run-dir", str(run_dir), "--tee", "none", *launch, *script],
                self._environment,
                directory,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.end()

    def failed(self, what: str) -> NoReturn:
        """Say that the job has not done what it should. Raises JobError."""
        raise JobError(f"the job of {self.run_dir}: {what}; see its logs")

    # ---- what can be seen

    @property
    def output(self) -> str:
        """Everything the launcher, the coordinator and the agents wrote."""
        return self._out.read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        """The content of ``status.json``. Raises FileNotFoundError before it is there."""
        status: dict[str, Any] = json.loads((self.run_dir / STATUS).read_text())
        return status

    def follow(self, silence_s: float) -> Iterator[dict[str, Any]]:
        """Events as they come, until the job has ended. Raises JobError after a long silence."""
        heard = [self.clock()]

        def alive() -> bool:
            if self.clock() - heard[0] > silence_s:
                self.failed(f"no event within {silence_s:g} s")
            return self.process.poll() is None

        for event in follow_events(self.run_dir, alive, _POLL_S):
            heard[0] = self.clock()
            yield event

    # ---- what can be done

    def until(self, what: str, find: Callable[[], Any], deadline_s: float) -> Any:
        """Poll until ``find`` gives something; `failed` when the job ends first or the deadline passes."""
        end = self.clock() + deadline_s
        while True:
            ended = self.process.poll() is not None  # before looking: what came with the end is found
            found = find()
            if found:
                return found
            if ended:
                self.failed(f"ended ({self.process.returncode}) before {what}")
            if self.clock() > end:
                self.failed(f"no {what} within {deadline_s:g} s")
            time.sleep(_POLL_S)

    def command(self, name: str, *options: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a real `deadpool` command on the job, to its end, whatever that is."""
        line = [name, "--run-dir", str(self.run_dir), *options]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
            code = self.start(line, self._environment, stdout=out, stderr=error).wait(timeout_s)
            out.seek(0)
            error.seek(0)
            return subprocess.CompletedProcess(["deadpool", *line], code, out.read(), error.read())

    def inject(self, node: int, iteration: int, tick: int, *more: str) -> list[str]:
        """Arm a fault with the real `deadpool inject`; returns the command. `failed` when it is refused."""
        at = ["--at-iteration", str(iteration), "--at-tick", str(tick)]
        done = self.command("inject", "--node", str(node), *at, *more, timeout_s=60.0)
        if done.returncode:
            self.failed(f"the fault was refused: {done.stderr.strip()}")
        return list(done.args)

    def end(self, grace_s: float = _END_S) -> None:
        """Interrupt the job, give it so many seconds, and end whatever is left, each process by its id."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        self._descendants.kill(_KILL_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_S)
