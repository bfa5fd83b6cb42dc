"""What an agent tells of its node: lines of the node's log, and metrics. It hears everything and decides nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from deadpool_megatron.cluster import records as r
from deadpool_megatron.observe import NodeLog
from deadpool_megatron.vault import Vault, unpack

if TYPE_CHECKING:
    from deadpool_megatron.observe.metrics import NodeMetrics


class Watch:
    """One node's observer; used by the agent's thread only.

    Args:
        log_dir: where ``node-N.jsonl`` goes.
        vault: the node's vault; None without DeadPool.
        metrics_port: where Prometheus may ask; 0 for nowhere. A port that is taken costs a line on
            stderr, not the node.
    """

    def __init__(self, node: int, job_id: str, log_dir: str, vault: Vault | None, metrics_port: int = 0) -> None:
        self._log = NodeLog(log_dir, node, aside=True)
        self._vault = vault
        self._opened: dict[tuple[int, int, int], float] = {}  # rank, epoch, generation: first byte seen
        self._copied: dict[tuple[int, int, int], float] = {}
        self._skipped: dict[int, int] = {}
        self._declared: tuple[int, float] | None = None
        self._committed = 0
        self._metrics: NodeMetrics | None = None
        if metrics_port:
            from deadpool_megatron.observe.metrics import NodeMetrics

            metrics = NodeMetrics(node, job_id, self._vault_bytes)
            try:
                port = metrics.serve(metrics_port)
            except (OSError, OverflowError) as err:  # (with its node's number it may be more than a port can be)
                why = getattr(err, "strerror", None) or err
                print(
                    f"deadpool: node {node}: --deadpool-metrics-port {metrics_port}: {why}; no metrics", file=sys.stderr
                )
            else:
                self._metrics = metrics
                self._log.write("metrics", port=port)

    def close(self) -> None:
        """Close the log and stop answering."""
        if self._metrics is not None:
            self._metrics.close()
        self._log.close()

    def pinned(self, cpus: Collection[int]) -> None:
        """The agent has bound itself to these processors, if there are any."""
        if cpus:
            self._log.write("pinned", cpus=sorted(cpus))

    # ---- shards

    def rang(self, rank: int) -> None:
        """The worker of ``rank`` has written more of its shard."""
        arena = self._vault.arena(rank, "own") if self._vault is not None else None
        if arena is None:
            return
        now = time.time()
        for slot in arena.slots:
            version = unpack(slot.begin)
            if version is None:
                continue
            key = (rank, version.epoch, version.generation)
            self._opened.setdefault(key, now)
            if slot.sealed:
                self._copied.setdefault(key, now)

    def committed(self, rank: int, epoch: int, generation: int) -> None:
        """A shard is complete in the own vault and in the peer's."""
        now = time.time()
        key = (rank, epoch, generation)
        opened = self._opened.get(key, now)
        arena = self._vault.arena(rank, "own") if self._vault is not None else None
        nbytes = arena.info.unique_bytes if arena is not None else 0
        self._log.write(
            "shard", rank=rank, epoch=epoch, generation=generation, opened=opened, copied=self._copied.get(key, now),
            stored=now, bytes=nbytes,
        )  # fmt: skip
        for table in (self._opened, self._copied):
            for old in [k for k in table if k[0] == rank and k[1:] <= (epoch, generation)]:
                del table[old]
        if self._metrics is not None:
            self._metrics.commit_seconds.observe(now - opened)
            self._metrics.replicated.inc(nbytes)

    def _vault_bytes(self, kind: str) -> float:
        if self._vault is None:
            return 0.0
        arenas = [self._vault.arena(rank, "own" if kind == "own" else "peer") for rank in self._vault.holdings().ranks]
        return float(sum(arena.info.total_bytes for arena in arenas if arena is not None))

    def warm_server(self, ready: bool, why: str) -> None:
        """This node's can fork workers, or cannot any more."""
        self._log.write("warm_server", ready=ready, why=why)

    # ---- the protocol

    def sent(self, record: r.AgentRecord) -> None:
        """The agent has told the coordinator something."""
        step = r.STEPS.get(type(record))
        m = self._metrics
        if step is not None:
            self._log.write("step", epoch=getattr(record, "epoch", 0), step=step)
            if m is not None and self._declared is not None:
                m.recovery_step.labels(step).observe(time.monotonic() - self._declared[1])
                if step == "resumed":
                    m.recovering.set(0)
                    m.recoveries.labels("resumed").inc()
            return
        match record:
            case r.WorkerReady():
                self._log.write("worker_ready", local=record.local, pid=record.pid)
            case r.Standbys():
                self._log.write("standbys", pids=sorted(record.pids.values()), why=record.why)
                if m is not None:
                    m.standbys.set(len(record.pids))
            case r.WorkerExited():
                self._log.write("worker_exited", local=record.local, rank=record.rank, pid=record.pid, code=record.code)
                if m is not None:
                    how = "signal" if record.code < 0 else "error" if record.code else "done"
                    m.worker_exits.labels(how).inc()
            case r.WorkerFailed():
                self._log.write("worker_failed", local=record.local, rank=record.rank, message=record.message)
            case r.FetchFailed():
                self._log.write("fetch_failed", rank=record.rank, source=record.source, why=record.why)
                if m is not None:
                    m.fetch_failures.inc()
            case r.Iteration() if m is not None:
                m.iteration.set(record.iteration)
                m.iteration_seconds.observe(record.seconds)
                m.blocked.inc(record.blocked_s)
                m.copied.inc(record.copied_bytes)
                skipped = record.skipped_generations  # since its worker began
                m.skipped.inc(max(0, skipped - self._skipped.get(record.rank, 0)))
                self._skipped[record.rank] = skipped
            case r.Pace() if m is not None:
                m.behind.set(max(0, record.iteration - self._committed))
            case _:
                pass

    def entered(self, epoch: int, coordinates: int, reason: str = "") -> None:
        """This node is in a new epoch, with so many coordinates. ``reason``: of the recovery that it begins with."""
        self._opened.clear()
        self._copied.clear()
        if reason:
            self._declared = (epoch, time.monotonic())
            self._log.write("declared", epoch=epoch, reason=reason, coordinates=coordinates)
        if self._metrics is not None:
            self._metrics.epoch.set(epoch)
            self._metrics.recovering.set(1 if reason and coordinates else 0)

    def received(self, record: r.CoordinatorRecord, coordinates: int, of: int) -> None:
        """The coordinator has told the agent something; ``coordinates`` is how many ``of`` all this node holds after
        it."""
        m = self._metrics
        match record:
            case r.Agree():
                self._log.write("agreed", epoch=record.epoch, generation=record.generation)
            case r.Form():
                self._log.write("form", epoch=record.epoch)
            case r.CommittedTo() if m is not None and record.kept is not None:
                m.committed.set(record.kept[1])
                self._committed = record.kept[1]
                m.committed_epoch.set(record.kept[0])
            case r.Stop():
                self._log.write("stop", code=record.code, message=record.message)
            case _:
                pass
        if m is not None:
            m.coordinates.set(coordinates)
            m.job_coordinates.set(of)
            m.spare.set(0 if coordinates else 1)
