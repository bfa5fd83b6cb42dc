"""Several ranks on ONE device, over NCCL: aborted in a kernel, or a first message, that waits for a peer, and replaced.

Not collected by pytest: a step of `scripts/gpu_kit.sh` runs it, and reads a line of JSON for each thing it sees. NCCL
up to 2.29 refuses two ranks on a device of one host, so each rank says it is another host and they meet over sockets
(``SHARED_WAY=sockets``); NCCL 2.30 can have them on one (``ipc``), and is preloaded from ``SHARED_PRELOAD``.
``SHARED_DRY=1``: Gloo on the CPU, to try the scenarios themselves.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from comm_processes import Worker, kill_self, run, until_retired, worker_main
from deadpool_megatron.comm.nccl import NCCL_ENVIRONMENT

DRY = os.environ.get("SHARED_DRY") == "1"
DEVICE, BACKEND = ("cpu", "gloo") if DRY else ("cuda", "nccl")
ROUNDS = int(os.environ.get("SHARED_ROUNDS", "10"))
N = 1 << 20
HELD_S = 20  # an abort does not free who waits for a peer in a first use: this does
CALLS = 200  # fewer than a device takes into its queue, so that the host does not wait for it
ENTER_S = 0.5  # the others are inside of a kernel by then
Groups = dict[str, dist.ProcessGroup]


def tell(scenario: str, what: str, **more: object) -> None:
    """One line for the kit, whole: others write to the same pipe or file."""
    line = json.dumps({"scenario": scenario, "what": what, "process": os.environ["ID"], **more})
    os.write(1, (line + "\n").encode())


def make(worker: Worker) -> Groups:
    """World, a pair, a second group of all, one of two ends, and one of Gloo."""
    if not DRY:
        torch.cuda.set_device(0)
    store = {} if worker.spare else {"store": dist.PrefixStore("first", worker._client())}
    dist.init_process_group(BACKEND, rank=worker.rank, world_size=worker.world, **store)
    groups = {"world": dist.group.WORLD}
    for name, ranks in {"pair": [0, 1], "twin": [*range(worker.world)], "ends": [0, worker.world - 1]}.items():
        group = dist.new_group(ranks, group_desc=name)
        if worker.rank in ranks:
            groups[name] = group
    groups["gloo"] = dist.new_group(backend="gloo", group_desc="gloo")
    return groups


def use(groups: Groups) -> None:
    """Collectives and messages with checked results."""
    for name, group in groups.items():
        device = "cpu" if name == "gloo" else DEVICE
        x = torch.full((N,), 1.0, device=device)
        dist.all_reduce(x, group=group)
        out = torch.empty(group.size() * N, device=device)
        dist.all_gather_into_tensor(out, x, group=group)
        assert out.eq(group.size()).all().item(), name
        exchange(name, group, device)


def exchange(name: str, group: dist.ProcessGroup, device: str) -> None:
    """What goes from one to one: all-to-all with and without sizes, and a batch of sends and receives round a ring."""
    me, size, ranks = group.rank(), group.size(), dist.get_process_group_ranks(group)
    parts = (torch.arange(size, device=device) + 10.0 * me).repeat_interleave(N)
    for sizes in (None, [N] * size):
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts, sizes, sizes, group=group)
        assert got.view(size, N).eq(10.0 * torch.arange(size, device=device)[:, None] + me).all().item(), (name, sizes)
    got = torch.empty(N, device=device)
    sent = torch.full((N,), float(me), device=device)
    after, before = ranks[(me + 1) % size], ranks[(me - 1) % size]
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, got, before, group)]
    ):
        work.wait()
    assert got.eq((me - 1) % size).all().item(), name


def block(groups: Groups) -> str:
    """Enqueue on every group and wait for the device, while some peer does not come; how it came out."""
    try:
        x = torch.ones(N, device=DEVICE)
        for _ in range(3):
            for name, group in groups.items():
                if name != "gloo":
                    dist.all_reduce(x, group=group)
        if not DRY:
            torch.cuda.synchronize()  # what Megatron's .item() does
        return "returned"  # by the abort: garbage in x
    except RuntimeError as error:
        return type(error).__name__


def nccl() -> str:
    """The NCCL that runs, not the one torch was compiled with."""
    return "" if DRY else str(dist.ProcessGroupNCCL.get_runtime_nccl_version())


def rounds(worker: Worker) -> str:
    """The last rank does not come; the others are blocked, aborted and re-formed, again and again."""
    groups = make(worker)
    use(groups)
    settled = 0 if DRY else torch.cuda.mem_get_info()[0]
    worker.watch()
    last = worker.world - 1
    for epoch in range(1, ROUNDS + 1):
        worker.meet(f"round/{epoch}")
        seen: dict[str, object] = {}
        if worker.rank == last:
            time.sleep(ENTER_S)
            worker.store.set(f"fault/{epoch - 1}", b"1")
        else:
            seen["how"] = block(groups)
            out_at = time.monotonic()
        worker.await_abort(epoch)
        if worker.rank != last:
            seen["free_s"] = max(0.0, out_at - worker.aborted_at[epoch - 1])
        report = worker.reports[-1]
        form = worker.comm.reform(epoch, worker.store)
        seen |= {"abort_s": report.seconds, "stuck": report.nccl_stuck, "form_s": form.seconds}
        tell("rounds", "round", epoch=epoch, **seen)
        use(groups)
        if epoch == 1 and not DRY:
            until_retired()
            settled = torch.cuda.mem_get_info()[0]
    lost = 0
    if not DRY:
        until_retired()
        worker.meet("idle")
        lost = settled - torch.cuda.mem_get_info()[0]
    tell("rounds", "done", lost_bytes=lost, nccl=nccl())
    return "done"


def takeover(worker: Worker) -> str:
    """The last rank kills itself while the others wait for it in a kernel; a spare takes its place."""
    if worker.spare:
        worker.store.wait(["fault/0"])
        worker.become(int(worker.store.get("victim/0")))
        groups = make(worker)
        worker.comm.reform(1, worker.store)
        use(groups)
        tell("takeover", "done", rank=worker.rank, nccl=nccl())
        return "done"
    groups = make(worker)
    use(groups)
    worker.watch()
    worker.meet("ready")
    if worker.rank == worker.world - 1:
        time.sleep(ENTER_S)
        kill_self()
    how = block(groups)
    out_at = time.monotonic()
    worker.await_abort(1)
    report = worker.comm.reform(1, worker.store)
    use(groups)
    free_s = max(0.0, out_at - worker.aborted_at[0])
    seen = worker.reports[-1]
    tell("takeover", "done", how=how, free_s=free_s, abort_s=seen.seconds, stuck=seen.nccl_stuck, form_s=report.seconds)
    return "done"


def fresh(worker: Worker) -> str:
    """The last rank does not come to a message between two that never had one: at first, and after a recovery."""
    groups = make(worker)
    twin, last = groups["twin"], worker.world - 1
    dist.all_reduce(torch.ones(N, device=DEVICE), group=twin)
    worker.watch()
    for epoch, what in enumerate(("first", "again"), 1):
        worker.meet(f"fresh/{epoch}")
        seen: dict[str, object] = {}
        if worker.rank == last:
            time.sleep(ENTER_S)
            worker.store.set(f"fault/{epoch - 1}", b"1")
        elif worker.rank == 0:
            seen["how"] = message(twin, last)
            out_at = time.monotonic()
        worker.await_abort(epoch)
        if worker.rank == 0:
            seen["free_s"] = max(0.0, out_at - worker.aborted_at[epoch - 1])
        form = worker.comm.reform(epoch, worker.store)
        tell("fresh", what, stuck=worker.reports[-1].nccl_stuck, form_s=form.seconds, **seen)
    use(groups)
    tell("fresh", "done", nccl=nccl())
    return "done"


def message(group: dist.ProcessGroup, peer: int) -> str:
    """Exchange with a member that does not come, and wait for the device; how it came out."""
    sent, got = torch.ones(N, device=DEVICE), torch.empty(N, device=DEVICE)
    try:
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, peer, group), dist.P2POp(dist.irecv, got, peer, group)]
        ):
            work.wait()
        if not DRY:
            torch.cuda.synchronize()
        return "returned"
    except RuntimeError as error:
        return type(error).__name__


def latency(worker: Worker) -> str:
    """Small all-reduces over a blocking and over a nonblocking communicator, in turn: of the host, and in all."""
    make(worker)
    groups = {}
    for name, blocking in (("blocking", 1), ("nonblocking", 0)):
        options = None
        if not DRY:
            options = dist.ProcessGroupNCCL.Options()
            options.config.blocking = blocking
        groups[name] = dist.new_group([*range(worker.world)], pg_options=options, group_desc=name)
    x = torch.ones(1, device=DEVICE)
    for number in range(ROUNDS + 1):  # the first one makes the communicators
        for name, group in groups.items():
            worker.meet(f"{name}/{number}")
            begun = time.perf_counter()
            for _ in range(CALLS):
                dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
            queued = time.perf_counter()
            if not DRY:
                torch.cuda.synchronize()
            over = time.perf_counter()
            if number:
                us = {"host_us": 1e6 * (queued - begun) / CALLS, "all_us": 1e6 * (over - begun) / CALLS}
                tell("latency", name, **us)
    tell("latency", "done", nccl=nccl())
    return "done"


def be_a_host() -> None:
    """What NCCL reads when the first communicator is made."""
    os.environ |= {"NCCL_MAX_CTAS": "2", "NCCL_MNNVL_ENABLE": "0", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
    if os.environ["SHARED_WAY"] == "ipc":
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    else:
        os.environ["NCCL_HOSTID"] = f"rank-{os.environ['ID']}"


SCENARIOS = {  # each with its number of spares
    "takeover": (takeover, 1),
    "fresh": (fresh, 0),
    "latency": (latency, 0),
    "rounds": (rounds, 0),
}


def main() -> None:
    """The scenario that ``SHARED_SCENARIO`` names, or all; an exception, hence a code other than 0, if a rank fails."""
    env = {} if DRY else dict(NCCL_ENVIRONMENT)
    if preload := os.environ.get("SHARED_PRELOAD"):
        env["LD_PRELOAD"] = preload  # torch has a DT_RPATH, so LD_LIBRARY_PATH would do nothing
    env["SHARED_WAY"] = os.environ.get("SHARED_WAY", "sockets")
    wanted = os.environ.get("SHARED_SCENARIO")
    for name, (_, spares) in SCENARIOS.items():
        if wanted in (None, name):
            if name == "fresh":
                env["TORCH_NCCL_NONBLOCKING_TIMEOUT"] = str(HELD_S)
            run(__file__, name, world=3, spares=spares, env=env, install={"form_timeout_s": 60.0})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        be_a_host()
        worker_main({name: scenario for name, (scenario, _) in SCENARIOS.items()})
    else:
        main()
