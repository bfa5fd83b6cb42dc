"""What a new job finds in its durable directory, and what it makes of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from .errors import DurableError, NotFit, Unreadable
from .files import find
from .format import Manifest
from .lease import Lease, Owner, take
from .recut import fills
from .store import LocalStore, Store, open_store

_HANGS_S: Final = 20.0  # as long as an agent waits for a directory that cannot be read


class Survey(NamedTuple):
    """What a job finds.

    Args:
        usable: (generation, name) of those to begin with, newest first.
        remarks: lines for the user.
        others: generations that are there besides the one that was asked for.
        recut: likewise, in the place of ``usable`` where the newest is of another number of replicas: ranks read what
            they need of it themselves.
    """

    usable: tuple[tuple[int, str], ...]
    remarks: tuple[str, ...]
    others: tuple[int, ...] = ()
    recut: tuple[tuple[int, str], ...] = ()


def open_directory(url: str) -> Store:
    """The store of a durable directory, which is made when it is missing. Raises DurableError."""
    store = open_store(url)
    if isinstance(store, LocalStore) and not os.path.exists(store.root):
        try:
            os.mkdir(store.root)
        except OSError as err:
            raise DurableError(f"--deadpool-durable-dir {store.root} cannot be made: {err.strerror}") from None
    store.check()
    return store


@contextlib.contextmanager
def _told_of_silence(url: str, say: Callable[[str], None]) -> Iterator[None]:
    line = f"--deadpool-durable-dir {url} has not answered for {_HANGS_S:g} s; the job begins when it has"
    timer = threading.Timer(_HANGS_S, say, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def begin(
    url: str, owner: Owner | None, resume: str, world_size: int, newer_than: int, say: Callable[[str], None]
) -> tuple[Survey, Lease | None]:
    """A new job: make the directory its own, then look into it. Blocks for the disk, and for `take`.

    Args:
        owner: this job; None when it only reads.
        say: told lines for the user; other arguments as of `survey`.

    Returns:
        what is there, and the lease, which is kept.

    Raises:
        DurableError, OSError; the directory is nobody's then.
    """
    with _told_of_silence(url, say):
        store = open_store(url) if owner is None else open_directory(url)  # who only reads needs to write nothing
    lease = None if owner is None else take(store, owner, say)
    with contextlib.ExitStack() as on_error:
        if lease is not None:
            lease.keep()
            on_error.callback(lease.end)
        with _told_of_silence(url, say):
            found = survey(store, resume, world_size, newer_than, owner is not None)
        on_error.pop_all()
    for remark in found.remarks:
        say(remark)
    return found, lease


def go_on(
    url: str, owner: Owner | None, resume: str, world_size: int, newer_than: int, say: Callable[[str], None]
) -> tuple[Survey, Lease | None]:
    """As `begin`, for a coordinator that takes the place of one that is gone: the directory is its job's.

    Its job trains, whatever is wrong with the directory, and waits for this coordinator: what cannot be read is not
    there, nor is what hangs; then a thread goes on with it.
    """
    store = open_store(url)
    lease = None if owner is None else Lease(store, 0, owner)
    found = Survey((), ())

    def look() -> None:
        nonlocal found
        found = look_again(store, lease, resume, world_size, newer_than, say)
        if lease is not None:
            lease.keep()

    thread = threading.Thread(target=look, name="durable-look", daemon=True)
    thread.start()
    thread.join(_HANGS_S)
    if thread.is_alive():
        say(f"{store.root} has not answered for {_HANGS_S:g} s; the job goes on with what it knows to be durable there")
    return found, lease


def look_again(
    store: Store, lease: Lease | None, resume: str, world_size: int, newer_than: int, say: Callable[[str], None]
) -> Survey:
    """What the job can go back to: nothing that it was not to begin with, and what it has written since."""
    try:
        store.check()
        if lease is None or lease.renew():
            if resume.isdecimal() and lease is None:  # which writes none of its own
                return survey(store, resume, world_size, newer_than, False)
            found = survey(store, "auto", world_size, -1, False)
            first = max(newer_than, int(resume) if resume.isdecimal() else -1)
            usable, recut = (tuple(each for each in there if each[0] >= first) for there in (found.usable, found.recut))
            return found._replace(usable=usable, recut=recut)
    except (DurableError, OSError) as err:
        say(f"{err}; the job goes on, and cannot go back to what is durable there")
    return Survey((), ())


def survey(store: Store, resume: str, world_size: int, newer_than: int, writes: bool) -> Survey:
    """Look once at the durable directory, before training. Blocks for the disk.

    Args:
        resume: ``auto``, ``none``, or the number of a generation.
        world_size: ranks of this job.
        newer_than: iteration of Megatron's checkpoint that the job would load otherwise, -1 for none.
        writes: the job will drain generations of its own there.

    Raises:
        DurableError: the directory cannot be used, or what is in it contradicts ``resume``; NotFit when it is another
            layout's, Unreadable when something is there and nothing of it can be used.
    """
    try:
        found = find(store)
    except OSError as err:
        raise DurableError(f"--deadpool-durable-dir {store.root} cannot be read: {err}") from None
    remarks = [f"passed over, and left as it is: {why}" for why in found.damaged.values()]
    complete = list(found.complete)
    if resume == "none":
        if complete or found.damaged:
            raise DurableError(
                f"{store.root} holds the durable generations {found} of an earlier job: give "
                "--deadpool-resume auto to go on from there, or another --deadpool-durable-dir to start anew"
            )
        return Survey((), ())
    others: list[int] = []
    if resume != "auto":
        wanted, asked = [m for m in complete if m.generation == int(resume)], int(resume)
        if not wanted and asked in found.broken:
            raise Unreadable(
                f"durable generation {asked} cannot be read: {found.broken[asked]}; {store.root} has {found}: ask "
                "for another one, or start with Megatron's last checkpoint (--load) and another --deadpool-durable-dir"
            )
        if not wanted:
            raise DurableError(f"{store.root} has no durable generation {resume}; it has {found}")
        if writes and wanted[0].generation < complete[0].generation:
            raise DurableError(
                f"{store.root} has generation {complete[0].generation} besides {resume}: the next job would go on from "
                "that one; move what is newer than the one you want out of the directory"
            )
        others = [m.generation for m in complete if m not in wanted]
        complete = wanted
    newest = next(iter([m.generation for m in complete] or found.broken), -1)
    if 0 <= newest < newer_than:
        remarks.append(
            f"durable generation {newest} in {store.root} is older than the checkpoint of iteration "
            f"{newer_than} that --load names, so it is not used"
        )
        return Survey((), tuple(remarks))
    if not complete and found.damaged:
        raise Unreadable(
            f"{store.root} holds the durable generations {found}: {found.broken[newest]}; nothing begins "
            "from zero beside them: put back what is missing, or start with Megatron's last checkpoint (--load) and "
            "another --deadpool-durable-dir"
        )
    if not complete:
        remarks.append(f"no durable generation in {store.root} yet: training begins as without it")
    elif (first := complete[0]).world_size != world_size:
        what = f"durable generation {first.generation} in {store.root} is of {first.world_size} ranks, this job has"
        if not can_recut(first, world_size):
            raise NotFit(
                f"{what} {world_size}: start with as many, or turn it into a Megatron checkpoint (deadpool export) and "
                "--load that"
            )
        remarks.append(f"{what} {world_size}: its shards are cut anew")
        fitting = [m for m in complete if can_recut(m, world_size)]
        return Survey((), tuple(remarks), tuple(others), tuple((m.generation, m.name) for m in fitting))
    fitting = [m for m in complete if m.world_size == world_size]
    return Survey(tuple((m.generation, m.name) for m in fitting), tuple(remarks), tuple(others))


def can_recut(manifest: Manifest, world_size: int) -> bool:
    """Whether so many ranks can be the same model with another number of replicas."""
    replicas, contexts, places = (
        1 + max(getattr(c, kind) for c in manifest.coordinates) for kind in ("dp", "cp", "ep")
    )
    width, rest = divmod(world_size, manifest.world_size // replicas)
    instances = manifest.job.get("model", {}).get("num_distributed_optimizer_instances") or 1
    return not rest and fills(width * contexts, places, instances)
