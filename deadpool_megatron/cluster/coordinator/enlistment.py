"""Which agent becomes which node, decided before it joins: pure.

`deadpool launch` numbers its agents itself. Agents that were started one by one, each on its machine, ask first. An
agent may name its node or leave the choice to the coordinator; all of a job do the one or the other. Who comes for the
place of a lost node (a machine that is back, a pod that was made again) becomes a spare of a new number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import JobSpec


class Enlistment:
    """Answers requests for a place in one job.

    Args:
        flags: the DeadPool settings of the coordinator; those of every agent must be the same.
        job_id: the job's name.
        store_port: where the rendezvous store of the process groups listens.
    """

    def __init__(self, job: JobSpec, flags: Sequence[str], job_id: str, store_port: int) -> None:
        self._job = job
        self._flags = list(flags)
        self._job_id = job_id
        self._store_port = store_port
        self._by_token: dict[str, int] = {}
        self._hosts: dict[int, str] = {}
        self._left: set[int] = set()  # nodes whose command has ended, or lost its connection

    def answer(self, request: r.Enlist, joined: Collection[int], gone: Collection[int] = ()) -> r.Enlisted | None:
        """The place of this agent, or why it gets none. A request that was answered before gets the same answer.

        Args:
            joined: nodes whose agent has joined, however it got its number.
            gone: of them, those that have left the job.

        Returns:
            None when it comes for the place of one that is gone: see `comes_back`.
        """
        if request.token in self._by_token:
            return self._place(self._by_token[request.token])
        job = self._job
        for flag, theirs, ours in (
            ("--nnodes", request.nodes, job.nodes),
            ("--spare-nodes", request.spare_nodes, job.spare_nodes),
            ("--nproc-per-node", request.slots_per_node, job.slots_per_node),
            ("DeadPool settings", " ".join(request.flags) or "none", " ".join(self._flags) or "none"),
        ):
            if theirs != ours:
                return self._no(
                    f"{request.host} was started with {flag} {theirs}, the coordinator with {ours}: give every node "
                    "the same"
                )
        # (a command that has ended before its agent joined may be given again on its machine)
        again = {n for n in self._left if n not in joined and self._hosts[n] == request.host}
        taken = (set(joined) | set(self._hosts)) - again
        node = request.node
        if node is None:
            free = [n for n in range(job.nodes) if n not in taken]
            if not free and gone:
                return None
            if not free:
                return self._no(f"all {job.nodes} nodes of the job are there already; {request.host} is one too many")
            node = free[0]
        elif not 0 <= node < job.nodes:
            return self._no(f"--node-rank {node}: the job has nodes 0 to {job.nodes - 1}")
        elif node in gone:
            return None
        elif node in taken:
            return self._no(
                f"--node-rank {node} of {request.host} is taken by {self._hosts.get(node, 'another agent')}: give "
                "every node a rank of its own, or none of them one"
            )
        return self.comes_back(request, node)

    def left(self, token: str) -> None:
        """The connection over which a place was asked for has ended."""
        if token in self._by_token:
            self._left.add(self._by_token[token])

    def comes_back(self, request: r.Enlist, node: int) -> r.Enlisted:
        """The answer to an agent that has become the spare ``node``."""
        self._by_token[request.token] = node
        self._hosts[node] = request.host
        self._left.discard(node)
        return self._place(node)

    def _place(self, node: int) -> r.Enlisted:
        return r.Enlisted(node, self._job_id, self._store_port, "")

    def _no(self, error: str) -> r.Enlisted:
        return r.Enlisted(-1, self._job_id, self._store_port, error)
