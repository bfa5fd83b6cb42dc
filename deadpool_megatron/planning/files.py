"""The file of a run: the cluster it is for, Megatron's flags, DeadPool's settings. See ``configs/``.

::

    cluster:  {nodes: 64, spare_nodes: 2, gpus_per_node: 8, ...}     # fields of `Cluster`
    megatron: {num-layers: 80, bf16: true, ...}                      # flags without their dashes
    deadpool: {lease: 5, ...}                                        # as in --deadpool-config
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from deadpool_megatron.config import ConfigError, DeadpoolConfig, resolve
from deadpool_megatron.support import not_megatrons
from deadpool_megatron.yaml_file import NotRead, read_yaml

_MOST = 1e9  # of anything: no sum or product of it is infinite
_MOST_DEVICES = 1 << 20


class PlanError(ValueError):
    """The file is malformed, or what it describes cannot work. The message is one line for the user."""


def _described(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a run is given. Sizes are in GB (1e9 bytes) and GB/s."""

    nodes: int = field(metadata={"help": "nodes that train"})
    gpus_per_node: int = field(metadata={"help": "devices, hence workers, a node"})
    gpu_memory: float = field(metadata={"help": "memory of a device"})
    host_memory: float = field(metadata={"help": "memory of a node"})
    spare_nodes: int = _described(0, "warm spares beside the nodes that train")
    shared_memory: float = _described(0.0, "size of /dev/shm of a node; 0: half of the host memory, Linux' default")
    pcie: float = _described(25.0, "device to host, each device")
    network: float = _described(25.0, "what a node can send, all of its adapters together")
    tflops: float = _described(312.0, "peak of a device in the precision of the run")
    utilisation: float = _described(0.45, "share of that peak the run reaches (MFU)")
    failures: float = _described(6.5, "node failures in 1,000 node-days")
    replace_hours: float = _described(24.0, "hours until a lost node is back or replaced")
    restart_minutes: float = _described(15.0, "minutes a restart costs: scheduling, start, load")
    checkpoint_minutes: float = _described(30.0, "minutes between Megatron's checkpoints")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in ("spare_nodes", "shared_memory", "failures", "restart_minutes") else None
            if not 0 <= value <= _MOST or (least is None and value == 0):
                kind = "more than 0" if least is None else "0 or more"
                raise PlanError(f"cluster: {f.name} must be {kind}, and at most {_MOST:g}, not {value}")
        if self.utilisation > 1:
            raise PlanError(f"cluster: utilisation is a share of the peak, at most 1, not {self.utilisation:g}")
        if self.gpus > _MOST_DEVICES:
            raise PlanError(f"cluster: {self.gpus} devices are more than can be planned, {_MOST_DEVICES}")

    @property
    def gpus(self) -> int:
        """Devices that train, hence coordinates."""
        return self.nodes * self.gpus_per_node

    @property
    def shm_bytes(self) -> float:
        """Bytes of shared memory a node."""
        return (self.shared_memory or self.host_memory / 2) * 1e9


@dataclass(frozen=True, slots=True)
class RunFile:
    """One file, read. ``megatron`` is by flag without dashes."""

    name: str
    cluster: Cluster
    megatron: Mapping[str, Any]
    deadpool: DeadpoolConfig

    def flags(self) -> list[str]:
        """The script's flags, DeadPool's with them."""
        out: list[str] = []
        for name, value in self.megatron.items():
            if value is True:
                out.append(f"--{name}")
            elif isinstance(value, list):
                out += [f"--{name}", *map(str, value)]
            else:
                out += [f"--{name}", str(value)]
        return out + self.deadpool.flags()


def _one_of(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def _cluster(where: str, data: Mapping[str, Any], changed: Mapping[str, Any]) -> Cluster:
    names = [f.name for f in fields(Cluster)]
    types = typing.get_type_hints(Cluster)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in names:
            raise PlanError(f"{where}: cluster: unknown field {key!r}{_one_of(str(key), names)}")
        whole = types[key] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise PlanError(f"{where}: cluster: {key}: expected a {'whole ' * whole}number, not {value!r}")
        values[key] = types[key](value)
    for f in fields(Cluster):
        if f.default is MISSING and f.name not in values:
            raise PlanError(f"{where}: cluster: {f.name} is missing: {f.metadata['help']}")
    try:
        return Cluster(**{**values, **changed})
    except PlanError as err:
        raise PlanError(f"{where}: {err}") from None


def load(path: str, cluster: Mapping[str, Any] | None = None, deadpool: Mapping[str, Any] | None = None) -> RunFile:
    """Read a file; fields of ``cluster`` and settings in ``deadpool`` count more. Raises PlanError with one line."""
    try:
        data = read_yaml(path)
    except NotRead as err:
        raise PlanError(f"{path}: {err}") from None
    return run_file(path, data, cluster or {}, deadpool or {})


def run_file(path: str, data: Any, changed: Mapping[str, Any], more: Mapping[str, Any]) -> RunFile:
    """What a file that says ``data`` is, read as `load` does. ``path``: where, in front of errors."""
    sections = ["cluster", "megatron", "deadpool"]
    if not isinstance(data, dict) or not isinstance(data.get("cluster"), dict):
        raise PlanError(f"{path}: expected the sections {', '.join(sections)}")
    for key, section in data.items():
        if key not in sections:
            raise PlanError(f"{path}: unknown section {key!r}{_one_of(str(key), sections)}")
        if not isinstance(section, dict):
            raise PlanError(f"{path}: {key}: expected a mapping")
    megatron: dict[str, Any] = {}
    for key, value in data.get("megatron", {}).items():
        name = str(key)
        if name.startswith("-") or "_" in name:
            raise PlanError(f"{path}: megatron: {name!r}: write flags without dashes in front, as in num-layers")
        if value is None or value is False:
            raise PlanError(f"{path}: megatron: {name}: give a value, or true for a switch (or leave it out)")
        for each in value if isinstance(value, list) else [value]:
            if each is None or isinstance(each, (list, dict)):
                raise PlanError(f"{path}: megatron: {name}: expected a value or a list of them, not {value!r}")
        megatron[name] = value
    for flag, near in not_megatrons(f"--{name}" for name in megatron).items():
        hint = f"; did you mean {near[2:]!r}?" if near else ""
        raise PlanError(f"{path}: megatron: Megatron has no --{flag[2:]}{hint}")
    ours = {**data.get("deadpool", {}), **more}
    names = [f.name for f in fields(DeadpoolConfig)]
    for key, value in ours.items():
        if key not in names:
            raise PlanError(f"{path}: deadpool: unknown setting {key!r}{_one_of(str(key), names)}")
        if value is None:
            raise PlanError(f"{path}: deadpool: {key}: give a value (or leave it out)")
    try:
        deadpool = resolve({("deadpool" if k == "deadpool" else f"deadpool_{k}"): v for k, v in ours.items()}, {})
    except ConfigError as err:
        raise PlanError(f"{path}: {err}") from None
    return RunFile(path, _cluster(path, data["cluster"], changed), megatron, deadpool)
