"""The other launcher, where it has started the ranks: what it waits for when they have ended."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from datetime import timedelta

_STORE_S = 10.0  # for torchrun's store to answer


def let_torchrun_go(environ: Mapping[str, str]) -> None:
    """End the wait of this job's torchruns for those of nodes that are not there any more. Imports torch.

    A torchrun whose ranks have ended well waits, deaf to signals, up to five minutes for the others. One of a lost node
    never comes, and for one of a drained node the others come at the end of the job. This node has ended well too, so
    all of them may go: what the last one would tell the others is told for it. Nothing happens under other launchers.

    Args:
        environ: what the launcher gave its ranks.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    if not _listens(host, port):
        return  # they have gone already, and their store with them
    import torch.distributed as dist
    from torch.distributed.elastic.agent.server.api import _TERMINAL_STATE_SYNC_ID
    from torch.distributed.elastic.utils.store import _LAST_MEMBER_CHECKIN

    if not _listens(host, port):
        return  # meanwhile: torch's client would say so again and again
    with contextlib.suppress(RuntimeError):
        store = dist.TCPStore(host, port, None, False, timeout=timedelta(seconds=_STORE_S))
        dist.PrefixStore(environ["TORCHELASTIC_RUN_ID"], store).set(_TERMINAL_STATE_SYNC_ID + _LAST_MEMBER_CHECKIN, "")


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _STORE_S).close()
    except OSError:
        return False
    return True
