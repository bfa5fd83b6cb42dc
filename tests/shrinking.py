"""Jobs that go on with fewer replicas where no spare is left, and with more when nodes come."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deadpool_megatron.cluster.records.exits import Exit
from jobs import EXAMPLE, Job, Jobs, launch_flags


class Shrinking:
    """A job that loses nodes, and those that begin at its widths with what was durable then."""

    def __init__(
        self, jobs: Jobs, name: str, flags: Sequence[str], nodes: int, slots: int = 1, script: Path = EXAMPLE
    ) -> None:
        self._jobs = jobs
        self._script = script
        self._name = name
        self._flags = list(flags)
        self._slots = slots
        self._store = jobs.directory / f"{name}-store"
        self.joined: list[subprocess.Popen[bytes]] = []
        self.job = self._start(name, nodes, self._store, "--deadpool-when-out-of-spares", "shrink", held=True)

    def _start(self, name: str, nodes: int, store: Path, *more: str, held: bool = False) -> Job:
        alone = ["--alone"] * (nodes == 1)  # the launcher begins none that nothing protects
        ours = ["--deadpool-durable-dir", str(store), "--deadpool-durable-interval", "1000", *more]
        return self._jobs.start(
            name, [*launch_flags(nodes, 0, self._slots), *alone], [*self._flags, *ours], self._script, held=held
        )

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

    def from_the_same(self, event: dict[str, Any]) -> Job:
        """A run of that width that begins with that generation."""
        store = self._jobs.directory / f"{self._name}-store-{event['width']}"
        store.mkdir()
        for file in self._store.iterdir():
            other = file.name.startswith("generation-") and int(file.name.split("-")[1]) != event["iteration"]
            if file.is_dir() and not other:
                shutil.copytree(file, store / file.name)
        name, nodes = f"{self._name}-at-{event['width']}", len(event["nodes"])
        return self._start(name, nodes, store, "--deadpool-resume", "auto").finished(300)

    def compare(self, newest: int = 9) -> list[dict[str, Any]]:
        """Each time that it became narrower, or wider; what came after each of the ``newest`` is compared."""
        events = sorted([*self.job.events("shrunk"), *self.job.events("grown")], key=lambda event: event["epoch"])
        for event in events[-newest:]:
            want = self.from_the_same(event)
            last = event is events[-1]
            epochs = [e["epoch"] for e in events if e["epoch"] > event["epoch"]] or [1 << 30]
            since = [e for e in self.job.events("iteration") if event["epoch"] <= e["epoch"] < min(epochs)]
            assert {e["replicas"] for e in since} == {event["width"]}
            got = [(e["iteration"], e["losses_hex"], e["grad_norm_hex"]) for e in since]
            assert got and got[0][0] == event["iteration"] == want.exact()[0][0]
            assert set(map(str, got)) <= set(map(str, want.exact()))
            if last:
                assert got[-1] == want.exact()[-1] and self.job.hashes() == want.hashes()
        return events
