"""An error before training is told where people look: its text, its place and the log's path, without the log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.worker_processes import last_words
from deadpool_megatron.cluster.agent.workers import ERROR_FILE
from deadpool_megatron.launcher.tee import show_end
from deadpool_megatron.observe import ERROR, RunDirectory
from simulated import SimulatedJob


def _log(tmp_path: Path, program: str) -> str:
    log = tmp_path / "rank-0.log"
    with log.open("wb") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, stderr=subprocess.STDOUT, check=False)
    return str(log)


def test_of_a_traceback_the_last_lines_whatever_is_printed_after_it(tmp_path: Path) -> None:
    program = "import atexit\natexit.register(print, 'bye')\ndef f(n): return f(n - 1) if n else int('x')\n"
    words = last_words(_log(tmp_path, f"print('begin')\n{program}f(9)"))
    assert words[-1] == "ValueError: invalid literal for int() with base 10: 'x'" and len(words) <= 8
    assert any("in f" in line for line in words) and "bye" not in words and "begin" not in words


def test_of_a_typo_in_a_flag_the_line_of_argparse_alone(tmp_path: Path) -> None:
    flags = "".join(f"p.add_argument('--flag-{i}', help='x')\n" for i in range(200))
    parser = f"import argparse\np = argparse.ArgumentParser(prog='pretrain_gpt.py')\n{flags}"
    log = _log(tmp_path, f"{parser}p.parse_args(['--num-layerz', '4'])")
    assert last_words(log) == ["pretrain_gpt.py: error: unrecognized arguments: --num-layerz 4"]


def test_of_anything_else_the_end_of_the_log_and_of_no_log_nothing(tmp_path: Path) -> None:
    assert last_words(_log(tmp_path, "print(*range(30), sep='\\n\\n')")) == [str(i) for i in range(22, 30)]
    assert last_words(str(tmp_path / "none.log")) == []


def _ends(*more: object, failed: str = "", deadpool: bool = True) -> str:
    job = SimulatedJob(nodes=2, spares=0, deadpool=deadpool)
    job.join()
    job.feed(r.Join(1, 1001, "127.0.0.1", 2001, [10, 11], name="gpu-17"))
    if failed:
        kind, _, text = failed.partition(": ")
        job.feed(r.WorkerFailed(1, 0, 2, "setup", 0, -1, 0, f"builtins.{kind}", "a.py:1", failed, f"Traceback\n{text}"))
    job.feed(r.WorkerExited(1, 0, 2, 11, 2, 0, *more))  # type: ignore[arg-type]
    assert job.end[0] == 2
    return job.end[1]


def test_the_job_ends_with_who_where_why_and_the_log() -> None:
    line = "pretrain_gpt.py: error: unrecognized arguments: --num-layerz 4"
    said = _ends("/runs/a/logs/rank-2.log", [line], failed="SystemExit: 2").splitlines()
    assert said[0] == f"rank 2 on node 1 (gpu-17) failed before training began (exit code 2): {line}"
    assert said[1:] == ["    its log: /runs/a/logs/rank-2.log"]
    trace = ['  File "a.py", line 3, in f', "    int('x')", "ValueError: no"]
    said = _ends("/log", trace, failed="ValueError: no").splitlines()
    assert said == ["rank 2 on node 1 (gpu-17): ValueError: no", *(f"    {x}" for x in trace), "    its log: /log"]
    assert "exit code 2): ValueError: no" in _ends("/log", trace, deadpool=False)


def test_the_error_file_is_what_torchrun_reads_and_goes_on_to_who_started_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    RunDirectory(tmp_path).error(2, "rank 2 on node 1: ValueError: no\n    its log: /log")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "theirs.json"))
    show_end(3, "rank 2 ...", str(tmp_path))
    assert "exit code 3; what to do" in capsys.readouterr().err
    failure = api.ProcessFailure(0, 7, 2, str(tmp_path / "theirs.json"))
    assert failure.message["message"] == "rank 2 on node 1: ValueError: no" and failure.timestamp > 0
    assert json.loads((tmp_path / ERROR).read_text())["message"]["errorCode"] == 2
