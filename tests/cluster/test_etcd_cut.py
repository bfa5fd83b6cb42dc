"""An etcd member behind a pulled cable: no reset, no answer, no end of its connections. No recovery waits for it.

Three members, each on a host of its own, and the coordinator with simulated agents on a fourth; network namespaces,
so it needs root::

    python -m pytest -m slow tests/cluster/test_etcd_cut.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deadpool_bench.control_plane.bench import SimulatedCluster
from deadpool_bench.control_plane.etcd import EtcdMembers
from deadpool_megatron.cluster.store import StoreError
from etcds import need_etcd
from jobs import environment
from namespaces import Network, why_not

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
ACTIVE, SPARES = 8, 6


class Driven:
    """The coordinator and its agents in a process on a host, told what to do line by line."""

    def __init__(self, host: list[str], url: str, directory: Path) -> None:
        self._log = directory / "driven.log"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [*host, sys.executable, __file__, url, str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment() | {"PYTHONPATH": ":".join(sys.path)},
            )

    def tell(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self._log.read_text()[-2000:]
        out: dict[str, Any] = json.loads(answer)
        return out

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[tuple[Network, Driven]]:
    need_etcd()
    with Network(4) as network:
        # (their own heartbeats and elections at their defaults: 0.1 and 1 s)
        members = EtcdMembers(tmp_path, 3, [network.address(i) for i in range(3)], prefix=network.command)
        try:
            one = Driven(network.command(3), members.url, tmp_path)
            try:
                yield network, one
            finally:
                one.end()
        finally:
            members.end()


@pytest.mark.slow
def test_whichever_etcd_member_is_cut_off_a_recovery_goes_through_and_one_without_a_majority_waits(
    driven: tuple[Network, Driven],
) -> None:
    network, cluster = driven
    assert cluster.tell("kill 0")["lost"] == [0]
    for member in range(3):  # one of them leads, one is asked first
        network.cut(member)
        found = cluster.tell(f"kill {member + 1}")
        assert found["lost"] == list(range(member + 2)), found
        network.heal()
        assert cluster.tell("answers")["writes"], "a majority answers, whoever leads it"
    # Without a majority nothing is decided, and with it again what was due is.
    network.cut(0)
    network.cut(1)
    lost = network.lost
    assert not cluster.tell("kill 4 3")["resumed"]
    assert network.lost > lost
    network.heal()
    assert cluster.tell("resumed")["lost"] == [0, 1, 2, 3, 4]


def main() -> int:
    url, directory = sys.argv[1:]
    end = time.monotonic() + 60.0
    while True:
        try:
            cluster = SimulatedCluster(Path(directory) / "job", ACTIVE, SPARES, 2, 60.0, url, 1)
            break
        except StoreError:  # etcd is not up yet
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
    times = 0
    try:
        cluster.start()
        for line in sys.stdin:
            word, *arguments = line.split()
            answer: dict[str, Any] = {}
            if word == "answers":
                answer["writes"] = cluster.store.put({"probe": b"x"}) > 0
            else:
                times += word == "kill"
                if word == "kill":
                    cluster.kill(int(arguments[0]))
                patience = float(arguments[1]) if len(arguments) > 1 else 600.0
                try:
                    cluster.until("resumed", times, patience)
                    declared = cluster.until("declared", times, patience)
                    nodes = [n["node"] for n in cluster.status()["nodes"] if n["role"] == "lost"]
                    lost = sorted({*nodes, *declared["lost"]})
                    answer = {"resumed": True, "lost": lost}
                except TimeoutError:
                    answer = {"resumed": False}
            print(json.dumps(answer), flush=True)
    finally:
        cluster.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
