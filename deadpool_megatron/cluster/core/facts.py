"""What the coordinator knows of the job. The parts of its decisions share it, and each changes its own side of it."""

from __future__ import annotations

from dataclasses import dataclass

from deadpool_megatron.cluster.core.durable import Durability
from deadpool_megatron.cluster.core.headway import Headway
from deadpool_megatron.cluster.core.job import JobSpec
from deadpool_megatron.cluster.core.layout import Layout
from deadpool_megatron.cluster.core.members import Members
from deadpool_megatron.cluster.core.protection import Protection


@dataclass(frozen=True, slots=True)
class Facts:
    """What the job is, who is in it, what its ranks plan, how far it is, what protects it."""

    job: JobSpec
    members: Members
    layout: Layout
    headway: Headway
    protection: Protection
    durability: Durability
