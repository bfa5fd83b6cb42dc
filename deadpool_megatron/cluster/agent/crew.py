"""The workers of one node: which process is in each slot, and which of them hold coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.standbys import CALM_S, Standbys
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker


class Crew:
    """One worker process a slot, and in a rescue one in each extra slot. Used by the agent's thread only.

    On a spare node others can be beside them, each of which rehearses one coordinate that its slot may take over. If it
    does, that process takes the place of the parked one; if it takes over another coordinate, they make room. On a node
    that holds coordinates `standbys` are beside them.

    Args:
        job: what this node knows of the job.
        rehearsals: how many coordinates a slot rehearses.
        standby: how far those are set up that stand by.

    Attributes:
        workers: by local index, the newest process of each slot, alive or not.
        beside: the processes that rehearse or stand by, and those that have to leave a slot to another one and have not
            ended yet.
    """

    def __init__(self, job: KnownJob, processes: WorkerProcesses, rehearsals: int = 0, standby: str = "none") -> None:
        self._job = job
        self._processes = processes
        self._rehearsals = rehearsals
        self._slots = 0  # those beyond are there to save what lost nodes had
        self._asked: dict[int, Sequence[int]] = {}  # by local index, what it rehearses in the place of those in turn
        self._given_up: dict[tuple[int, int], str] = {}  # by (local, rank), why its rehearsal has ended
        self.workers: dict[int, Worker] = {}
        self.beside: list[Worker] = []
        self.standbys = Standbys(job, processes, standby, self.beside)
        self._calm_since: float | None = None

    # ---- the processes

    def start(self, slots: int) -> None:
        """Start all workers, or take them in; a spare's are parked. Raises AdoptionError."""
        self._slots = slots
        for local in range(slots):
            self.workers[local] = self._processes.start(local, self._job.ranks.get(local))
        self._processes.all_started()

    def look(self, calm: bool, now: float) -> None:
        """Start what is to be beside the workers; call often. ``calm``: those that hold coordinates here all train."""
        if not self._job.ranks:
            calm = calm and self._job.trains and all(each.parked for each in self.workers.values())
        self._calm_since = (now if self._calm_since is None else self._calm_since) if calm else None
        warm = self._processes.keep_warm(self._calm_since is not None and now - self._calm_since >= CALM_S)
        if warm and self.standbys.asked:
            self.standbys.look(self.workers.values(), calm, now)

    def located(self, worker: Worker, numa: int) -> set[int]:
        """A worker has its device on NUMA node ``numa``; the processors that the agent is bound to now, or none."""
        alive = [each for each in self.workers.values() if not each.exited]
        return self._processes.located(worker, numa, alive)

    def renew(self, local: int) -> None:
        """A fresh process in a slot, once the one that is there has ended (it is ended now).

        It is parked, or where the job has not begun to train begins at once as the coordinate that the slot has. Where
        one stands by for the slot, it is that one.
        """
        old = self.workers.get(local)
        if self._processes.adopted(local):
            # Who has started it starts no other one: this node is drained, and its workers leave when it is let go.
            if old is not None:
                old.retired = True
            return
        if old is not None and not old.exited:
            old.retired = True
            self._processes.kill(old)
            return
        if old is not None:
            del self.workers[local]  # it is closed even if no other one can be started
            old.close()
        if local >= self._slots and local not in self._job.ranks:
            return
        rank = self._job.ranks.get(local) if self._job.declared is None else None
        there = self.standbys.take(local) if rank is None else None
        self.workers[local] = there or self._processes.start(local, rank)

    def start_over(self) -> list[tuple[Worker, dict[str, str]]]:
        """The start begins anew: with fresh processes wherever there was a coordinate, or is one that no parked worker
        can begin with. Those that do hold it from now on, and are to be told, with what they need in their environment.
        """
        self._end(each for each in self.beside if each.local in self._job.ranks or each.standby)
        out: list[tuple[Worker, dict[str, str]]] = []
        idle = self.idle()
        for local, worker in list(self.workers.items()):
            rank = self._job.ranks.get(local)
            can = not self._processes.adopted(local) and not self._waits_for_room(local)
            if worker in idle and can and rank is not None:
                worker.rank, worker.parked = rank, False
                self._processes.link_log(worker, rank)
                out.append((worker, self._processes.of_job(rank)))
            elif worker.rank is not None or rank is not None:
                self.renew(local)
        return out

    def idle(self) -> list[Worker]:
        """Those that are parked and hold no coordinate."""
        there = [each for each in self.workers.values() if not each.exited and not each.retired]
        return [each for each in there if each.parked and each.rank is None]

    def rehearse_anew(self) -> None:
        """There are fewer coordinates than before: what has been rehearsed is none of them."""
        self._asked.clear()
        self._given_up.clear()
        self._end(self.beside)

    def renewing(self, slots: Iterable[int]) -> bool:
        """In one of these slots somebody has not ended yet whose place a fresh process takes."""
        return any(local in self.workers and self.workers[local].retired for local in slots)

    def reap(self, worker: Worker) -> int:
        """A worker has ended, by itself or as `renew` wants it; its exit code."""
        worker.exit_code = self._processes.reap(worker)
        worker.exited = True
        return worker.exit_code

    @property
    def can_rehearse(self) -> bool:
        """This is a spare node, all of whose workers are parked, which its agent has started."""
        parked = all(each.parked and not self._processes.adopted(local) for local, each in self.workers.items())
        return parked and not self._job.ranks

    def rehearse(self, asked: Mapping[int, Sequence[int]] | None = None) -> None:
        """Have the slots of a spare node rehearse, where they can: to be parked comes first.

        ``asked``: these coordinates by local index, from now on, in the place of those in turn.
        """
        if asked is not None and asked != self._asked:
            self._asked = dict(asked)
            self._given_up.clear()
        if not self.can_rehearse:
            return
        for local in self.workers:
            wanted = self._asked.get(local) or self._job.in_turn(local, self._rehearsals)
            self._end(each for each in self.beside if each.local == local and each.rehearses not in (None, *wanted))
            if self._waits_for_room(local):
                continue
            there = {(each.local, each.rehearses) for each in self.beside if not each.retired} | self._given_up.keys()
            for rank in wanted:
                if (local, rank) not in there:
                    self.beside.append(self._processes.start(local, None, rank))

    def rehearsed(self) -> list[int]:
        """The coordinates that this node can take over at once."""
        there = (each.rehearses for each in self.beside if each.parked and not each.retired and not each.standby)
        return sorted(rank for rank in there if rank is not None)

    @property
    def unrehearsed(self) -> dict[int, str]:
        """By coordinate, why its rehearsal has ended by itself."""
        return {rank: why for (_, rank), why in sorted(self._given_up.items())}

    def left(self, worker: Worker) -> str:
        """One of those beside has ended; why, in words. Who has not been ended is not started again."""
        code = self.reap(worker)
        why = worker.failed.message if worker.failed is not None else f"it ended with {code}"
        if not worker.retired and worker.rehearses is not None and not worker.standby:
            self._given_up[worker.local, worker.rehearses] = f"{why}; see {worker.log}"
        self.beside.remove(worker)
        worker.close()
        return why

    def end_standbys(self) -> None:
        """Nobody here holds a coordinate any more, or all begin anew."""
        self._end(each for each in self.beside if each.standby)

    def signal(self, signum: int) -> None:
        """To every worker that trains; 0 for none."""
        for worker in self.workers.values() if signum else ():
            if worker.rank is not None and not worker.exited:
                self._processes.signal(worker, signum)

    def end(self, at_once: bool, told: bool) -> None:
        """End all workers; see `WorkerProcesses.end`. Blocks until they have."""
        self._processes.end(self.beside, True, told)  # these have nothing to finish
        self._processes.end(self.workers.values(), at_once, told)
        self._processes.close()
        for worker in (*self.workers.values(), *self.beside):
            worker.close()

    # ---- their coordinates

    def mine(self) -> dict[int, Worker]:
        """By rank, the workers of this node that hold a coordinate of the current assignment."""
        out: dict[int, Worker] = {}
        for local, rank in self._job.ranks.items():
            worker = self.workers.get(local)
            if worker is not None and not worker.exited and not worker.retired:
                out[rank] = worker
        return out

    def all_reached(self, step: str) -> bool:
        """Every coordinate here has a worker that has come to ``step`` in the current epoch."""
        return all(
            local in self.workers and self.workers[local].reached.get(step, -1) == self._job.epoch
            for local in self._job.ranks
        )

    def choose(self) -> None:
        """Put those that have rehearsed what their slots have been given into these slots; end the others.

        To be called before anything of the epoch is told to whoever is in a slot: another one would not have heard it.
        """
        for local, rank in self._job.ranks.items():
            held = self.workers.get(local)
            if held is not None and held.rank is not None:
                continue
            others = [each for each in self.beside if each.local == local and not each.standby]
            for each in others:
                if each.parked and each.rehearses == rank and not each.retired and not each.exited:
                    others.remove(each)
                    self.beside.remove(each)
                    self.workers[local] = each
                    if held is not None and not held.exited:
                        others.append(held)
                        self.beside.append(held)
                    elif held is not None:
                        held.close()
                    break
            self._end(others)

    def give_coordinates(self) -> list[Worker]:
        """Have parked workers hold the coordinates the assignment has for them; the workers that hold one now.

        Who has rehearsed has its memory. Who has not waits for that of those who have to make room, until `left`.
        """
        out: list[Worker] = []
        for local, rank in self._job.ranks.items():
            worker = self.workers.get(local)
            if worker is not None and worker.parked and worker.rank is None and not worker.retired:
                if worker.rehearses is None and self._waits_for_room(local):
                    continue
                self._asked.pop(local, None)
                worker.rank = rank
                self._processes.link_log(worker, rank)
                out.append(worker)
        return out

    def _waits_for_room(self, local: int) -> bool:
        """Somebody who has to make room has not ended yet, and holds memory of the slot's device."""
        return self._processes.share_devices and any(
            each.local == local and each.retired and each.rehearses is not None for each in self.beside
        )

    def _end(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            if not worker.retired:
                worker.retired = True
                self._processes.kill(worker)
