"""What a failure leaves behind of Megatron's own checkpoints.

An asynchronous save (``--async-save``) is written by a process beside each rank and finalized by collectives, ranks
counting their saves. A rank that has died takes its part along, and the spare in its place has counted nothing: such a
save can never be finalized, so the survivors drop it and all begin to count anew. Until a save is finalized upstream
does not name it in ``latest_checkpointed_iteration.txt``, so what is dropped is never loaded.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron.training import async_utils


def drop_unfinished_saves(rank: int) -> int:
    """End asynchronous saves that are not finalized; returns how many. No communication.

    The writers are ended with SIGKILL: they write files that nobody will name.
    """
    queue = async_utils._async_calls_queue
    if queue is None:
        return 0
    dropped = list(queue.async_calls)
    for call in dropped:
        call.async_caller.close(abort=True)
    queue.async_calls.clear()
    queue.close(abort=True)
    async_utils._async_calls_queue = None  # made anew at the next save, as on a spare
    if dropped:
        print(
            f"deadpool: rank {rank}: {len(dropped)} asynchronous checkpoint(s) were being written when the node was "
            "lost, and are dropped; the state after the next iteration is saved in their place",
            file=sys.stderr,
            flush=True,
        )
    return len(dropped)


def forget_strategies(context: dict[str, Any]) -> None:
    """Drop what earlier saves have cached: ranks with and without a cache do different collectives (upstream's
    ``--ckpt-assume-constant-structure``), and a spare has none."""
    for name in ("save_strategy", "load_strategy", "local_checkpoint_cache"):
        context.pop(name, None)
