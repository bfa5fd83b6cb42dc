"""torch's own way to re-form a Gloo backend in place: `Backend.reconfigure`, from torch 2.14 on.

It makes new connections to the members behind the given handles, inside of the same backend object; it meets them in
the store the backend was made with. Called on the backend, not on the group (`torch.distributed._reconfigure` looks
the backend up and calls this): a call that an abort leaves behind then has the old backend in its hands, whatever the
group gets meanwhile. Gloo offers it for every backend, made with `enable_reconfigure` or not.
"""

from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm.inplace import bindings, c10d, pointee

FIRST_TORCH = "2.14"


def offered() -> bool:
    """Whether this torch has it for Gloo."""
    return hasattr(bindings, "ReconfigureOptions") and hasattr(bindings.ProcessGroupGloo, "reconfigure")


def refusal() -> str:
    """One line for a user who asked for it on a torch without it."""
    return (
        f"communicator strategy 'reconfigure' needs torch {FIRST_TORCH} or newer, this is torch {torch.__version__}: "
        "use 'auto' or 'swap', or install a newer torch"
    )


def handle(backend: Any) -> str:
    """What peers need to know to meet this backend, "" where it has no such thing."""
    return str(backend.get_reconfigure_handle()) if offered() and backend.supports_reconfigure else ""


def reconfigure(backend: Any, epoch: int, handles: tuple[str, ...], timeout_s: float) -> None:
    """Connect the backend to the members with these handles, in group order. Blocks until all have come, `timeout_s`
    at most; cannot be interrupted. Raises RuntimeError (torch's); the backend is of no use then."""
    options = bindings.ReconfigureOptions()
    options.uuid = epoch
    options.handles = list(handles)
    options.timeout = timedelta(seconds=timeout_s)
    # Not our own wait: that is over while the groups are poisoned.
    getattr(bindings.Work.wait, "__wrapped__", bindings.Work.wait)(backend.reconfigure(options))


def base_store(store: Any) -> Any:
    """The store without its prefixes: the connection to the server."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def store_of(group: Any) -> Any:
    """The connection that the group's backends meet through."""
    return base_store(c10d._world.pg_map[group][1])


def same_server(store: Any, other: Any) -> bool:
    """Whether two connections lead to the same server (or are the same store, for stores without one)."""
    if pointee(store) == pointee(other):
        return True
    places = [(getattr(each, "host", None), getattr(each, "port", None)) for each in (store, other)]
    return places[0] == places[1] and places[0][0] is not None
