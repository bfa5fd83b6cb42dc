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

_TOO_OFTEN = 2  # has a machine failed of late that is to bring a replica back: each time costs two new starts


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
        """The job goes on with fewer replicas if spares run out: its nodes can hold some."""
        wanted = self.job.when_out_of_spares == "shrink"
        return wanted and self.replicas() > 0 and self.members.can_begin_anew

    def can_grow(self) -> bool:
        """The job has fewer replicas than at first, and more than it has now would fit on the nodes that train and the
        spares that are parked, found fit, and have not failed again and again.

        What is left to train gets shorter by more than an iteration then: a new start takes longer than that.
        """
        layout, members = self.layout, self.members
        if self.job.when_out_of_spares != "shrink" or not 0 < layout.width < self.widest:
            return False
        more = (width := self._fitting(self._at_hand())) - layout.width
        left = layout.iterations - self.progress.committed
        pays = not layout.iterations or left * more > width
        return more > 0 and pays and not self.durability.leaves and members.can_begin_anew

    def _at_hand(self) -> int:
        members = self.members
        trains = [node for node in members.active() if members.nodes[node].role == "active"]
        looked_at = [n for n in members.ready_spares() if members.nodes[n].checked or not self.job.spare_check_s]
        ready = [node for node in looked_at if not members.unfit(node)]
        return len(trains) + len([node for node in ready if members.failures(node) < _TOO_OFTEN])

    @property
    def widest(self) -> int:
        """Replicas at first; 0: not known yet."""
        return self.job.world_size // self.layout.replica if self.layout.replica else 0

    def replicas(self) -> int:
        """The most replicas, and no more than at first, that the healthy nodes can hold; 0: none.

        Nodes that are not parked, or not fit, keep a replica in the job where they have to, and bring none back.
        """
        most, width = self._fitting(len(self.members.healthy())), self.layout.width
        return most if most <= width else max(width, self._fitting(self._at_hand()))

    def _fitting(self, nodes: int) -> int:
        layout = self.layout
        for width in sorted({*layout.widths, layout.width, self.widest}, reverse=True):
            wanted = placing.nodes_for(width, layout.replica, self.job.slots_per_node)
            if wanted is not None and wanted <= nodes:
                return width
        return 0
