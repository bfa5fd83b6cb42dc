"""What the coordinator knows of the job. The parts of its decisions share it, and each changes its own side of it."""

from __future__ import annotations

from dataclasses import dataclass

from deadpool_megatron.cluster.core.durable import Durability
from deadpool_megatron.cluster.core.job import JobSpec, Phase
from deadpool_megatron.cluster.core.layout import Layout
from deadpool_megatron.cluster.core.members import Members
from deadpool_megatron.cluster.core.progress import Progress
from deadpool_megatron.cluster.core.protection import Protection
from deadpool_megatron.cluster.core.spares import Spares


@dataclass(slots=True)
class JobState:
    """What the job is, who is in it, what its ranks plan, how far it is, what protects it, who takes over.

    Attributes:
        phase: where the job stands, apart from recoveries: it is RUNNING during one. `Core` alone changes it.
        end: exit code and message, once they are decided.
    """

    job: JobSpec
    members: Members
    layout: Layout
    progress: Progress
    protection: Protection
    durability: Durability
    spares: Spares
    phase: Phase = Phase.STARTING
    end: tuple[int, str] | None = None
