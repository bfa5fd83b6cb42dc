"""One node's part in the recoveries of the job: its workers' news become the node's, what is agreed becomes theirs.

::

    coordinator                    agent of the node                       its workers
    Declare            ------->    vault refuses the old epoch,  ------->  leave their step
                                   vacant slots get fresh parked ones      Arrived, each
    all offers         <-------    Offer (at once where none has
                                   anything live), NodeArrived
    Agree              ------->    fetch or rebuild what is lost ------->  Generation, each as its shard is here
    all of each step   <-------    NodeReady, NodeFormed,        <-------  WorkerStep
                                   NodeRestored, NodeResumed

The coordinator hears of a step once, when every coordinate of the node has come to it.
"""

from __future__ import annotations

from collections.abc import Callable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.commits import Upkeep
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.faults import Faults
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.shards import FetchDone, Shards
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.vault import constants_of


class NodeRecovery:
    """Used by the agent's thread only; nothing blocks but what `Shards.holdings` has to checksum.

    Args:
        job: what this node knows of the job; follows what is declared.
        faults: told to workers that start in a recovery.
        send: sends a record to the coordinator.
    """

    def __init__(
        self,
        job: KnownJob,
        crew: Crew,
        shards: Shards,
        upkeep: Upkeep,
        faults: Faults,
        send: Callable[[r.AgentRecord], None],
    ) -> None:
        self._job = job
        self._crew = crew
        self._shards = shards
        self._upkeep = upkeep
        self._faults = faults
        self._send = send
        self._offered = -1  # the epoch of the last offer
        self._arrived = False  # every worker here, in the epoch of the offer
        self._done: dict[r.SideEffectKind, int] = {}
        self._here: set[int] = set()  # ranks of this node whose agreed shard is in its vault
        self._held = True  # vaults have all of the agreed generation
        self._holding = False

    @property
    def settled(self) -> bool:
        """Every worker of this node trains in the current epoch (or there is none that should)."""
        if self._holding:
            return False
        if self._job.declared is None:
            return True
        return not self._job.ranks or self._crew.all_reached("resumed")

    @property
    def calm(self) -> bool:
        """The workers that hold coordinates here train, and no recovery is under way."""
        mine, epoch = self._crew.mine().values(), self._job.epoch
        trains = all(each.in_loop and each.reached.get("finished", -1) != epoch for each in mine)
        return self.settled and trains and len(mine) == len(self._job.ranks)

    @property
    def _drains(self) -> bool:
        """The job ends, and only what is in memory is made durable."""
        return self._job.declared is not None and self._job.declared.purpose == "drain"

    # ---- what the coordinator says

    def start_over(self) -> None:
        """The start begins anew, in an epoch that the job has been told already."""
        self._done = {}
        self._holding = False
        self._shards.server.set_epoch(self._job.epoch)
        self._upkeep.replan(sizes_known=False)
        for worker, environment in self._crew.start_over():
            assert worker.rank is not None
            worker.send(r.TakeOver(self._job.epoch, worker.rank, self._job.world_size, environment))
        for worker in self._crew.idle():  # which the coordinator may not count, where the node had coordinates
            self._send(r.WorkerReady(self._job.node, worker.local, worker.pid))

    def set_aside(self, base: r.Base) -> None:
        """The start begins anew with what is in memory of ``base``."""
        self._shards.server.set_epoch(self._job.epoch)
        self._shards.set_aside(base)

    def resized(self) -> None:
        """There are other coordinates than before: what is in memory is of others that had their numbers."""
        self._upkeep.empty()
        self._crew.rehearse_anew()

    def declare(self, record: r.Declare) -> None:
        """A new epoch begins."""
        self._job.declare(record)
        self._done = {}
        self._holding = False
        self._shards.server.set_epoch(record.epoch)
        here, workers = self._job.ranks, self._crew.workers
        if not self._drains:
            self._crew.choose()
        if not here:
            self._crew.end_standbys()
        for worker in list(workers.values()):
            if worker.rank is None or worker.retired:
                continue
            # The coordinate is somebody else's now, and the node is healthy and parks fresh workers. Or it stays here,
            # and only its end frees the process that has trained.
            restarts = worker.registered is not None and worker.registered.restarts
            if here.get(worker.local) != worker.rank or restarts:
                self._crew.renew(worker.local)
            elif worker.exited:  # which nobody may have known who declared the epoch
                self._job.also_replaced(worker.rank)
        assert self._job.declared is not None
        for worker in self._crew.mine().values():
            worker.send(self._job.declared)
        self._upkeep.replan(sizes_known=bool(record.unique_bytes))
        self._here.clear()
        for local in here if not self._drains else ():
            if local not in workers or workers[local].exited:
                self._crew.renew(local)
        self.take_over()
        self._maybe_offer()

    def ended(self, worker: Worker) -> None:
        """A worker has ended by itself. If this node has not offered yet, who stands by takes the slot in this epoch.

        The coordinator, which hears of the end before the offer, knows by that that it needs no other epoch.
        """
        job, local = self._job, worker.local
        if job.declared is None or self._drains or self._offered == job.epoch or local not in job.ranks:
            return
        if self._crew.standbys.ready(local) is None:
            return
        job.also_replaced(job.ranks[local])
        for neighbour in self._crew.mine().values():
            neighbour.send(job.declared)  # whose kernels may wait for the one that has ended
        self._crew.renew(local)
        self.renewed()

    def asked_again(self) -> None:
        """The epoch's declaration has come once more: what a node without coordinates has offered was lost."""
        if not self._job.ranks:
            self._offered = -1
            self._maybe_offer()

    def agree(self, record: r.Agree) -> None:
        """The generation of this epoch is agreed: bring here what is not. What is in no vault comes by another way."""
        self._done = dict(record.done)
        self._held = record.held
        if record.durable:
            return
        job, shards = self._job, self._shards
        aims = job.targets() or {}
        for local, rank in job.ranks.items():
            if local in self._crew.workers:
                shards.vault.set_near(rank, self._crew.workers[local].numa)
            source = record.sources.get(rank)
            keepers = aims.get(constants_of(rank), ())
            if rank in record.rebuilds:
                shards.rebuild(record.epoch, rank, record.generation, record.rebuilds[rank], job.vaults, keepers)
            elif source is None and (version := self._with_constants(rank, record.generation)) is not None:
                own = r.Source(job.node, version[0], [])
                shards.fetch(record.epoch, rank, record.generation, own, None, (), keepers, job.vaults)
            elif source is None:
                self._hand_out(rank, record.generation, live=True)
            else:
                here = source.node == job.node
                others = [job.vaults[node] for node in source.others if node in job.vaults]
                address = None if here else job.vaults.get(source.node)
                shards.fetch(record.epoch, rank, record.generation, source, address, others, keepers, job.vaults)

    def restore_constants(self, rank: int) -> None:
        """Those here have changed in memory: who keeps them has them, and the next drain, or process, needs them."""
        keepers = (self._job.targets() or {}).get(constants_of(rank), ())
        self._shards.restore_constants(self._job.epoch, rank, keepers, self._job.vaults)

    def _with_constants(self, rank: int, generation: int) -> tuple[int, int] | None:
        """The version that is here, where the constants of its rank are read next, which may have changed in memory: by
        a worker that has not been through a recovery, nor begun with the job, or by the drainer at the end."""
        worker = self._crew.mine().get(rank)
        has = worker is None or "restored" in worker.reached or (worker.in_loop and not worker.parked)
        if (has and not self._drains) or not self._shards.path_of(constants_of(rank)):
            return None
        return self._shards.version_of(rank, generation)

    # ---- what becomes of it here

    def fetched(self, event: FetchDone) -> None:
        """A shard of the agreed generation has been brought here, or could not be."""
        if event.epoch != self._job.epoch:
            return
        if event.version is None:
            node, tried = self._job.node, event.tried
            # (a copy of its own that was found broken is given up, and another one may come in its place)
            here = event.source == node and event.share < 0 and not event.own
            gone = event.gone or (here and not self._shards.has(event.rank, (tried, event.generation)))
            self._send(
                r.FetchFailed(
                    event.epoch, node, event.rank, event.source, event.generation, event.error, tried, event.own, gone,
                    event.share,
                )
            )  # fmt: skip
        else:
            self._hand_out(event.rank, event.generation, event.version)

    def _hand_out(self, rank: int, generation: int, version: tuple[int, int] | None = None, live: bool = False) -> None:
        """The agreed generation is here: tell the worker, and keep that version until a newer one is committed.

        Not where it is live state alone somewhere: if that is lost, all go back to what is committed. ``live``: a
        worker that has this generation live goes on with that.
        """
        job, version = self._job, version or self._shards.version_of(rank, generation)
        drains = self._drains
        worker = self._crew.mine().get(rank)
        if version is not None:
            if self._held:
                self._shards.set_kept(job.epoch, version, 0)
        elif drains or (worker is not None and (worker.arrived is None or worker.arrived.live != generation)):
            why = f"node {job.node} has given up its copy of rank {rank} since it was offered"
            self._send(r.FetchFailed(job.epoch, job.node, rank, job.node, generation, why, gone=True))
            return
        if drains:
            self._here.add(rank)
            if self._here >= set(job.ranks.values()):
                self._send(r.NodeReady(job.epoch, job.node))
            return
        if worker is not None:
            epoch = version[0] if version is not None else -1
            path = self._shards.path_of(rank)
            worker.send(r.Generation(self._job.epoch, generation, epoch, path, self._done, live=live))
        self._upkeep.aim()

    def unreadable(self, worker: Worker, record: r.Unreadable) -> None:
        """The copy that was handed out could not be used: as good as one that could not be fetched from here."""
        node = self._job.node
        if record.epoch == self._job.epoch and worker.rank is not None:
            rank, generation, version_epoch = worker.rank, record.generation, record.version_epoch
            source = node if version_epoch >= 0 else -1
            worker.broken = r.FetchFailed(record.epoch, node, rank, source, generation, record.why, version_epoch)
            self._send(worker.broken)
            if version_epoch >= 0:
                self._shards.recheck(worker.rank)

    def take_over(self) -> None:
        """Have parked workers become the coordinates that the assignment has for them."""
        if self._drains:
            return  # agents do all there is to do
        for worker in self._crew.give_coordinates():
            assert worker.rank is not None
            if worker.rehearses is not None or worker.standby:  # another process than was told of
                self._send(r.WorkerReady(self._job.node, worker.local, worker.pid))
            if self._job.declared is not None:
                worker.send(self._job.declared)  # one started since then has not heard of it
            self._faults.send_bugs(worker)
            worker.send(r.TakeOver(self._job.epoch, worker.rank, self._job.world_size))

    def renewed(self) -> None:
        """A fresh process has been started in the place of one that has ended."""
        self.take_over()
        self._maybe_offer()

    # ---- what workers say

    def arrived(self, worker: Worker, record: r.Arrived) -> None:
        """A worker has left its step, or a spare's can form its groups."""
        worker.arrived = record
        if self._offered == self._job.epoch and not self._arrived and self._all_arrived():
            self._arrived = True
            self._send(r.NodeArrived(self._job.epoch, self._job.node))
        self._maybe_offer()

    def _maybe_offer(self) -> None:
        """Tell the coordinator what this node can give once every worker here has left its step.

        At once where the job only drains what vaults have: what becomes of workers is no matter then.
        """
        epoch = self._job.epoch
        if self._job.declared is None or self._offered == epoch or self._crew.renewing(self._job.ranks):
            return  # who is still to be started would not hear what is agreed
        live: dict[int, int | None] = {}
        epochs: dict[int, int] = {}
        for rank, worker in self._crew.mine().items() if not self._drains else ():
            if not worker.in_loop:
                live[rank] = None
            elif worker.arrived is not None and worker.arrived.epoch == epoch:
                live[rank], epochs[rank] = worker.arrived.live, worker.arrived.live_epoch
            else:
                return
        # A spare tells that it has nothing: it may be one that the coordinator waits for, having just given way.
        self._offered, self._arrived = epoch, self._all_arrived()
        holdings = self._shards.holdings()
        self._send(r.Offer(epoch, self._job.node, live, *holdings, arrived=self._arrived, live_epochs=epochs))

    def _all_arrived(self) -> bool:
        """Every coordinate here has a worker that can form its groups."""
        mine = self._crew.mine()
        told = [mine[rank].arrived if rank in mine else None for rank in self._job.ranks.values()]
        return all(each is not None and each.epoch == self._job.epoch for each in told)

    def step(self, worker: Worker, record: r.WorkerStep) -> None:
        """A worker has come to a step; the coordinator hears of it when all here have."""
        epoch, node = self._job.epoch, self._job.node
        if record.step == "parked":
            worker.numa = record.numa
            first = not worker.parked and worker.rank is None  # one that has begun with the job since says it late
            if first:
                worker.parked = True
                self._send(r.WorkerReady(node, worker.local, worker.pid))
                self.take_over()
                self._crew.rehearse()
            return
        worker.reached[record.step] = record.epoch
        if record.step == "formed":
            worker.formed = (record.changed, record.number)
        if record.epoch != epoch or not self._crew.all_reached(record.step):
            return
        match record.step:
            case "ready":
                self._send(r.NodeReady(epoch, node))
            case "formed":
                formed = [self._crew.workers[local].formed for local in self._job.ranks]
                changed, of = (sum(each) for each in zip(*formed, strict=True))
                self._send(r.NodeFormed(epoch, node, record.number, changed, of))
            case "restored":
                self._send(r.NodeRestored(epoch, node))
            case "resumed":
                self._send(r.NodeResumed(epoch, node, record.number))
            case "finished":
                self._send(r.Finished(epoch, node))

    def late(self) -> list[Worker]:
        """The workers of this node that the others wait for, in a recovery or at the start."""
        epoch, mine = self._job.epoch, self._crew.mine().values()
        if self._job.declared is None:
            return [worker for worker in mine if worker.registered is None]
        if self._offered != epoch:
            gone = [each for each in mine if each.arrived is not None and each.arrived.epoch == epoch]
            return [worker for worker in mine if worker.in_loop and worker not in gone]
        saves = self._job.declared.purpose == "save"
        for step in ("ready", "formed", "restored") if saves else ("ready", "formed", "restored", "resumed"):
            if late := [worker for worker in mine if worker.reached.get(step, -1) != epoch]:
                return late
        return []

    def saved(self, worker: Worker, record: r.ShardReady) -> None:
        """A worker has saved its part of Megatron's checkpoint, the last thing a job without spares does."""
        worker.reached["saved"] = record.epoch
        if self._crew.all_reached("saved"):
            self._send(r.Saved(record.epoch, self._job.node, record.iteration, record.directory))

    def held(self, worker: Worker, record: r.Held) -> None:
        """A worker waits at the start of an iteration for a planned move, or was past it already."""
        if record.epoch != self._job.epoch:
            return
        self._holding = True
        if record.missed:
            self._send(r.NodeHeld(record.epoch, self._job.node, record.iteration, True))
            return
        worker.reached["held"] = record.iteration
        held = [w.reached.get("held", -1) for w in self._crew.mine().values()]
        if all(iteration == record.iteration for iteration in held):
            self._send(r.NodeHeld(record.epoch, self._job.node, record.iteration, False))
