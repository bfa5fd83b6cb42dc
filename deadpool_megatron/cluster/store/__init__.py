"""The control store: where the coordinator's decisions and its leadership are kept."""

from __future__ import annotations

from pathlib import Path

from deadpool_megatron.cluster.store.base import Deposed, Guard, Lease, Store, StoreDamaged, StoreError
from deadpool_megatron.cluster.store.embedded import EmbeddedStore
from deadpool_megatron.cluster.store.etcd import EtcdStore
from deadpool_megatron.cluster.store.gateway import PASSWORD, StoreAddress

__all__ = ["EMBEDDED", "PASSWORD", "Deposed", "EmbeddedStore", "EtcdStore", "Guard", "Lease", "Store", "StoreAddress"]
__all__ += ["StoreDamaged", "StoreError", "check_address", "open_store", "towards"]

EMBEDDED = "embedded"
_DIRECTORY = "store"


def check_address(url: str) -> None:
    """Raises ValueError with one line when ``--deadpool-store`` is malformed."""
    if url != EMBEDDED:
        StoreAddress.parse(url)


def towards(url: str) -> str:
    """A host of the store's, for finding out which address of ours leads to it."""
    return StoreAddress.parse(url).endpoints[0].split("//", 1)[1].rsplit(":", 1)[0].strip("[]")


def open_store(url: str, run_dir: str | Path, job: str) -> Store:
    """The store of one job.

    Args:
        url: ``embedded`` (in the run directory), or ``etcd://...``.
        job: what tells this job's keys from those of others in the same etcd.

    Raises:
        StoreError, ValueError: with one line for the user.
    """
    if url == EMBEDDED:
        return EmbeddedStore(Path(run_dir) / _DIRECTORY)
    return EtcdStore(url, f"/deadpool/{job}/")
