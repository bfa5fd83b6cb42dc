"""Jobs that go on with fewer replicas where no spare is left, and with more when nodes come."""

from __future__ import annotations

import functools
import itertools
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deadpool_megatron.cluster.records.exits import Exit
from jobs import EXAMPLE, ROOT, Job, Jobs, launch_flags


class Shrinking:
    """A job that loses nodes, and the jobs of its widths that it is compared with.

    ``interval``: it has a durable directory, and drains every so many generations; 0: it has none. ``real``: its
    processes are started as a user's are, and not by the tests' fork server.
    """

    def __init__(
        self,
        jobs: Jobs,
        name: str,
        flags: Sequence[str],
        nodes: int,
        slots: int = 1,
        script: Path = EXAMPLE,
        interval: int = 0,
        real: bool = False,
    ) -> None:
        self._jobs = jobs
        self._script = script
        self._name = name
        self._flags = list(flags)
        self._store = jobs.directory / f"{name}-store"
        self._nodes = nodes
        self._slots = slots
        self.joined: list[subprocess.Popen[bytes]] = []
        durable = ["--deadpool-durable-dir", str(self._store), "--deadpool-durable-interval", str(interval)]
        self.job = self._start(
            name, nodes, "--deadpool-when-out-of-spares", "shrink", *durable * bool(interval), real=real
        )

    def _start(self, name: str, nodes: int, *more: str, real: bool = False) -> Job:
        alone = ["--alone"] * (nodes == 1)  # the launcher begins none that nothing protects
        launch = [*launch_flags(nodes, 0, self._slots), *alone]
        extra = {"PYTHONPATH": str(ROOT)} if real else None
        return self._jobs.start(name, launch, [*self._flags, *more], self._script, extra=extra, held=True)

    def join(self) -> None:
        """A node comes, in the background."""
        self.joined.append(self.job.join())

    def shrinks_and_grows(self, spares: int) -> None:
        """Node 1 is lost, and another one joins, so that there are ``spares``; to the job's end."""
        self.lose_node_1()
        self.job.until_event("shrunk")
        self.join()
        self.job.until("the spares", lambda: len(self.job.events("parked")) == spares)
        self.job.hold(8)  # what is committed on the way becomes durable meanwhile
        self.job.until_event("grown")
        self.ended()

    def ended(self) -> None:
        """The job trains to its last iteration, and all nodes leave it."""
        self.job.hold(None)
        self.job.finished(300)
        assert {process.wait() for process in self.joined} <= {Exit.OK, Exit.FAILED}  # those that were lost

    def lose_node_1(self) -> None:
        """With its iteration 2; the others go on to the begin of iteration 4."""
        self.job.arm((1, 2, 2), until=1)
        self.job.hold(4)

    def compare(self) -> list[dict[str, Any]]:
        """Each time that it became narrower, or wider; what it trained at each width is compared bit for bit.

        What it is compared with is a job of each width, which begins with the generation that the one before it has
        made durable: that comes out of files, and what the job itself begins with out of its nodes' memory.
        """
        events = sorted([*self.job.events("shrunk"), *self.job.events("grown")], key=lambda event: event["epoch"])
        widths = [{"epoch": 0, "iteration": 0, "nodes": list(range(self._nodes))}, *events]
        store: Path | None = None
        for number, event in enumerate(widths):
            later = widths[number + 1] if number < len(events) else None
            until = later["epoch"] if later is not None else math.inf
            since = [e for e in self.job.events("iteration") if event["epoch"] <= e["epoch"] < until]
            if later is not None and later["iteration"] == event["iteration"]:
                continue  # it has begun anew before a generation was committed
            want, store = self._alike(number, len(event["nodes"]), store, later and later["iteration"])
            assert number == 0 or {e["replicas"] for e in since} == {event["width"]}
            assert not number or want.exact()[0][0] == since[0]["iteration"] == event["iteration"]
            last = later["iteration"] if later is not None else math.inf  # what came after it was for nothing
            got = [(e["iteration"], e["losses_hex"], e["grad_norm_hex"]) for e in since if e["iteration"] < last]
            assert set(map(str, got)) <= set(map(str, want.exact()))
        assert got[-1] == want.exact()[-1] and self.job.hashes() == want.hashes()
        return events

    def compare_end(self) -> list[int]:
        """What it trained last, from its newest durable generation on, with a job that begins with that; its widths."""
        newest = self.job.events("durable")[-1]
        store = self._jobs.directory / f"{self._name}-newest"
        store.mkdir()
        shutil.copytree(self._store / newest["name"], store / newest["name"])
        nodes = len([*self.job.events("shrunk"), *self.job.events("grown")][-1]["nodes"])
        want, _ = self._alike(0, nodes, store, None)
        assert want.exact()[0][0] == newest["iteration"]
        assert want.exact() == self.job.exact()[-len(want.exact()) :] and self.job.hashes() == want.hashes()
        return [event["replicas"] for event in self.job.events("iteration")]

    def _alike(self, number: int, nodes: int, store: Path | None, end: int | None) -> tuple[Job, Path]:
        """A job of that many nodes, from what is in ``store``, and where its generation ``end`` is durable then.

        A generation is skipped where the one before it is not committed in time, on a busy machine: then another job.
        """
        for attempt in itertools.count():
            name = f"{number}" + f"-{attempt}" * bool(attempt)
            ours = self._jobs.directory / f"{self._name}-store-{name}"
            ours.mkdir()
            for each in store.glob("*/") if store is not None else ():
                shutil.copytree(each, ours / each.name)
            more = ["--deadpool-durable-dir", str(ours), "--deadpool-durable-interval", str(end or 1000)]
            more += ["--deadpool-resume", "auto"] if store is not None else []
            job = self._start(f"{self._name}-{name}", nodes, *more)
            if end is None:
                job.hold(None)
                return job.finished(300), ours
            job.hold(end + 1)
            job.until("its generation", functools.partial(_is_durable_or_skipped, job, end))
            job.kill_everything()
            if _is_durable(job, end):
                break
        return job, ours


def _is_durable(job: Job, generation: int) -> bool:
    return generation in {event["iteration"] for event in job.events("durable")}


def _is_durable_or_skipped(job: Job, generation: int) -> bool:
    """Some generation was skipped, perhaps that one, and all iterations up to it are over."""
    iterations = job.events("iteration")
    over = bool(iterations) and iterations[-1]["iteration"] >= generation
    return _is_durable(job, generation) or (over and iterations[-1]["skipped_generations"] > 0)
