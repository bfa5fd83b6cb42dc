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
from deadpool_megatron.cluster.placement import assignment as placing


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

    def can_shrink(self) -> bool:
        """The job goes on with fewer replicas if spares run out: its nodes can hold some, which begin with what is, or
        will be, durable."""
        there = self.members.present()
        wanted = self.job.when_out_of_spares == "shrink" and self.durability.can_drain
        return wanted and self.fewer() > 0 and all(self.members.nodes[node].respawns for node in there)

    def fewer(self) -> int:
        """The most replicas, and no more than there are, that the nodes which are there can hold; 0: none."""
        nodes, layout = len(self.members.healthy()), self.layout
        for width in sorted({w for w in (*layout.widths, layout.width) if 0 < w <= layout.width}, reverse=True):
            wanted = placing.nodes_for(width, layout.replica, self.job.slots_per_node)
            if wanted is not None and wanted <= nodes:
                return width
        return 0
