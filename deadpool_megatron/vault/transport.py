"""Which way the payload between agents goes: over their connection (TCP), or by direct reads (`direct`)."""

from __future__ import annotations

import importlib
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .direct import Direct
from .errors import VaultError

TRANSPORTS: Final = ("auto", "tcp", "nixl")
_DEVICES: Final = Path("/sys/class/infiniband")
_UCX_TLS: Final = "UCX_TLS"
_RDMA_ONLY: Final = "ib"  # UCX's word for its InfiniBand and RoCE transports; its TCP asks nobody who they are


@dataclass(frozen=True, slots=True)
class Transport:
    """What was chosen, and why, for people."""

    name: Literal["tcp", "nixl"]
    why: str


def rdma_devices(directory: Path = _DEVICES) -> list[str]:
    """Names of this machine's RDMA devices that have an active port."""
    active = {state.parents[2].name for state in directory.glob("*/ports/*/state") if "ACTIVE" in state.read_text()}
    return sorted(active)


def choose_transport(
    wanted: str, directory: Path = _DEVICES, environ: MutableMapping[str, str] | None = None, library: str = "nixl"
) -> Transport:
    """The transport for ``--deadpool-transport`` ``wanted``. Raises VaultError, one line, when it cannot be had.

    ``environ``: where UCX_TLS says what UCX may use; without it direct reads go over RDMA only.
    """
    env = os.environ if environ is None else environ
    if wanted == "tcp":
        return Transport("tcp", "asked for")
    devices = rdma_devices(directory)
    have = f"RDMA device {', '.join(devices)}" if devices else f"UCX_TLS={env.get(_UCX_TLS, '')}"
    missing = ""
    if not devices and (wanted == "auto" or _UCX_TLS not in env):
        missing = f"no RDMA device in {directory} has an active port, and UCX_TLS does not say what to use instead"
    else:
        try:
            importlib.import_module(library)
        except ImportError as err:
            missing = f"nixl cannot be imported ({err}): pip install nixl"
    if not missing:
        return Transport("nixl", have)
    if wanted == "auto":
        return Transport("tcp", missing)
    raise VaultError(f"--deadpool-transport nixl: {missing}")


def make_transport(wanted: str, name: str) -> tuple[Direct | None, Transport]:
    """`choose_transport`, and start nixl under ``name`` where it says so. Raises VaultError when it was asked for."""
    chosen = choose_transport(wanted)
    if chosen.name == "tcp":
        return None, chosen
    os.environ.setdefault(_UCX_TLS, _RDMA_ONLY)
    try:
        return Direct(name), chosen
    except VaultError as err:
        if wanted == "auto":
            return None, Transport("tcp", str(err))
        raise VaultError(f"--deadpool-transport nixl: {err}") from None
