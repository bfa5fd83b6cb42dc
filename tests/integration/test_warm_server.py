"""Workers that a node's warm server forks are the agent's own children, as those that it starts; where it cannot fork,
it says why, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.distributed import TCPStore

from deadpool_megatron.cluster.agent.warm_server import ForkedProcess, ForkRequest, WarmServer
from deadpool_megatron.megatron.standby import _KEY, RunningJob
from waiting import until

SCRIPT = """
import json, os, random, sys
import numpy
import apex
import users
if __name__ == "__main__":
    told = dict(
        pid=os.getpid(), parent=os.getppid(), session=os.getsid(0), rank=os.environ.get("RANK"),
        other=os.environ.get("OTHER"),
        asked=os.environ.get("ASKED"), users=users.RANK, drawn=[random.random(), numpy.random.random()],
        argv=sys.argv[1:], imported="torch" in sys.modules, pipe=os.read(int(os.environ["PIPE"]), 16).decode(),
    )
    print(json.dumps(told), flush=True)
    if "END" in os.environ:
        os.kill(os.getpid(), 9)
    sys.exit(7)
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of a job whose workers have told what they have imported."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, timeout=timedelta(seconds=30))
    store.set(_KEY, msgspec.json.encode(RunningJob("", 0.0, {}, ["torch.utils.data"])).decode())
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    yield kept | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
        "OPENBLAS_NUM_THREADS": "1", "OTHER": "of the server",
    }  # fmt: skip
    del store  # which serves no longer


class _Agent:
    """What an agent does with its warm server."""

    def __init__(self, directory: Path, environment: dict[str, str], package: str) -> None:
        """``package``: what is in one of those that it imports."""
        self.script = directory / "script.py"
        self.script.write_text(SCRIPT)
        (directory / "apex.py").write_text(package)
        (directory / "users.py").write_text("import os\nRANK = os.environ['RANK']\n")
        self.environment = environment
        self.log = directory / "log"
        self.server = WarmServer([sys.executable, "-m", "deadpool_megatron.worker", str(self.script), "--flag"])
        with open(directory / "server.log", "wb") as out:
            self.server.begin(environment, out)

    def settled(self) -> str:
        """Why there is none; empty where it is ready."""
        until(self.server.look)
        return self.server.why_not

    def told(self) -> list[dict[str, Any]]:
        """What its workers have said, by rank."""
        return sorted((json.loads(line) for line in self.log.read_text().splitlines()), key=lambda each: each["rank"])

    def fork(self, **environment: str) -> ForkedProcess | None:
        """A worker. It has a pipe with one word in it."""
        reads, writes = os.pipe()
        os.write(writes, b"a word")
        os.close(writes)
        wanted = {k: v for k, v in self.environment.items() if k != "OTHER"} | environment
        stacks = {"DEADPOOL_STACKS_FILE": str(self.log.with_suffix(".stacks")), "DEADPOOL_AGENT_PID": str(os.getpid())}
        with open(self.log, "ab", buffering=0) as out:
            process = self.server.fork(wanted | stacks, {"PIPE": reads}, out)
        os.close(reads)
        return process


def test_what_it_forks_is_a_worker_of_the_agent_like_one_that_it_starts(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    agent = _Agent(tmp_path, environment, "import os; os.environ['ASKED'] = os.environ['OTHER'] = 'by an import'\n")
    server = agent.server
    assert agent.settled() == "" and server.ready
    first, second = agent.fork(RANK="3"), agent.fork(RANK="4", END="killed")
    assert first is not None and second is not None
    assert (first.wait(), first.poll(), second.wait()) == (7, 7, -signal.SIGKILL)
    told = agent.told()
    assert [each["pid"] for each in told] == [first.pid, second.pid] == [each["session"] for each in told]
    assert [each["parent"] for each in told] == [os.getpid()] * 2
    for each in told:
        assert each["other"] is None and each["asked"] == "by an import" and each["users"] == each["rank"]
        assert each["argv"] == ["--flag"] and each["imported"] and each["pipe"] == "a word"
    drawn = [number for each in told for number in each["drawn"]]
    assert len(set(drawn)) == len(drawn), "no two processes draw the same numbers"

    # One whose agent does not wait for it any more does not begin: there is another one for that coordinate by then.
    assert server._orders is not None and server._process is not None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, open(agent.log, "ab", buffering=0) as out:
        request = msgspec.json.encode(ForkRequest(environment | {"RANK": "0"}, []))
        socket.send_fds(server._orders, [request], [theirs.fileno(), out.fileno()])
    ours.close()
    third = agent.fork(RANK="5")  # forked after it
    assert third is not None and third.wait() == 7
    assert [each["rank"] for each in agent.told()] == ["3", "4", "5"]

    # It hangs: it is ended, and workers are started as ever.
    server._process.send_signal(signal.SIGSTOP)
    assert agent.fork(RANK="0") is None and not server.ready
    assert server.why_not == "it was asked for a worker: timed out"
    assert agent.fork(RANK="0") is None and not server.look()
    until(lambda: not server.look() and server._process and server._process.returncode == -signal.SIGKILL)


def test_one_that_ends_or_cannot_be_started_is_told_of_once(tmp_path: Path) -> None:
    for command, why in (
        ([sys.executable, "-c", ""], "it has ended"),
        (["/is/not/there"], "it could not be started: [Errno 2] No such file or directory: '/is/not/there'"),
    ):
        server = WarmServer(command)
        with open(tmp_path / "server.log", "wb") as out:
            server.begin(os.environ, out)
        until(lambda server=server: server.look() or server.why_not)
        assert server.why_not == why and server.begun and not server.ready and not server.look()
        server.close()


def test_it_forks_nothing_where_an_import_has_started_a_thread(tmp_path: Path, environment: dict[str, str]) -> None:
    agent = _Agent(
        tmp_path,
        environment,
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), name='its own', daemon=True).start()\n",
    )
    try:
        assert agent.settled() == "what is imported has started 1 threads (its own)"
        assert agent.fork(RANK="0") is None
    finally:
        agent.server.close()


def test_it_says_what_an_import_raises(tmp_path: Path, environment: dict[str, str]) -> None:
    agent = _Agent(tmp_path, environment, "raise ValueError('not without a rank')\n")
    try:
        assert agent.settled().endswith("script.py imports: ValueError: not without a rank")
    finally:
        agent.server.close()
