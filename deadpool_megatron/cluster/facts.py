"""What the coordinator knows of the job. The parts of its decisions share it, and each changes its own side of it."""

from __future__ import annotations

from dataclasses import dataclass

from deadpool_megatron.cluster.durability import Durability
from deadpool_megatron.cluster.headway import Headway
from deadpool_megatron.cluster.job import JobSpec
from deadpool_megatron.cluster.layout import Layout
from deadpool_megatron.cluster.members import Members
from deadpool_megatron.cluster.protection import Protection

__all__ = ["Facts"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the job is, who is in it, what its ranks plan, how far it is, what protects it."""

    job: JobSpec
    members: Members
    layout: Layout
    headway: Headway
    protection: Protection
    durability: Durability
