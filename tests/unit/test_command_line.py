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
from deadpool_megatron.options import Parser, host_name
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
        "nodes",
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


def test_a_job_whose_output_nobody_reads_ends_as_it_ends(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('a line')")
    command = [sys.executable, "-m", "deadpool_megatron.cli", "launch", "--emulate-cpu", "--run-dir", "run", "train.py"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    assert job.stderr.read() == b"" and job.wait() == 0


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


_NUMBERS = {  # commands with what they need besides, and their options that are numbers
    "launch train.py": "--local-nodes --spare-nodes",
    "agent train.py": "--spare-nodes",
    "inject --node 1": "--node --local --at-iteration --at-tick --seconds",
    "drain --node 1": "--node --timeout",
    "page": "--port",
    "simulate": "--gpus --failures-per-1000-node-days --trace-nodes --days --runs --spares --seed --repair --save",
    "check": "--nproc-per-node --nodes",
    "doctor": "--vault-gib --nnodes --node-rank --mib --deadline",
    "demo": "--node --iteration --tick --iterations --active-nodes",
}


@pytest.mark.parametrize("command", _NUMBERS)
def test_what_is_no_number_that_an_option_can_have_is_one_line_with_its_name(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *more = command.split()
    for option in _NUMBERS[command].split():
        for value in ("nan", "inf", "-1", "", "two", "\u0663", "1_0", "1e400"):
            with pytest.raises(SystemExit) as end:
                cli.main([name, f"{option}={value}", *more])
            said = capsys.readouterr().err
            assert end.value.code == 2 and said.startswith(f"deadpool: {option}: must be ") and said.count("\n") == 1


def test_every_number_on_a_command_line_is_judged_by_that_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(Parser, "parse_args", lambda self, *given: parsers.append(self) or sys.exit(0))
    with pytest.raises(SystemExit):
        cli.main([])
    (commands,) = (a for a in parsers[0]._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        if name != "plan":  # the whole of its file is judged, with what is given there
            assert not [a for a in parser._actions if a.type in (int, float)], name


@pytest.mark.parametrize("host", ["a..b", "", "\u00fc", "a b", "host:80", "::1", "10.0.0.256", "-a", "x" * 64])
def test_what_can_be_no_host_is_one_line(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["join", "--run-dir", str(tmp_path), f"--host={host}"])
    assert capsys.readouterr().err == f"deadpool: --host: must be the name of a host or an IPv4 address, not {host!r}\n"


def test_hosts_by_all_their_names_are_taken() -> None:
    for name in ("localhost", "10.0.0.1", "node-0.job_7", "a.b.example.org.", "3com", "job-coordinator-0-0.job"):
        assert host_name(name) == name


def _launch(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    local.add_launch_arguments(parser)
    return parser.parse_args([*options, "script.py"])


def test_a_fault_that_would_last_no_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = ["--node", "0", "--fault", "slow", "--at-iteration", "1", "--seconds", "0"]
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
