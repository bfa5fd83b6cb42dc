"""The manifest is what Kubernetes' own schema of a JobSet allows, and `deadpool` takes its command lines."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.launcher import add_agent_arguments
from deadpool_megatron.launcher.agent_options import AgentPlan, check_agent
from deadpool_megatron.launcher.plan import LaunchError
from deadpool_megatron.planning.budget import budget
from deadpool_megatron.planning.files import load

ROOT = Path(__file__).parents[2]
HERE = ROOT / "scripts" / "kubernetes"


@pytest.fixture
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((HERE / "jobset.yaml").read_text())
    return loaded


def _problems(manifest: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((HERE / "jobset.schema.json").read_text())
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in errors]


def _job(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    (spec,) = [j["template"]["spec"] for j in manifest["spec"]["replicatedJobs"] if j["name"] == name]
    found: dict[str, Any] = spec
    return found


def _container(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    (container,) = _job(manifest, name)["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_the_manifest_is_a_jobset(manifest: dict[str, Any]) -> None:
    assert _problems(manifest) == []


def test_the_schema_refuses_misspelt_missing_and_mistyped_fields(manifest: dict[str, Any]) -> None:
    def broken(change: Any) -> list[str]:
        other = copy.deepcopy(manifest)
        change(other)
        return _problems(other)

    assert broken(lambda m: m["spec"].update(replicatedJob=[]))
    assert broken(lambda m: _job(m, "nodes").update(parallelism="66"))
    assert broken(lambda m: _container(m, "nodes").pop("name"))
    assert broken(lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="GiveUp"))
    assert broken(lambda m: m.update(apiVersion="jobset.x-k8s.io/v1"))


@pytest.fixture
def command_line(tmp_path: Path) -> Callable[[list[str]], tuple[list[str], list[str]]]:
    """What bash makes of a command: the words that `deadpool` (but for `plan`) or the script of Slurm gets, and the
    flags that are planned, some of which a shell would take apart."""
    planned = tmp_path / "configs" / "65b_a100_64x8.yaml"
    planned.parent.mkdir()
    text = (ROOT / "configs" / planned.name).read_text()
    assert "  mock-data: true\n" in text
    planned.write_text(text.replace("  mock-data: true\n", '  data-path: ["/data/a b", "it\'s $HOME *"]\n'))
    (tmp_path / "pretrain_gpt.py").write_text("")
    show = 'printf "%s\\0" "$@" > words\n'
    real = f'[ "$1" = plan ] && exec {sys.executable} -m deadpool_megatron.cli "$@"\n'
    for name, lines in (("bin/deadpool", real + show), ("scripts/slurm/run.sh", show)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("#!/usr/bin/env bash\n" + lines)
        path.chmod(0o755)

    def run(command: list[str], **environment: str) -> tuple[list[str], list[str]]:
        env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **environment}
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
        return (tmp_path / "words").read_text().split("\0")[:-1], load(str(planned)).flags()

    return run


def _plan(manifest: dict[str, Any], name: str, command: str, command_line: Callable[..., Any]) -> AgentPlan:
    """The container's command line as `deadpool` understands it, with the plan's flags filled in."""
    container = _container(manifest, name)
    env = {"JOBSET_NAME": manifest["metadata"]["name"], "RESTART": "0"}
    words, flags = command_line([*container["command"], *container["args"]], **env)
    assert words[0] == command
    script = words.index("pretrain_gpt.py")
    assert words[script + 1 : script + 1 + len(flags)] == flags
    parser = argparse.ArgumentParser()
    add_agent_arguments(parser)
    return check_agent(parser.parse_args(words[1:]), {"JOB_COMPLETION_INDEX": "65"} if name == "nodes" else {})


def test_coordinator_and_nodes_are_started_with_the_same_and_as_many_as_there_are_pods(
    manifest: dict[str, Any], command_line: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    coordinator = _plan(manifest, "coordinator", "coordinator", command_line)
    node = _plan(manifest, "nodes", "agent", command_line)
    assert coordinator.launch.arguments == node.launch.arguments
    assert (coordinator.endpoint, coordinator.job_name) == (node.endpoint, node.job_name)
    assert node.hosts is False and node.node == 65
    job = _job(manifest, "nodes")
    assert node.launch.nodes == job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    name = manifest["metadata"]["name"]
    assert node.endpoint == (f"{name}-coordinator-0-0.{name}", 29500)
    with pytest.raises(LaunchError):
        other = copy.deepcopy(manifest)
        _container(other, "nodes")["args"][0] = _container(other, "nodes")["args"][0].replace("-nodes 2", "-nodes 66")
        _plan(other, "nodes", "agent", command_line)


def test_a_plan_that_cannot_work_starts_nothing(manifest: dict[str, Any], command_line: Callable[..., Any]) -> None:
    other = copy.deepcopy(manifest)
    container = _container(other, "coordinator")
    container["args"][0] = container["args"][0].replace("configs/", "nowhere/")
    with pytest.raises(subprocess.CalledProcessError) as ended:
        _plan(other, "coordinator", "coordinator", command_line)
    assert ended.value.returncode == Exit.USAGE


def test_the_batch_script_hands_on_the_plans_flags_and_its_own_arguments(
    command_line: Callable[..., Any], tmp_path: Path
) -> None:
    script = str(ROOT / "scripts" / "slurm" / "pretrain_65b.sbatch")
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NUM_NODES": "67", "SAVE": str(tmp_path / "save")}
    words, flags = command_line(["bash", script, "--lr", "1 e"], **slurm)
    assert words[:3] == ["3", "8", "examples/pretrain_gpt.py"]
    assert words[3 : 3 + len(flags)] == flags and words[-2:] == ["--lr", "1 e"]


def test_a_node_has_the_devices_and_the_memory_its_plan_needs(manifest: dict[str, Any]) -> None:
    plan = budget(load(str(ROOT / "configs" / "65b_a100_64x8.yaml")))
    container = _container(manifest, "nodes")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    volumes = _job(manifest, "nodes")["template"]["spec"]["volumes"]
    (shm,) = [v for v in volumes if v["name"] == "shm"]
    assert int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30 > plan.vault_node
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm" and {v["name"] for v in volumes} == set(mounts)


def test_the_jobset_begins_again_for_the_codes_that_say_so_and_for_no_other(manifest: dict[str, Any]) -> None:
    evicted, rule = _job(manifest, "coordinator")["podFailurePolicy"]["rules"]
    # Before the rule on codes: an evicted coordinator leaves with that of an interruption.
    assert evicted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert Exit.INTERRUPTED not in rule["onExitCodes"]["values"]
    again = [Exit.PREEMPTED, Exit.NO_SPARE_SAVED, Exit.NO_SPARE, Exit.GENERATION_LOST, Exit.RECOVERY_FAILED]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == [int(code) for code in again]
    (policy,) = manifest["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet" and policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert manifest["spec"]["successPolicy"]["targetReplicatedJobs"] == ["coordinator"]
