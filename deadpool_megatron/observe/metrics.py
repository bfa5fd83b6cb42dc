"""Prometheus metrics of one node, served over HTTP by its agent (`--deadpool-metrics-port`).

Names and units after https://prometheus.io/docs/practices/naming/. Every node serves its own; what concerns the whole
job (epoch, committed generation) each of them serves as it knows it, so a query takes the maximum over nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    start_http_server,
)

from deadpool_megatron import __version__

_FAST = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_ITERATION = (0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)


class NodeMetrics:
    """All metrics of a node. Setting one is a few microseconds in the agent's loop, never in a worker.

    Args:
        node: the node's number.
        job_id: which job.
        vault_bytes: bytes of shared memory by kind of copy (own, peer); called when Prometheus asks.
    """

    def __init__(self, node: int, job_id: str, vault_bytes: Callable[[str], float]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"deadpool_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"deadpool_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _FAST) -> Histogram:
            return Histogram(f"deadpool_{name}", text, labels, buckets=buckets, registry=registry)

        info = Info("deadpool_agent", "Which agent this is.", registry=registry)
        info.info({"node": str(node), "job_id": job_id, "version": __version__})
        self.spare = gauge("node_spare", "1 while this node is a spare, 0 while it holds coordinates.")
        self.coordinates = gauge("node_coordinates", "Coordinates this node holds.")
        self.job_coordinates = gauge("job_coordinates", "Coordinates of the whole job: fewer when it has shrunk.")
        self.standbys = gauge("standby_workers", "Processes that can take the place of a worker of this node now.")
        self.epoch = gauge("epoch", "Number of the assignment this node works under.")
        self.committed = gauge("committed_generation", "Newest generation committed by the whole job.")
        self.committed_epoch = gauge("committed_epoch", "Epoch in which the newest generation was committed; below "
                                     "deadpool_epoch the job is not fully protected.")  # fmt: skip
        self.behind = gauge("iterations_uncommitted", "Iterations begun since the newest committed generation: what a "
                            "loss costs now.")  # fmt: skip
        self.iteration = gauge("iteration", "Last complete iteration that a coordinate of this node reported.")
        self.recovering = gauge("recovering", "1 from the declaration of an epoch until this node trains again.")
        self.iteration_seconds = histogram(
            "iteration_seconds", "Length of iterations, reported by this node.", buckets=_ITERATION
        )
        self.blocked = counter("blocked_seconds_total", "Time a reporting rank's training thread spent in DeadPool.")
        self.copied = counter("snapshot_bytes_total", "Bytes a reporting rank has copied into the vault.")
        self.skipped = counter("skipped_generations_total", "Generations a reporting rank found no free slot for.")
        self.commit_seconds = histogram(
            "shard_commit_seconds", "From a snapshot's first byte until the shard is complete here and at its peer."
        )
        self.replicated = counter("replicated_bytes_total", "Bytes of own shards that are complete at the peer.")
        self.recoveries = counter("recoveries_total", "Recoveries this node took part in, by their end.", "end")
        self.recovery_step = histogram(
            "recovery_step_seconds", "Time from the declaration of an epoch until this node reached a step.", "step"
        )
        self.worker_exits = counter("worker_exits_total", "Ends of worker processes.", "how")
        self.fetch_failures = counter("fetch_failures_total", "Lost shards that the named source could not give.")
        vault = gauge("vault_bytes", "Shared memory of the vault.", "kind")
        for kind in ("own", "peer"):
            vault.labels(kind).set_function(functools.partial(vault_bytes, kind))
        self._server: Any = None

    def serve(self, port: int, host: str = "0.0.0.0") -> int:
        """Answer on ``port`` from a thread; returns the port (another when 0 was given). Raises OSError."""
        self._server, _ = start_http_server(port, host, self.registry)
        return int(self._server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
