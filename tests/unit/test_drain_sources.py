"""Slurm, Kubernetes, a file and a hook say which nodes are to be taken away; what is wrong with them ends nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.coordinator import drain_sources
from deadpool_megatron.cluster.coordinator.drain_sources import (
    Drains,
    DrainSources,
    File,
    Hook,
    Kubernetes,
    Slurm,
    SourceError,
    slurm_states,
    source,
)
from deadpool_megatron.config import ConfigError, DeadpoolConfig
from simulated import SimulatedJob
from waiting import until

_SCONTROL = """\
NodeName=n1 Arch=x86_64 CPUAlloc=2 State=ALLOCATED ThreadsPerCore=1 Partitions=main
NodeName=n2 Arch=x86_64 State=ALLOCATED+DRAIN ThreadsPerCore=1 Reason=GPU 3 is bad [root@2026-11-30T01:02:03]
NodeName=n3 State=DOWN* Reason=Not responding [slurm@2026-11-30T01:02:03]
NodeName=n4 State=IDLE+DRAIN+DYNAMIC_NORM
NodeName=n5 State=MIXED+PLANNED
"""


def test_slurms_states() -> None:
    assert slurm_states(_SCONTROL) == {
        "n2": "Slurm has it as ALLOCATED+DRAIN (GPU 3 is bad)",
        "n3": "Slurm has it as DOWN* (Not responding)",
        "n4": "Slurm has it as IDLE+DRAIN+DYNAMIC_NORM",
    }


def test_a_file_that_is_not_there_names_nobody(tmp_path: Path) -> None:
    file = File(str(tmp_path / "drain"))
    assert file.ask() == {}
    (tmp_path / "drain").write_text("# by hand\nmachine3  its fan is loud  # and more\n\n7\n")
    assert file.ask() == {"machine3": "its fan is loud", "7": "drain names it"}


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, tuple[int, str]]], tuple[str, list[tuple[str, str]]]]]:
    """An HTTP server with these answers by path; its address, and what it is asked (path and authorization)."""
    servers: list[HTTPServer] = []

    def start(answers: dict[str, tuple[int, str]]) -> tuple[str, list[tuple[str, str]]]:
        asked: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers.get("Authorization", "")))
                code, text = answers.get(self.path.partition("?")[0], (404, ""))
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None:
                return

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_hook_answers_with_lines_or_a_list(serve: Callable[..., tuple[str, list[tuple[str, str]]]]) -> None:
    where, _ = serve({"/lines": (200, "m1\nm2 hot\n"), "/list": (200, json.dumps(["m3", 4])), "/odd": (200, "[}")})
    assert Hook(f"http://{where}/lines").ask() == {"m1": "the HTTP hook names it", "m2": "hot"}
    assert [*Hook(f"http://{where}/list").ask()] == ["m3", "4"]
    with pytest.raises(SourceError, match="HTTP 404"):
        Hook(f"http://{where}/none").ask()
    with pytest.raises(ValueError, match="Expecting"):
        Hook(f"http://{where}/odd").ask()


def test_an_answer_without_an_end_is_given_up(
    serve: Callable[..., tuple[str, list[tuple[str, str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = serve({"/": (200, "m" * 1000)})
    monkeypatch.setattr(drain_sources, "_MOST_BYTES", 100)
    with pytest.raises(SourceError, match="more than"):
        Hook(f"http://{where}/").ask()


def test_cordoned_nodes_are_had_from_the_api_with_the_account_of_the_pod(
    serve: Callable[..., tuple[str, list[tuple[str, str]]]], tmp_path: Path
) -> None:
    items = {"items": [{"metadata": {"name": "gke-a"}}, {"metadata": {"name": "gke-b"}}]}
    where, asked = serve({"/api/v1/nodes": (200, json.dumps(items))})
    host, _, port = where.partition(":")
    (tmp_path / "token").write_text("s3cret\n")
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    assert [*Kubernetes(environ, tmp_path, "http").ask()] == ["gke-a", "gke-b"]
    assert asked == [("/api/v1/nodes?fieldSelector=spec.unschedulable%3Dtrue", "Bearer s3cret")]
    with pytest.raises(SourceError, match="this is no pod"):
        Kubernetes({}, tmp_path).ask()


def test_slurm_is_asked_for_the_nodes_of_the_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/answer\n')
    tool.chmod(0o755)
    (tmp_path / "answer").write_text(_SCONTROL)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [*Slurm({"SLURM_JOB_NODELIST": "n[1-5]"}).ask()] == ["n2", "n3", "n4"]
    assert (tmp_path / "asked").read_text() == "-o show node n[1-5]\n"
    (tmp_path / "answer").unlink()
    with pytest.raises(SourceError, match="No such file"):
        Slurm({}).ask()


def test_what_cannot_be_asked_is_said_once_and_what_it_named_holds_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    file = File(str(tmp_path / "drain"))
    sources = DrainSources([], 10.0, said.append)
    (tmp_path / "drain").write_text("m1\n")
    sources.look(file)
    assert [*sources.wanted()] == ["m1"]
    (tmp_path / "drain").unlink()
    (tmp_path / "drain").mkdir()
    for _ in range(3):
        sources.look(file)
    assert not sources.wanted() and len(said) == 1 and "it is asked again every 10 s" in said[0]


def test_the_entries_of_the_setting_are_checked() -> None:
    config = DeadpoolConfig(drain_from="slurm, kubernetes,file:/x/y,https://host/drain")
    kinds = [type(source(entry)) for entry in config.drain_sources]
    assert kinds == [Slurm, Kubernetes, File, Hook]
    for wrong in ("slrum", "file:", "ftp://host"):
        with pytest.raises(ConfigError, match="is none of slurm, kubernetes"):
            DeadpoolConfig(drain_from=wrong)


def _drains(path: Path) -> Drains:
    return Drains([f"file:{path}"], 0.01)


def _look(drains: Drains, job: SimulatedJob, seconds: float = 2.0) -> list[int]:
    job.now += seconds
    begun = []
    for node, _ in drains.due(job.core, job.now):
        begun.append(node)
        job.take(job.core.drain(node, job.now)[1])
    return begun


def test_who_is_named_is_drained_one_after_the_other_and_spares_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = SimulatedJob(nodes=5, spares=2, slots=1).train("m{}")
    job.commit(3)
    drains = _drains(tmp_path / "drain")
    (tmp_path / "drain").write_text("m0\nm1\n4 broken\nelsewhere\n")
    until(lambda: len(drains._sources.wanted()) == 4, "the file is read")
    assert _look(drains, job) == [4] and job.core.nodes[4].role == "left"
    assert _look(drains, job) == [0]
    assert _look(drains, job) == [], "one at a time"
    for node in (0, 1, 2):
        job.feed(r.NodeHeld(0, node, job.told(r.Hold)[-1].iteration, False))
    job.recover(3)
    assert job.core.nodes[0].role == "left" and job.active == [3, 1, 2]
    for _ in range(3):
        assert _look(drains, job) == []
    shown = capsys.readouterr().err.splitlines()
    assert "node 4 is drained: broken" in shown[0] and "node 0 is drained: drain names it" in shown[1]
    assert [line for line in shown if "node 1 is to be drained" in line] == [shown[2]], "said once"
    assert "add one with deadpool join" in shown[2]
    assert [*drains.refused] == [1] and "add one with deadpool join" in drains.refused[1]
    (tmp_path / "drain").write_text("")
    until(lambda: not drains._sources.wanted(), "the file is read again")
    assert _look(drains, job) == [] and not drains.refused


def test_a_drain_that_is_called_off_is_tried_again_after_a_while(tmp_path: Path) -> None:
    job = SimulatedJob(nodes=4, spares=1, slots=1).train("m{}")
    job.commit(3)
    (tmp_path / "drain").write_text("m0\n")
    drains = _drains(tmp_path / "drain")
    until(lambda: bool(drains._sources.wanted()), "the file is read")
    assert _look(drains, job) == [0]
    job.lose(3)
    job.wait(31.0)
    assert job.events("stays") and job.core.nodes[0].role == "active"
    job.recover(3)
    job.take(job.core.add_spare("", job.now)[2])
    job.join([4])
    job.park([4])
    drains._begun[0] = job.now
    assert _look(drains, job, 20.0) == []
    assert _look(drains, job, 20.0) == [0]
