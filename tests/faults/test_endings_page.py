"""Every ending and every class of failure, as a person sees it: on the terminal, in status, recoveries.log and report.

``ENDINGS_PAGE=docs/endings.md pytest -m slow tests/faults/test_endings_page.py`` writes them down as one page.
"""

from __future__ import annotations

import html
import json
import os
import re
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deadpool_megatron.cluster.records.exits import Exit, what_to_do
from deadpool_megatron.observe import ERROR
from deadpool_megatron.observe.rundir import RECOVERIES
from flags import duo_gpt
from jobs import EXAMPLE, ROOT, Job, Jobs, launch_flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_LINES = 10
_HEAD = """# Every ending, as a person sees it

Written by `ENDINGS_PAGE=docs/endings.md pytest -m slow tests/faults/test_endings_page.py` out of real jobs on the
emulation, of two nodes that train, and a spare where one takes over. Each is checked to name its cause, its place and
the next step. What the exit codes mean: [operations.md](operations.md#exit-codes).
"""


@dataclass(frozen=True)
class Ending:
    """One of them.

    Args:
        does: what is done to the job.
        code: with which it ends; 0: it goes on and finishes.
        cause: what must be read on the terminal, or in recoveries.log where the job goes on, besides ``place``.
        recovers: a paragraph is written.
    """

    does: Callable[[Job], None]
    code: int
    cause: str
    place: str
    spares: int = 0
    nodes: int = 2
    flags: tuple[str, ...] = ()
    program: str = ""
    recovers: bool = True
    held: bool = True
    iterations: int = 8


def _fault(*more: str, node: int = 1, iteration: int = 4) -> Callable[[Job], None]:
    def strikes(job: Job) -> None:
        job.arm((node, iteration, 2, *more))

    return strikes


def _everywhere(job: Job) -> None:
    job.arm((1, 4, 2, "--fault", "raise"), (2, 4, 2, "--fault", "raise"))


def _hangs(job: Job) -> None:
    """Not held before: what was long once is no sign. And after some seconds: first the agent learns what is long."""
    job.until_event("started")
    job.inject(1, 100, 2, "--fault", "hang")


def _two_at_once(job: Job) -> None:
    job.arm((0, 4, 2), (2, 4, 2))


def _let_go(job: Job) -> None:
    job.hold(None)


def _signalled(signum: int) -> Callable[[Job], None]:
    def told(job: Job) -> None:
        job.until_event("started")
        job.hold(3)
        job.until("a commit", lambda: [e for e in job.events("committed") if e["iteration"]])
        job.process.send_signal(signum)

    return told


