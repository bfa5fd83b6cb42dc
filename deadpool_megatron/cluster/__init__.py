"""Who is where: the agent of each node, the coordinator, and the records they exchange."""

from deadpool_megatron.cluster.agent_process import AgentProcess
from deadpool_megatron.cluster.coordinator import Coordinator, CoordinatorSettings
from deadpool_megatron.cluster.core import Core, Deadlines, JobSpec, Phase
from deadpool_megatron.cluster.durability import DurableSpec
from deadpool_megatron.cluster.enlistment import Enlistment
from deadpool_megatron.cluster.exits import Exit
from deadpool_megatron.cluster.link import Spoke
from deadpool_megatron.cluster.settings import AgentSettings

__all__ = [
    "AgentProcess",
    "AgentSettings",
    "Coordinator",
    "CoordinatorSettings",
    "Core",
    "Deadlines",
    "DurableSpec",
    "Enlistment",
    "Exit",
    "JobSpec",
    "Phase",
    "Spoke",
]
