"""The command line answers everybody who types at it: help that prints, one way to name a run, typos refused."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deadpool_megatron import cli
from deadpool_megatron.doctor import machine
from deadpool_megatron.launcher import local
from deadpool_megatron.launcher.secret import SecretSource
from deadpool_megatron.observe import RunDirectory
from deadpool_megatron.planning.files import PlanError, load
from test_screen import status_of

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *(
        "",
        "launch",
        "agent",
        "coordinator",
        "plan",
        "status",
        "timeline",
        "report",
        "page",
        "export",
        "inject",
        "drain",
    ),
    *("join", "bench", "bench recovery", "bench control", "bench overhead", "simulate", "check", "doctor", "patch"),
    *("demo", "examples", "schema"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_prints(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0 and "usage: " in capsys.readouterr().out


def test_no_command_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out.split("{")[1].split("}")[0].split(",")
    assert set(listed) == {command.split()[0] for command in COMMANDS if command}


def test_who_stops_reading_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "deadpool_megatron.cli", "plan", "--config", str(ROOT / "configs" / "7b_64.yaml")]
    plan = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert plan.stdout is not None and plan.stderr is not None
    plan.stdout.close()
    assert plan.stderr.read() == b"" and plan.wait() == 141


def test_who_stops_reading_a_status_gets_no_line_either(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps(status_of(4096) | {"phase": "ended"}))
    command = [sys.executable, "-m", "deadpool_megatron.cli", "status", "--run-dir", str(tmp_path), "--json", "--watch"]
    status = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert status.stdout is not None and status.stderr is not None
    status.stdout.close()
    assert status.stderr.read() == b"" and status.wait() == 141


@pytest.mark.parametrize("text", ["", '{"phase": "tr', "{}", "[]", "\0\0"])
@pytest.mark.parametrize("command", ["status", "inject", "drain", "join"])
def test_a_file_that_was_copied_in_part_is_one_line(
    command: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "status.json" if command == "status" else "job.json"
    (tmp_path / name).write_text(text)
    more = ["--node", "0"] if command in ("inject", "drain") else []
    assert cli.main([command, "--run-dir", str(tmp_path), *more]) == 2
    why = "is not whole: was it copied while the job ran, or is it of another version?"
    assert capsys.readouterr().err == f"deadpool: {tmp_path / name} {why}\n"


@pytest.mark.parametrize("command", ["status", "timeline", "report", "inject", "drain", "join"])
def test_every_command_takes_the_run_directory_alike(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--node", "0"] if command in ("inject", "drain") else []
    assert cli.main([command, *more]) == 2
    assert str(Path("runs") / "latest") in capsys.readouterr().err
    assert cli.main([command, *more, "--run-dir", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err


def _launch(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    local.add_launch_arguments(parser)
    return parser.parse_args([*options, "script.py"])


@pytest.mark.parametrize("seconds", ["0", "nan", "inf"])
def test_a_fault_that_would_last_for_ever_or_no_time_is_refused(
    seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = ["--node", "0", "--fault", "slow", "--at-iteration", "1", "--seconds", seconds]
    assert cli.main(["inject", "--run-dir", str(tmp_path), *fault]) == 2
    assert "--fault slow needs --seconds" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["launch", "agent", "coordinator"])
def test_a_flag_of_the_script_before_it_is_told_where_it_belongs(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--deadpool"], ["--deadpool-lease", "3"], ["--lr=1"]):
        with pytest.raises(SystemExit) as end:
            cli.main([command, *flags, "script.py"])
        said = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and said.endswith(
            f"unrecognized arguments: {flags[0]}; the flags of the script, --deadpool among them, stand behind it"
        )


def test_whose_output_is_shown_is_all_none_or_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert [_launch("--tee", text).tee for text in ("all", "none", "12")] == ["all", "none", "12"]
    with pytest.raises(SystemExit):
        _launch("--tee", "foo")
    assert "neither all nor none nor a rank" in capsys.readouterr().err


def test_several_nodes_of_one_machine_are_hinted_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert local.run(_launch("--nnodes", "4")) == 2
    assert "--local-nodes 4" in capsys.readouterr().err


def test_a_typo_in_a_plans_megatron_flag_is_refused_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    run = yaml.safe_load((ROOT / "configs" / "7b_64.yaml").read_text())
    run["megatron"]["micro-batch-sise"] = run["megatron"].pop("micro-batch-size")
    path.write_text(yaml.safe_dump(run))
    with pytest.raises(PlanError, match="Megatron has no --micro-batch-sise; did you mean 'micro-batch-size'"):
        load(str(path))


def test_no_machine_is_advised_to_share_more_memory_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = argparse.Namespace(total=23 << 30)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    found = machine._shared_memory("/dev/shm", 200 << 30)
    assert found.state == "fail" and "has 23.0 GiB of memory" in found.found and "mount" not in found.mend


def test_who_waits_for_the_first_node_is_told_so_and_not_of_the_file_system_alone(tmp_path: Path) -> None:
    why = SecretSource(None, {}, str(tmp_path), "job").why_none()
    assert "has not begun yet on the machine of the coordinator" in why and "job.json" in why


def test_a_job_without_a_word_of_its_end_is_no_traceback(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.error(1, "")
    assert (tmp_path / "error.json").exists()
