"""What `deadpool agent` makes of torchrun's options and environment, whom it lets in, what it refuses in one line."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

import msgspec
import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec
from deadpool_megatron.launcher import add_agent_arguments
from deadpool_megatron.launcher.agent_options import AgentPlan, check_agent
from deadpool_megatron.launcher.plan import LaunchError
from deadpool_megatron.launcher.secret import SecretSource


def plan(tmp_path: Path, options: str, script: str = "", env: dict[str, str] | None = None) -> AgentPlan:
    (tmp_path / "train.py").write_text("")
    parser = argparse.ArgumentParser()
    add_agent_arguments(parser)
    return check_agent(parser.parse_args([*options.split(), str(tmp_path / "train.py"), *script.split()]), env or {})


HERE = "--rdzv-endpoint node0:29400"
REFUSED = {
    "no endpoint": ("--nnodes 2", "--nnodes 2 needs --rdzv-endpoint"),
    "elastic": (f"--nnodes 1:4 {HERE}", "--nnodes 1:4: the number of nodes is fixed"),
    "nodes in words": (f"--nnodes two {HERE}", "--nnodes two: not a whole number"),
    "rank beyond": (f"--nnodes 2 --node-rank 2 {HERE}", "--node-rank 2: with --nnodes 2 there are nodes 0 to 1"),
    "another rendezvous": (f"--nnodes 2 --rdzv-backend etcd {HERE}", "--rdzv-backend etcd"),
    "module": (f"--nnodes 2 -m {HERE}", "there is no such module here"),
    "no python": (f"--nnodes 2 --no-python {HERE}", "--no-python"),
    "port": ("--nnodes 2 --rdzv-endpoint h:70000", "h:70000: a port is between"),
    "port in words": ("--nnodes 2 --rdzv-endpoint h:x", "--rdzv-endpoint port x: not a whole number"),
    "no node": (f"--nnodes 0 {HERE}", "--nnodes 0: at least 1 node"),
    "no host": ("--nnodes 2 --rdzv-endpoint a..b:29400", "--rdzv-endpoint: must be the name of a host or an IPv4"),
    "no address": (f"--nnodes 2 --local-addr 10.0.0.256 {HERE}", "--local-addr: must be the name of a host or an IPv4"),
    "wait for ever": (f"--nnodes 2 --rdzv-conf join_timeout=inf {HERE}", "join_timeout=inf: the seconds must be a num"),
    "wait": (f"--nnodes 2 --rdzv-conf join_timeout=soon {HERE}", "--rdzv-conf join_timeout=soon"),
    "only spares": (f"--nnodes 2 --spare-nodes 2 {HERE}", "--nnodes 2 counts all nodes, spares included"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    options, why = REFUSED[case]
    with pytest.raises(LaunchError) as refused:
        plan(tmp_path, options, "--deadpool")
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_who_does_not_start_the_workers_has_none_stand_by_for_them(tmp_path: Path) -> None:
    script = "--deadpool --deadpool-standby-workers imports"
    assert plan(tmp_path, f"--nnodes 2 {HERE}", script).launch.config.standby_workers == "imports"
    with pytest.raises(LaunchError, match="--deadpool-standby-workers: another launcher starts the workers"):
        plan(tmp_path, f"--nnodes 2 --adopt x {HERE}", script)


def test_the_names_of_torchrun_mean_what_they_mean_there(tmp_path: Path) -> None:
    made = plan(
        tmp_path,
        "--nnodes 3:3 --nproc_per_node 8 --node_rank 2 --master_addr 10.0.0.1 --master_port 1234 --rdzv_id job7 "
        f"--log_dir {tmp_path}/logs --spare-nodes 1",
        "--deadpool",
    )
    assert (made.launch.nodes, made.launch.spare_nodes, made.launch.slots_per_node) == (3, 1, 8)
    assert (made.endpoint, made.node, made.hosts, made.job_name) == (("10.0.0.1", 1234), 2, False, "job7")
    assert made.launch.log_dir == made.launch.run_dir == f"{tmp_path}/logs"


def test_the_environment_counts_where_no_option_is_given(tmp_path: Path) -> None:
    env = {"PET_NNODES": "4", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "h:5"}
    made = plan(tmp_path, "", env=env)
    assert (made.launch.nodes, made.launch.slots_per_node, made.node, made.endpoint) == (4, 2, 0, ("h", 5))
    assert made.hosts, "node 0 has the coordinator"
    assert plan(tmp_path, "--no-coordinator", env=env).hosts is False
    assert plan(tmp_path, "--nnodes 2", env={"MASTER_ADDR": "h", "MASTER_PORT": "7"}).endpoint == ("h", 7)
    assert plan(tmp_path, "--nnodes 2 --rdzv-endpoint h").endpoint == ("h", 29500)


def test_a_batch_script_is_not_taken_for_a_step_of_one_task_a_node(tmp_path: Path) -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "4"}
    assert plan(tmp_path, f"--nnodes 4 {HERE}", env=batch).node is None
    step = batch | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_PROCID": "3"}
    assert plan(tmp_path, f"--nnodes 4 {HERE}", env=step).node == 3
    assert plan(tmp_path, f"--nnodes 8 {HERE}", env=step).node is None


# ---- the secret


def test_a_secret_others_could_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    for content, mode, why in (("ab" * 32, 0o604, "chmod 600"), ("ab" * 31, 0o600, "64 hexadecimal digits")):
        file.write_text(content)
        file.chmod(mode)
        with pytest.raises(LaunchError, match=why):
            SecretSource(str(file), {}, str(tmp_path), "none")
    with pytest.raises(LaunchError, match="does not exist"):
        SecretSource(str(tmp_path / "nowhere"), {}, str(tmp_path), "none")
    with pytest.raises(LaunchError, match="DEADPOOL_SECRET: expected 64"):
        SecretSource(None, {"DEADPOOL_SECRET": "word"}, str(tmp_path), "none")


def test_jobs_of_different_names_have_different_keys_and_those_of_one_name_the_same(tmp_path: Path) -> None:
    env = {"DEADPOOL_SECRET": "ab" * 32}
    one, same, other = (SecretSource(None, env, str(tmp_path), name) for name in ("a", "a", "b"))
    assert one.make() == same.find() != other.find()
    assert one.make() != bytes.fromhex("ab" * 32)


def test_without_a_given_secret_it_comes_from_the_run_directory_of_the_same_user_alone(tmp_path: Path) -> None:
    source = SecretSource(None, {}, str(tmp_path), "none")
    assert source.find() is None and "DEADPOOL_SECRET_FILE" in source.why_none()
    assert source.make() != source.make()
    job = tmp_path / "job.json"
    job.write_text('{"secret": "' + "cd" * 32 + '"}')
    job.chmod(0o600)
    assert source.find() == bytes.fromhex("cd" * 32)
    job.chmod(0o640)
    with pytest.raises(LaunchError, match="can be read by others"):
        source.find()


# ---- who becomes which node


def _enlistment(nodes: int = 3) -> Enlistment:
    return Enlistment(JobSpec(nodes, 1, 2, True, Deadlines(5, 30, 600, 20)), ["--deadpool"], "job", 77)


def _told(office: Enlistment, request: r.Enlist, joined: Collection[int] = ()) -> r.Enlisted:
    answer = office.answer(request, joined)
    assert answer is not None
    return answer


def _ask(token: str, node: int | None = None, nodes: int = 3, flags: str = "--deadpool") -> r.Enlist:
    return r.Enlist(token, f"host-{token}", node, nodes, 1, 2, flags.split())


def test_agents_get_the_lowest_free_number_and_a_repeated_question_the_same_answer() -> None:
    office = _enlistment()
    assert [_told(office, _ask(t)).node for t in "aba"] == [0, 1, 0]
    assert _told(office, _ask("c")) == r.Enlisted(2, "job", 77, "")
    assert "one too many" in _told(office, _ask("d")).error
    assert _told(office, _ask("b")).node == 1


def test_a_command_that_ended_before_its_agent_joined_may_be_given_again_on_its_machine() -> None:
    """Else its place is taken by nobody, until the others have waited for it in vain."""
    for node in (None, 1):
        office = _enlistment()
        assert [_told(office, _ask(t)).node for t in "abc"] == [0, 1, 2]
        office.left("b")
        again = msgspec.structs.replace(_ask("d", node), host="host-b")
        assert _told(office, _ask("e", node)).error, "another machine"
        assert _told(office, again, {0, 1, 2}).error, "its agent joined: only the connection has ended"
        assert _told(office, again, {0, 2}).node == 1
        assert _told(office, msgspec.structs.replace(again, token="f"), {0, 2}).error, "it is taken again"


def test_a_number_is_given_once_even_when_its_holder_joined_before_this_coordinator_lived() -> None:
    office = _enlistment()
    assert _told(office, _ask("a", 1)).node == 1
    assert "taken by host-a" in _told(office, _ask("b", 1)).error
    assert "taken by another agent" in _told(office, _ask("b", 2), {2}).error
    assert _told(office, _ask("b"), {2}).node == 0
    assert "nodes 0 to 2" in _told(office, _ask("c", 3)).error


def test_agents_that_were_started_otherwise_get_no_place() -> None:
    office = _enlistment()
    assert "--nnodes 4, the coordinator with 3" in _told(office, _ask("a", nodes=4)).error
    assert "DeadPool settings none, the coordinator with --deadpool" in _told(office, _ask("a", flags="")).error
    assert _told(office, _ask("a")).node == 0, "and nothing is remembered of the attempts"


def test_who_comes_for_the_place_of_a_lost_node_becomes_a_new_spare_and_keeps_that_place() -> None:
    office = _enlistment()
    for node in range(3):
        _told(office, _ask(f"first-{node}", node))
    assert "taken by" in _told(office, _ask("again", 1), {0, 1, 2}).error, "it is not lost yet"
    assert office.answer(_ask("again", 1), {0, 1, 2}, gone={1}) is None
    assert office.answer(_ask("any"), {0, 1, 2}, gone={1}) is None
    assert office.comes_back(_ask("again", 1), 3).node == 3
    assert _told(office, _ask("again", 1), {0, 1, 2, 3}).node == 3, "asked again, answered the same"
