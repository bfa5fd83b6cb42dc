"""Who is where: the agent of each node, the coordinator, and the records they exchange."""

from deadpool_megatron.cluster.agent.process import AgentProcess
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.coordinator.coordinator import Coordinator, CoordinatorSettings
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.core.core import Core, Deadlines, JobSpec, Phase
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.link.link import Spoke
from deadpool_megatron.cluster.records.exits import Exit

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
