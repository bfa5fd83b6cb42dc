"""A rank finds its node, its agent's command and its coordinator in what any launcher tells it."""

from __future__ import annotations

import pytest

from deadpool_megatron.config import ConfigError, DeadpoolConfig
from deadpool_megatron.intree.attach import Place, agent_command, place_of

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "6000",
}
CONFIG = DeadpoolConfig(deadpool=True, spare_nodes=1)


def test_torchruns_environment_names_the_place() -> None:
    assert place_of(TORCHRUN, CONFIG) == Place(2, 4, 1, 2, 1, "10.0.0.1:6001")


def test_slurms_own_environment_does_too() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}
    master = {k: TORCHRUN[k] for k in ("MASTER_ADDR", "MASTER_PORT")}
    assert place_of(slurm | master, CONFIG) == place_of(TORCHRUN, CONFIG)


def test_the_coordinator_can_be_somewhere_else() -> None:
    elsewhere = DeadpoolConfig(deadpool=True, rendezvous="head:7000")
    assert place_of(TORCHRUN, elsewhere).endpoint == "head:7000"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": ""}, "RANK (or SLURM_PROCID) is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many', not a whole number"),
        ({"WORLD_SIZE": "7"}, "not a multiple of LOCAL_WORLD_SIZE 2"),
        ({"RANK": "4"}, "number the ranks node by node"),
        ({"RANK": "9"}, "number the ranks node by node"),
        ({"LOCAL_WORLD_SIZE": "0"}, "not a multiple"),
    ],
)
def test_what_does_not_fit_together_is_told_in_one_line(changed: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as info:
        place_of(TORCHRUN | changed, CONFIG)
    assert said in str(info.value) and "\n" not in str(info.value)


def test_nodes_of_one_machine_and_jobs_of_one_node_do_not_meet() -> None:
    place = place_of(TORCHRUN, CONFIG)
    neighbour = place_of(TORCHRUN | {"RANK": "3"}, CONFIG)
    other_job = place_of(TORCHRUN | {"MASTER_PORT": "6010"}, CONFIG)
    assert len({place.socket_name, neighbour.socket_name, other_job.socket_name}) == 3
    assert place_of(TORCHRUN | {"RANK": "4", "LOCAL_RANK": "0"}, CONFIG).socket_name == place.socket_name


def test_the_agent_is_told_the_place_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADPOOL_SECRET", "ab" * 32)
    command = agent_command(place_of(TORCHRUN, CONFIG), CONFIG, "/x/pretrain_gpt.py", ["--deadpool", "--lr", "1"])
    text = " ".join(command)
    assert "agent --nnodes 4 --spare-nodes 1 --nproc-per-node 2 --node-rank 2 --rdzv-endpoint 10.0.0.1:6001" in text
    assert text.endswith("/x/pretrain_gpt.py --deadpool --lr 1") and "ab" * 32 not in text
