"""The table of process groups: what every rank must know to form the same groups again, in the same order."""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from deadpool_megatron.comm.connections import GlooDevice


@dataclass(slots=True)
class GroupRecord:
    """One process group as its creation asked for it. `group` is None on ranks that are not members."""

    name: str  # torch's own name of the group; it counts creations, so it is the same on all ranks
    ranks: tuple[int, ...]  # coordinates in group order: the group's rank i is coordinate ranks[i]
    desc: str
    backend: str
    """As asked for: "gloo", "nccl", "cpu:gloo,cuda:nccl", "undefined"."""
    backend_of_device: dict[str, str]  # device type -> backend name, after torch's defaults
    timeout: timedelta
    options: Any = None  # pg_options of the caller (ProcessGroupNCCL.Options) or None
    bound_device: torch.device | None = None
    group: Any = None
    real: bool = True  # False while a standby's group still carries the fake backend
    connected: int = 0  # epoch of the backend's connections
    connections: frozenset[int] = frozenset()
    """Inodes of its Gloo connections; perhaps of others that came up at the same time too."""
    devices: frozenset[GlooDevice] = frozenset()  # the Gloo devices those belong to

    @property
    def local(self) -> bool:
        """Made with use_local_synchronization: only its members know of it (torch hashes the name then)."""
        return not self.name.isdigit()


@dataclass(slots=True)
class GroupTable:
    """Groups in order of creation, those this rank is not in as well."""

    records: list[GroupRecord] = field(default_factory=list)

    def add(self, record: GroupRecord) -> None:
        if record.group is not None and any(known.group is record.group for known in self.records):
            return  # torch returned an existing group for the same tag and ranks
        self.records.append(record)

    def members(self, alive: Any) -> list[GroupRecord]:
        """Records of groups that this rank is in and that were not destroyed (`alive`: container of groups)."""
        return [record for record in self.records if record.group is not None and record.group in alive]

    def digest(self) -> str:
        """Hash over names, ranks, descriptions and backends. Equal on all ranks that made the same groups."""
        rows = [[r.name, r.ranks, r.desc, sorted(r.backend_of_device.items())] for r in self.records if not r.local]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def backend_of(record: GroupRecord, kind: str) -> Any:
    """The backend of this kind that is in the group now."""
    device = next(device for device, name in record.backend_of_device.items() if name == kind)
    return record.group._get_backend(torch.device(device))
