"""The manifest is what Kubernetes' own schema of a JobSet allows, and `deadpool` takes its command lines."""

from __future__ import annotations

import argparse
import copy
import json
import re
import shlex
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


def _plan(manifest: dict[str, Any], name: str, command: str, tmp_path: Path) -> tuple[AgentPlan, list[str]]:
    """The container's command line as `deadpool` understands it, with the plan's flags filled in."""
    (line,) = _container(manifest, name)["args"]
    config = re.search(r"\$\(deadpool plan --config (\S+) --flags\)", line)
    assert config is not None
    flags = load(str(ROOT / config[1])).flags()
    env = {"JOBSET_NAME": manifest["metadata"]["name"], "RESTART": "0"}
    line = line.replace(config[0], shlex.join(flags))
    words = shlex.split(re.sub(r"\$(\w+)", lambda m: env[m[1]], line))
    assert words[:3] == ["exec", "deadpool", command]
    parser = argparse.ArgumentParser()
    add_agent_arguments(parser)
    (tmp_path / "pretrain_gpt.py").write_text("")
    words = [str(tmp_path / "pretrain_gpt.py") if word == "pretrain_gpt.py" else word for word in words[3:]]
    return check_agent(parser.parse_args(words), {"JOB_COMPLETION_INDEX": "65"} if name == "nodes" else {}), words


def test_coordinator_and_nodes_are_started_with_the_same_and_as_many_as_there_are_pods(
    manifest: dict[str, Any], tmp_path: Path
) -> None:
    coordinator, _ = _plan(manifest, "coordinator", "coordinator", tmp_path)
    node, _ = _plan(manifest, "nodes", "agent", tmp_path)
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
        _plan(other, "nodes", "agent", tmp_path)


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
    (rule,) = _job(manifest, "coordinator")["podFailurePolicy"]["rules"]
    again = [Exit.PREEMPTED, Exit.NO_SPARE_SAVED, Exit.NO_SPARE, Exit.GENERATION_LOST, Exit.RECOVERY_FAILED]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == [int(code) for code in again]
    (policy,) = manifest["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet" and policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert manifest["spec"]["successPolicy"]["targetReplicatedJobs"] == ["coordinator"]