_QUICK = ("--deadpool-lease", "2", "--deadpool-hang-floor", "2")
_DURABLE = ("--deadpool-durable-dir", "DIR/durable", "--deadpool-on-preempt", "--deadpool-durable-interval", "0")
_BROKEN = "def load(path):\n    return open(path)\n\n\nload('/data/vocab.json')\n"
# What a spare has got back is spoilt, again and again.
_SPOILT = f"""import runpy
from deadpool_megatron.megatron import trainer

compare = trainer.MegatronTrainer._compare

def spoilt(self):
    if self.rank == 1:
        self._optimizer.param_groups[0]["weight_decay"] += 0.125
    return compare(self)

trainer.MegatronTrainer._compare = spoilt
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""
ENDINGS = {
    "0: it finishes": Ending(_let_go, 0, "exit code 0", "last iteration 7", recovers=False),
    "1: the script fails before training": Ending(
        _let_go, 1, "/data/vocab.json", "rank", program=_BROKEN, recovers=False
    ),
    "2: a typo in a flag of Megatron": Ending(
        _let_go, 2, "unrecognized arguments: --num-layerz", "rank", flags=("--num-layerz", "4"), recovers=False
    ),
    "73: what was restored is not what the other ranks have": Ending(
        _fault(), 73, "hyperparameters of rank", "node", spares=1, program=_SPOILT
    ),
    "74: the machines are wanted": Ending(
        _signalled(signal.SIGTERM), 74, "preempted: generation", "durable", flags=_DURABLE, recovers=False
    ),
    "75: no spare, and a checkpoint is saved": Ending(
        _fault(), 75, "no spare", "node 1", flags=("--save", "DIR/saved", "--save-interval", "100")
    ),
    "76: no spare, and nothing to save it with": Ending(_fault(), 76, "no checkpoint could be saved", "node 1"),
    "77: more nodes are lost than copies cover": Ending(
        _two_at_once, 77, "more nodes were lost than the redundancy covers", "ranks 0, 2", spares=2, nodes=4
    ),
    "78: communication fails with every node alive": Ending(
        _fault("--fault", "slow", "--seconds", "8"),
        78,
        "with every node alive",
        "communication failed",
        flags=("--deadpool-operation-timeout", "3", "--deadpool-transient-retries", "0", "--deadpool-lease", "1"),
        spares=1,
        recovers=False,
    ),
    "79: an error that comes again": Ending(_everywhere, 79, "InjectedError", "rank 1", spares=1),
    "130: Ctrl-C": Ending(_signalled(signal.SIGINT), 130, "interrupted", "every process of the job", recovers=False),
    "143: SIGTERM, and no --deadpool-on-preempt": Ending(
        _signalled(signal.SIGTERM), 143, "ended by SIGTERM", "every process of the job", recovers=False
    ),
    "a node is killed": Ending(_fault(), 0, "its agent is gone or silent", "node 1", spares=1),
    "a worker is killed": Ending(_fault("--fault", "kill-worker"), 0, "signal 9", "rank 1", spares=1),
    "an agent is killed": Ending(_fault("--fault", "kill-agent"), 0, "its agent is gone or silent", "node 1", spares=1),
    "a worker crashes": Ending(_fault("--fault", "crash"), 0, "signal 11", "rank 1", spares=1),
    "a worker is stopped": Ending(
        _fault("--fault", "stop"), 0, "is stuck", "stacks-node1-0.txt", spares=1, flags=_QUICK, iterations=60
    ),
    "a worker hangs": Ending(
        _hangs, 0, "is stuck", "stacks-node1-0.txt", spares=1, flags=_QUICK, held=False, iterations=120
    ),
    "a node falls silent": Ending(
        _fault("--fault", "stop-agent"), 0, "its agent is gone or silent", "node 1", spares=1, flags=_QUICK
    ),
}
_SEEN: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def _written_down() -> Iterator[None]:
    """What the jobs showed, at the end."""
    yield
    page = os.environ.get("ENDINGS_PAGE")
    if page and set(_SEEN) == set(ENDINGS):
        Path(page).write_text("\n".join([_HEAD, *(_SEEN[name] for name in ENDINGS)]))


def _plain(text: str, job: Job) -> str:
    """Without what differs from run to run and from machine to machine."""
    for old, new in ((str(job.run_dir), "RUN"), (str(job.run_dir.parent), "DIR"), (socket.gethostname(), "host")):
        text = text.replace(old, new)
    text = text.replace(f"{ROOT}/", "")
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/pytest-of-\S*", "DIR...", text)  # cut off by the screen
    text = re.sub(r"process \d+", "process 4711", text)
    text = re.sub(r"\d{4}-\d\d-\d\d (?=\d\d:)", "", text)
    return re.sub(r"\b\d\d:\d\d:\d\d\b", "03:00:00", text).rstrip()


def _report(job: Job) -> str:
    """The first table of the report and its recoveries, as text."""
    assert job.command("report").returncode == 0
    page = (job.run_dir / "report.html").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("<h2>")[0], re.DOTALL)
    table = [": ".join(re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)) for row in rows]
    return html.unescape("\n".join(line for line in table if line))


@pytest.mark.parametrize("name", ENDINGS)
def test_each_names_its_cause_its_place_and_the_next_step(name: str, jobs: Jobs) -> None:
    it = ENDINGS[name]
    script = EXAMPLE
    if it.program:
        script = jobs.directory / "broken.py"
        script.write_text(it.program)
    flags = [flag.replace("DIR", str(jobs.directory)) for flag in it.flags]
    place = re.sub(r"\W+", "-", name)
    launch = [*launch_flags(it.nodes + it.spares, it.spares, 1), "--tee", "none"]
    job = jobs.start(place, launch, [*duo_gpt("data", iters=it.iterations), *flags], script, held=it.held)
    it.does(job)
    assert job.wait() == it.code, job.log_tails()
    terminal = "\n".join(_plain(job.output, job).splitlines()[-_LINES:])
    status, report = _plain(job.command("status").stdout, job), _plain(_report(job), job)
    log = job.run_dir / RECOVERIES
    told = _plain(log.read_text(), job) if log.exists() else ""
    _SEEN[name] = _section(name, {"terminal": terminal, "status": status, "recoveries.log": told, "report": report})

    def has(text: str, *parts: str) -> None:
        flat = " ".join(text.split())
        for part in parts:
            assert " ".join(part.split()) in flat, f"{part!r} is not in:\n{text}"

    has(status, f"exit code {it.code}")
    assert "may be lost" not in status and "parked warm" not in status and "training" not in status.split("\n")[0]
    for text in (terminal, status, told, report):
        assert "None" not in text and "node stays" not in text.split("rank")[0]
    if it.code:
        has(terminal, it.cause, it.place)
        has(status, it.cause, what_to_do(it.code))
        has(report, it.cause, what_to_do(it.code))
        error: dict[str, Any] = json.loads((job.run_dir / ERROR).read_text())["message"]
        assert error["errorCode"] == it.code
        if it.code != Exit.USAGE:
            has(terminal, what_to_do(it.code))
    elif it.recovers:
        has(told, it.cause, it.place, "What to do: ")
        has(status, "last recovery (of 1)")
        assert ("signal 9" in told) == (it.cause == "signal 9"), "only who was killed by somebody was"
    else:
        has(status, it.cause, it.place)
    assert bool(told) == it.recovers


def _section(name: str, parts: dict[str, str]) -> str:
    blocks = [f"### {what}\n\n```\n{text}\n```\n" for what, text in parts.items() if text]
    return f"## {name[0].upper()}{name[1:]}\n\n" + "\n".join(blocks)
