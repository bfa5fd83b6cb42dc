"""`deadpool doctor` finds what would spoil a run, names the line that mends it, and measures between nodes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import pytest

from deadpool_bench.harness.ports import free_ports
from deadpool_megatron.cluster.link.link import Spoke
from deadpool_megatron.comm.nccl import NCCL_ENVIRONMENT
from deadpool_megatron.doctor.machine import Finding, check_environment, check_logout, check_machine
from deadpool_megatron.doctor.network import host_meeting, join_meeting

DOCTOR = [sys.executable, "-m", "deadpool_megatron.cli", "doctor"]
ROOT = Path(__file__).parents[2]


def _start(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DOCTOR, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_each_setting_that_breaks_abort_is_named_with_the_line_that_mends_it() -> None:
    bad = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "NCCL_NVLS_ENABLE": "2", "TORCH_NCCL_BLOCKING_WAIT": "1"}
    found = {f.what: f for f in check_environment(bad)}
    assert set(found) == {f"{k}={v}" for k, v in bad.items()}
    assert all(f.state == "fail" for f in found.values())
    assert found["NCCL_NVLS_ENABLE=2"].mend == "export NCCL_NVLS_ENABLE=0"
    assert found["TORCH_NCCL_BLOCKING_WAIT=1"].mend == "unset TORCH_NCCL_BLOCKING_WAIT"


def test_the_settings_deadpool_makes_itself_are_fine() -> None:
    assert [f.state for f in check_environment(NCCL_ENVIRONMENT)] == ["ok"]


def test_an_old_name_of_a_setting_is_fine_since_torch_takes_the_newer_one_first() -> None:
    assert [f.state for f in check_environment({**NCCL_ENVIRONMENT, "NCCL_BLOCKING_WAIT": "1"})] == ["ok"]


@pytest.mark.parametrize(
    ("uid", "removes", "lingers", "state"),
    [(1000, "yes", "no", "warn"), (1000, "yes", "yes", "ok"), (1000, "no", "no", "ok"), (999, "yes", "no", "ok")],
)
def test_a_user_whose_shared_memory_a_logout_removes_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, removes: str, lingers: str, state: str
) -> None:
    logind = tmp_path / "loginctl"
    logind.write_text(f'#!/bin/sh\ncase "$*" in *RemoveIPC*) echo {removes};; *1000*Linger*) echo {lingers};; esac\n')
    logind.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = check_logout("/dev/shm", uid)
    assert found.state == state and found.mend.startswith("loginctl enable-linger 1000" if state == "warn" else "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert check_logout("/dev/shm", uid).state == "ok"


def test_too_little_shared_memory_is_found(tmp_path: Path) -> None:
    found = {f.what: f for f in check_machine("/dev/shm", 1 << 50)}
    memory = found["shared memory /dev/shm"]
    assert memory.state == "fail" and memory.mend.startswith("use machines with more"), "no machine has that much"
    missing = {f.what: f for f in check_machine(str(tmp_path / "none"), 0)}
    assert missing[f"shared memory {tmp_path / 'none'}"].state == "fail"


def test_shared_memory_that_the_machine_has_room_for_is_to_be_mounted_larger(
    mounted: Callable[[str], Path],
) -> None:
    small = mounted("size=16m")
    found = {f.what: f for f in check_machine(str(small), 32 << 20)}
    memory = found[f"shared memory {small}"]
    assert memory.state == "fail" and memory.mend.startswith(f"mount -o remount,size=1G {small}")


def test_the_output_is_aligned_at_80_columns_and_the_exit_code_says_whether_to_start() -> None:
    done = _start(NCCL_NVLS_ENABLE="1")
    out, err = done.communicate()
    assert done.returncode == 1, err
    assert max(map(len, out.splitlines())) <= 90
    assert re.search(r"^fail  NCCL_NVLS_ENABLE=1 +NVLink", out, re.MULTILINE)
    assert re.search(r"^ {33}mend: export NCCL_NVLS_ENABLE=0$", out, re.MULTILINE)
    assert re.search(r"^not fit for a run: 1 to mend", out, re.MULTILINE)


def test_nodes_meet_and_every_link_is_measured(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("ab" * 32)
    meet = ["--meet", f"127.0.0.1:{free_ports(1)[0]}", "--nnodes", "3", "--mib", "8", "--secret-file", str(secret)]
    nodes = [_start(*meet, "--node-rank", str(i)) for i in range(3)]
    for node in nodes:
        out, err = node.communicate()
        assert node.returncode == 0, out + err
        assert "3 have met" in out and "within" in out
        assert re.search(r"3 links, each node sending at once: median [\d.]+", " ".join(out.split()))


def test_a_node_that_is_slow_to_read_gets_the_result_too(monkeypatch: pytest.MonkeyPatch) -> None:
    receive, secret, ports = Spoke.receive, bytes(32), Queue[int]()
    found: dict[int, list[Finding]] = {}

    def slow(spoke: Spoke, timeout_s: float = 0.0) -> bytes | None:
        if threading.current_thread().name == "1":
            time.sleep(1.5)  # longer than the meeting point gives its last packets to leave
        return receive(spoke, timeout_s)

    def join(node: int) -> None:
        found[node] = join_meeting(f"127.0.0.1:{port}", node, "127.0.0.1", secret, 600.0)

    monkeypatch.setattr(Spoke, "receive", slow)
    host = threading.Thread(target=host_meeting, args=("127.0.0.1", 0, 2, secret, 1 << 20, 600.0, ports.put))
    host.start()
    port = ports.get()
    nodes = [threading.Thread(target=join, args=(node,), name=str(node)) for node in range(2)]
    for node in nodes:
        node.start()
    for thread in (*nodes, host):
        thread.join()
    assert found[0] == found[1] and found[0][0].found == "2 have met"


def test_a_node_that_comes_long_before_node_0_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, (port,) = bytes(32), free_ports(1)
    found: dict[int, list[Finding]] = {}

    def join(node: int) -> None:
        found[node] = join_meeting(f"127.0.0.1:{port}", node, "127.0.0.1", secret, 600.0)

    monkeypatch.setattr(Spoke.send, "__defaults__", (0.1,))  # how long any other packet may wait to be sent
    early = threading.Thread(target=join, args=(1,))
    early.start()
    time.sleep(0.5)
    host = threading.Thread(target=host_meeting, args=("127.0.0.1", port, 2, secret, 1 << 20, 600.0, lambda _: None))
    host.start()
    join(0)
    early.join()
    host.join()
    assert found[0] == found[1] and found[0][0].found == "2 have met"


def test_a_node_that_stays_away_is_named(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("ab" * 32)
    meet = ["--meet", f"127.0.0.1:{free_ports(1)[0]}", "--nnodes", "2", "--deadline", "3", "--secret-file", str(secret)]
    _, err = (node := _start(*meet, "--node-rank", "0")).communicate()
    assert node.returncode == 2 and err.count("\n") == 1
    assert re.search(r"no word from node (0, )?1 within 3 s", err)  # a busy node 0 does not meet itself in time


def test_a_node_with_another_secret_is_not_heard(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_text("ab" * 32)
    theirs.write_text("cd" * 32)
    meet = ["--meet", f"127.0.0.1:{free_ports(1)[0]}", "--nnodes", "2", "--deadline", "4", "--secret-file"]
    host = _start(*meet, str(ours), "--node-rank", "0")
    stranger = _start(*meet, str(theirs), "--node-rank", "1")
    assert re.search(r"no word from node (0, )?1 ", host.communicate()[1])
    assert "with the same secret?" in stranger.communicate()[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--meet", "nonsense"], "expected HOST:PORT"),
        (["--meet", "127.0.0.1:99999", "--nnodes", "1", "--node-rank", "0"], "a port up to 65535"),
        (["--meet", "a..b:1", "--nnodes", "1", "--node-rank", "0"], "--meet a..b:1: "),
        (["--vault-gib", "inf"], "--vault-gib: must be a number, not 'inf'"),
        (["--vault-gib", "nan"], "--vault-gib: "),
        (["--deadline", "inf"], "--deadline: "),
        (["--mib", "0"], "--mib: must be 1 to 1000000, not 0"),
        (["--meet", "127.0.0.1:1", "--nnodes", "2", "--node-rank", "2"], "--node-rank 2 is not one of 2 nodes"),
        (["--meet", "127.0.0.1:1", "--nnodes", "2", "--node-rank", "0"], "a secret is needed"),
    ],
)
def test_a_bad_option_is_one_clear_line(options: list[str], says: str) -> None:
    done = _start(*options, DEADPOOL_SECRET="", DEADPOOL_SECRET_FILE="")
    _, err = done.communicate()
    assert done.returncode == 2 and err.count("\n") == 1 and says in err
