"""One typed definition of every DeadPool setting: flags, environment, YAML, its schema and defaults come from here.

A setting is looked up as flag, then environment (``DEADPOOL_<NAME>``), then YAML file, then default. The YAML file is
that of ``--deadpool-config``, or else the section ``deadpool`` of the file of Megatron's own ``--yaml-cfg``.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.cluster.store import check_address
from deadpool_megatron.vault.transport import TRANSPORTS
from deadpool_megatron.yaml_file import NotRead, read_yaml


class ConfigError(ValueError):
    """A setting is unknown, malformed or contradicts another. The message is one line for the user."""


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True)
class DeadpoolConfig:
    """Settings of one job. Times are seconds, sizes are bytes."""

    deadpool: bool = _setting(False, "switch DeadPool on; without it the launcher is a plain launcher")
    state_hash: str = _setting("", "file that receives, at the end, a JSON of SHA-256 per coordinate over its state")
    spare_nodes: int = _setting(
        0, "nodes, the last ones, that are warm spares; for a patched Megatron, whose launcher counts them in its world"
    )
    run_dir: str = _setting("runs/latest", "directory for status and events that nodes share; for a patched Megatron")
    rendezvous: str = _setting(
        "", "HOST:PORT of the coordinator; for a patched Megatron (without it: MASTER_ADDR, MASTER_PORT + 1)"
    )
    store: str = _setting(
        "embedded",
        "where the coordinator's state is kept: embedded (in the run directory), or etcd://[USER@]HOST:PORT,HOST:PORT...",
    )
    keep_groups: bool = _setting(
        True, "process groups that lost nobody and have nothing under way keep their connections through a recovery"
    )
    lease: float = _setting(5.0, "seconds without a heartbeat after which a node counts as lost")
    abort_deadline: float = _setting(
        30.0, "seconds a survivor has to leave its training step once a failure is declared"
    )
    form_deadline: float = _setting(20.0, "seconds that forming one process group may take")
    build_deadline: float = _setting(600.0, "seconds a spare has to build the model of the coordinate it takes over")
    operation_timeout: float = _setting(600.0, "seconds a single Gloo operation may take")
    rehearsals: int = _setting(
        0,
        "nodes whose coordinates each spare node sets up ahead of time, in a process more for each of its workers, "
        "which holds as much memory as a training rank",
    )
    standby_workers: str = _setting(
        "none",
        "what a process beside each worker has ready, to take its place if it ends and its node lives: imports (no "
        "memory of a device), device (a context there), or coordinate (the model too: as much memory as the worker)",
        ("none", "imports", "device", "coordinate"),
    )
    warm_server: str = _setting(
        "auto",
        "a process of each node that has made the imports of workers, and forks fresh ones; auto: where the job may go "
        "on with fewer replicas (shrink), and where processes stand by for workers",
        ("auto", "always", "never"),
    )
    spare_check: float = _setting(
        600.0,
        "seconds from one check of a parked spare node (device, a short computation and copy, memory, its links) to "
        "the next; one that fails it is the last to be taken; 0: spares are not checked",
    )
    snapshot_interval: int = _setting(1, "take a generation every this many iterations")
    slice_bytes: int = _setting(4 << 20, "bytes copied in one slice between two microbatches")
    copy_bandwidth: float = _setting(
        0.0, "bytes a second that copying a worker's shard into the vault may take at most; 0 for no limit"
    )
    send_bandwidth: float = _setting(
        0.0, "bytes a second that a node may send of its shards to those that keep them; 0 for no limit"
    )
    transport: str = _setting(
        "auto",
        "how shards go from node to node: sent over tcp, or read from the other node's memory by nixl (RDMA; needs "
        "pip install nixl); auto: nixl if it is there and an RDMA device has an active port",
        TRANSPORTS,
    )
    pin_agents: bool = _setting(
        True,
        "the agent of a machine runs on a few of its cores, near the devices, while workers may use all of them; only "
        "where two cores are left for each worker",
    )
    host_memory: int = _setting(
        0, "bytes of memory that shards, own and kept for others, may take on a node; 0 for what the machine has"
    )
    hang_factor: float = _setting(
        10.0, "a worker counts as stuck after this many times the longest gap seen between its signs of progress"
    )
    hang_floor: float = _setting(
        20.0, "seconds without progress that are always allowed; 0 disables the detection of stuck workers"
    )
    hang_outside: float = _setting(
        600.0,
        "seconds without progress that are allowed outside of training steps (first step, evaluation, checkpoint)",
    )
    transient_retries: int = _setting(
        3, "times in a row that the communicators are re-formed after an error without a lost node"
    )
    wait_for_spare: float = _setting(
        0.0, "minutes that a job without a spare keeps its state and waits for deadpool join before it ends"
    )
    when_out_of_spares: str = _setting(
        "save",
        "what a lost node costs when no spare is left, and none has come in the time of --deadpool-wait-for-spare: the "
        "job (save: a checkpoint, or the newest generation on disk, and it ends), a data-parallel replica or more "
        "(shrink: it goes on with as many as the nodes can hold, and with more again when nodes join), or time (wait: "
        "without end, for deadpool join)",
        ("save", "shrink", "wait"),
    )
    metrics_port: int = _setting(
        0, "TCP port of each agent's Prometheus endpoint, 0 for none; node N of several on a machine takes this plus N"
    )
    durable_dir: str = _setting(
        "", "directory or fsspec URL for durable generations, used when memory does not hold the state any more"
    )
    durable_interval: int = _setting(100, "generations from one drain to the next; 0: drain only when preempted")
    durable_keep: int = _setting(2, "how many durable generations are kept; older ones are removed")
    durable_deadline: float = _setting(1800.0, "seconds that draining one generation may take before it is given up")
    resume: str = _setting(
        "none",
        "what a new job begins with: auto (the newest durable generation, if there is one), none, or the number of one",
    )
    on_preempt: bool = _setting(
        False, "when told to end (SIGTERM), drain the newest committed generation first, then leave"
    )
    preempt_deadline: float = _setting(60.0, "seconds that this drain may take; after that the job ends without it")
    export: str = _setting(
        "", "write Megatron's checkpoint of the durable generation to this directory, then end (deadpool export)"
    )

    check_replicas: int = _setting(
        0, "iterations after which what replicas hold alike is compared again; 0: only at the end of each recovery"
    )

    redundancy: str = _setting(
        "1", "copies of each shard on other nodes: 1, 2, or k+m (Reed-Solomon, m parity shares for k nodes)"
    )
    domains: str = _setting(
        "",
        "failure domains of the nodes, so that no copy is in the domain of its owner: racks as 0-3=r1,4-7=r2, or a "
        "YAML file with any kinds; without it Slurm's switches, where its topology is known",
    )
    nvlink_domains: str = _setting(
        "",
        "NVLink domains of the nodes, as --deadpool-domains: a spare comes from the lost node's where tensor or expert "
        "parallelism spans nodes of it, and no copy is kept in the domain of its owner",
    )
    drain_from: str = _setting(
        "",
        "who says that nodes are to be taken away, as with deadpool drain: any of slurm (drained or down), kubernetes "
        "(cordoned), file:PATH (a name or number a line), and the URL of an HTTP hook, separated by commas",
    )
    drain_poll: float = _setting(10.0, "seconds from one look at each of them to the next")

    scrub_rate: int = _setting(
        64 << 20,
        "bytes a second at which each agent reads its vault to find copies that changed in memory; 0 disables it",
    )

    def __post_init__(self) -> None:
        try:
            Scheme.parse(self.redundancy)
        except ValueError as err:
            raise ConfigError(f"--deadpool-redundancy: {err}") from None
        try:
            check_address(self.store)
        except ValueError as err:
            raise ConfigError(f"--deadpool-store: {err}") from None
        for entry in self.drain_sources:
            if entry not in ("slurm", "kubernetes") and not re.match(r"(file:|https?://)\S", entry):
                raise ConfigError(
                    f"--deadpool-drain-from: {entry!r} is none of slurm, kubernetes, file:PATH, http://... and https://..."
                )
        for name in (
            "drain_poll",
            "lease",
            "abort_deadline",
            "form_deadline",
            "build_deadline",
            "operation_timeout",
            "hang_outside",
            "durable_deadline",
            "preempt_deadline",
        ):
            seconds = getattr(self, name)
            if not 0 < seconds < math.inf:
                raise ConfigError(
                    f"--deadpool-{name.replace('_', '-')} must be more than 0 seconds and finite, not {seconds:g}"
                )
        if not (1 <= self.hang_factor < math.inf and 0 <= self.hang_floor < math.inf):
            raise ConfigError(
                "--deadpool-hang-factor must be 1 or more and --deadpool-hang-floor 0 or more, both finite"
            )
        if self.lease >= self.abort_deadline:
            raise ConfigError(
                f"--deadpool-lease ({self.lease:g} s) must be shorter than --deadpool-abort-deadline "
                f"({self.abort_deadline:g} s): detect < abort < give up"
            )
        if self.abort_deadline > self.build_deadline:
            raise ConfigError(
                f"--deadpool-abort-deadline ({self.abort_deadline:g} s) must not be longer than "
                f"--deadpool-build-deadline ({self.build_deadline:g} s)"
            )
        if not 0 <= self.metrics_port < 65536:
            raise ConfigError(f"--deadpool-metrics-port must be 0 (none) to 65535, not {self.metrics_port}")
        for name, least, what in (
            ("wait_for_spare", 0, "0 minutes or more and finite"),
            ("spare_nodes", 0, "0 or more nodes"),
            ("rehearsals", 0, "0 or more nodes"),
            ("spare_check", 0, "0 (never) or more seconds, and finite"),
            ("snapshot_interval", 1, "1 or more iterations"),
            ("copy_bandwidth", 0, "0 (no limit) or more bytes a second, and finite"),
            ("send_bandwidth", 0, "0 (no limit) or more bytes a second, and finite"),
            ("host_memory", 0, "0 (no limit) or more bytes"),
            ("scrub_rate", 0, "0 or more bytes a second"),
            ("slice_bytes", 4096, "4096 or more bytes"),
            ("durable_interval", 0, "0 or more generations"),
            ("durable_keep", 1, "1 or more generations"),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"--deadpool-{name.replace('_', '-')} must be {what}")
        self._check_durable()

    def _check_durable(self) -> None:
        if self.resume not in ("auto", "none") and not self.resume.isdecimal():
            raise ConfigError(f"--deadpool-resume {self.resume}: must be auto, none, or the number of a generation")
        if not self.durable_dir:
            for name, value in (("resume", self.resume != "none"), ("on-preempt", self.on_preempt)):
                if value:
                    raise ConfigError(f"--deadpool-{name} needs --deadpool-durable-dir")
        if self.when_out_of_spares == "wait" and self.wait_for_spare:
            raise ConfigError(
                "--deadpool-when-out-of-spares wait has no end, so --deadpool-wait-for-spare has no use: leave one out"
            )
        if self.export and self.resume == "none":
            raise ConfigError("--deadpool-export needs --deadpool-resume: auto, or the number of a generation")

    @property
    def wants_warm_server(self) -> bool:
        """What ``warm_server`` comes to."""
        needs = self.when_out_of_spares == "shrink" or self.standby_workers != "none"
        return self.deadpool and (self.warm_server == "always" or (self.warm_server == "auto" and needs))

    @property
    def drain_sources(self) -> list[str]:
        """The entries of ``drain_from``."""
        return [entry.strip() for entry in self.drain_from.split(",") if entry.strip()]

    def flags(self) -> list[str]:
        """This configuration as command-line flags; only what differs from the defaults."""
        out: list[str] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value == f.default:
                continue
            if value is True:
                out.append(_flag(f))
            elif value is False:
                out.append(_flag(f).replace("--", "--no-", 1))
            else:
                out += [_flag(f), str(value)]
        return out


_PREFIX = "deadpool_"
# Variables of our name that are no settings: what agents tell their workers, what scripts and tests are told.
OTHER_VARIABLES: typing.Final = (
    "DEADPOOL_BEGAN",
    "DEADPOOL_CONFIG",
    "DEADPOOL_EMULATED_CAPABILITY",
    "DEADPOOL_EMULATED_CUBLASLT",
    "DEADPOOL_EMULATE_CPU",
    "DEADPOOL_EPOCH",
    "DEADPOOL_REHEARSES",
    "DEADPOOL_STANDBY",
    "DEADPOOL_MODE",
    "DEADPOOL_SETTINGS",
    "DEADPOOL_CONTROL_FD",
    "DEADPOOL_DOORBELL_FD",
    "DEADPOOL_PULSE_FD",
    "DEADPOOL_MUSTER_FD",
    "DEADPOOL_ORDERS_FD",
    "DEADPOOL_STACKS_FILE",
    "DEADPOOL_AGENT_PID",
    "DEADPOOL_ADOPTED",
    "DEADPOOL_NODE",
    "DEADPOOL_MACHINE",
    "DEADPOOL_SECRET",
    "DEADPOOL_SECRET_FILE",
    "DEADPOOL_STORE_PASSWORD",
    "DEADPOOL_ROOT",
    "DEADPOOL_FREE_GB",
    "DEADPOOL_BRIDGE_GIT",
    "DEADPOOL_UPSTREAM",
    "DEADPOOL_UPSTREAM_GIT",
    "DEADPOOL_TEST_COORDINATES",
    "DEADPOOL_TEST_FAULTS",
    "DEADPOOL_TEST_SEED",
    "DEADPOOL_TEST_RESULTS",
    "DEADPOOL_TEST_MEGATRON",
)
_UNITS = ("seconds", "minutes", "bytes", "iterations", "generations", "times", "nodes", "port")


def _flag(f: Field[Any]) -> str:
    return "--deadpool" if f.name == "deadpool" else "--deadpool-" + f.name.replace("_", "-")


def _dest(f: Field[Any]) -> str:
    return "deadpool" if f.name == "deadpool" else _PREFIX + f.name


def variable(f: Field[Any]) -> str:
    """The environment variable of a setting."""
    return "DEADPOOL" if f.name == "deadpool" else "DEADPOOL_" + f.name.upper()


def unit(f: Field[Any]) -> str:
    """The unit of a number, the first one its help names; empty for anything else."""
    words = f.metadata["help"].replace(",", " ").split()
    return next((w for w in words if w in _UNITS), "") if _type(f) in (int, float) else ""


def _nearest(name: str, names: Sequence[str], quote: str = "") -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {quote}{near[0]}{quote}?" if near else ""


@functools.cache
def _types() -> dict[str, type]:
    hints = typing.get_type_hints(DeadpoolConfig)  # 2 ms, so once
    assert all(isinstance(hint, type) for hint in hints.values())
    return hints


def _type(f: Field[Any]) -> type:
    return _types()[f.name]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group ``deadpool`` to a parser (Megatron's own, or the launcher's).

    Every default is None on the command line, so that `resolve` can tell "not given" from "given". A parser that has
    the group already (a patched Megatron under `deadpool launch`) stays as it is.
    """
    if "--deadpool" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group(
        title="deadpool", description="survive the loss of nodes (DeadPool for Megatron-LM)"
    )
    group.add_argument("--deadpool-config", default=None, metavar="FILE", help="YAML file with any of these settings")
    for f in fields(DeadpoolConfig):
        text = f.metadata["help"] + f" (default: {f.default if f.default not in ('', False) else 'off'})"
        if _type(f) is bool and f.default is False:
            group.add_argument(_flag(f), dest=_dest(f), action="store_true", default=None, help=text)
        elif _type(f) is bool:
            group.add_argument(_flag(f), dest=_dest(f), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(
                _flag(f),
                dest=_dest(f),
                type=_type(f),
                default=None,
                choices=f.metadata["choices"],
                metavar=None if f.metadata["choices"] else (unit(f) or _type(f).__name__).upper(),
                help=text.replace("%", "%%"),
            )
    return parser


def _coerce(f: Field[Any], value: Any, where: str) -> Any:
    want = _type(f)
    shown = "nothing (leave the line out for the default)" if value is None else repr(value)
    if want is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in ("1", "true", "yes", "on"):
            return True
        if text in ("0", "false", "no", "off", ""):
            return False
        raise ConfigError(f"{where}: {shown} is not yes or no")
    try:
        if value is None or isinstance(value, (bool, list, dict)):  # of which `str` would make a text
            raise ValueError(value)
        if want is int and isinstance(value, float) and not value.is_integer():
            raise ValueError(value)
        out = want(value)
    except (TypeError, ValueError, OverflowError):
        noun = {int: "a whole number", float: "a number", str: "text"}[want]
        raise ConfigError(f"{where}: expected {noun}, not {shown}") from None
    choices = f.metadata["choices"]
    if choices and out not in choices:
        near = _nearest(str(value), choices, "'")
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(choices)}{near}")
    return out


def _load_yaml(where: str, path: str) -> Any:
    try:
        return read_yaml(path)
    except NotRead as err:
        raise ConfigError(f"{where}: {err}") from None


def _file_settings(path: str | None, megatron: str | None) -> tuple[str, dict[str, Any]]:
    """What the YAML file says, and what to call it in a message: our own file, or a section of Megatron's."""
    if path:
        where = f"--deadpool-config {path}"
        data = _load_yaml(where, path)
    elif megatron:
        where = f"--yaml-cfg {megatron}: deadpool"
        whole = _load_yaml(f"--yaml-cfg {megatron}", megatron)
        data = whole.get("deadpool", {}) if isinstance(whole, dict) else {}
    else:
        return "", {}
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of settings")
    names = [f.name for f in fields(DeadpoolConfig)]
    for key in data:
        if key not in names:
            raise ConfigError(f"{where}: unknown setting {key!r}{_nearest(str(key), names, chr(39))}")
    return where, data


def _check_variables(env: Mapping[str, str]) -> None:
    known = [*(variable(f) for f in fields(DeadpoolConfig)), *OTHER_VARIABLES]
    for name in env:
        if (name == "DEADPOOL" or name.startswith("DEADPOOL_")) and name not in known:
            raise ConfigError(f"unknown environment variable {name}{_nearest(name, known)}")


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> DeadpoolConfig:
    """Combine flags, environment, YAML file and defaults.

    Args:
        flags: values by argparse destination (``deadpool``, ``deadpool_lease`` ...); None means "not given".
            ``yaml_cfg`` is Megatron's own YAML file, whose section ``deadpool`` counts without ``deadpool_config``.
        environ: the environment, ``os.environ`` when None.

    Raises:
        ConfigError: unknown key or variable, malformed value, contradiction.
    """
    env = os.environ if environ is None else environ
    _check_variables(env)
    where, file = _file_settings(flags.get("deadpool_config") or env.get("DEADPOOL_CONFIG"), flags.get("yaml_cfg"))
    values: dict[str, Any] = {}
    for f in fields(DeadpoolConfig):
        if flags.get(_dest(f)) is not None:
            values[f.name] = _coerce(f, flags[_dest(f)], _flag(f))
        elif variable(f) in env:
            values[f.name] = _coerce(f, env[variable(f)], variable(f))
        elif f.name in file:
            values[f.name] = _coerce(f, file[f.name], f"{where}: {f.name}")
        else:
            assert f.default is not MISSING
            values[f.name] = f.default
    return DeadpoolConfig(**values)


class _Raising(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def from_script_arguments(arguments: Sequence[str]) -> DeadpoolConfig:
    """Read DeadPool's settings out of a training script's arguments; everything else is left alone."""
    parser = add_arguments(_Raising(add_help=False, allow_abbrev=False))
    parser.add_argument("--yaml-cfg", default=None)
    known, rest = parser.parse_known_args(list(arguments))
    names = ["--deadpool-config", *(_flag(f) for f in fields(DeadpoolConfig))]
    for token in rest:
        flag = token.split("=", 1)[0]
        if flag.startswith(("--deadpool", "--no-deadpool")) and flag not in names:
            raise ConfigError(f"unknown flag {flag}{_nearest(flag, names)}")
    return resolve(vars(known))


def without_ours(arguments: Sequence[str]) -> list[str]:
    """A script's arguments without DeadPool's settings, for one whose parser does not know them."""
    return add_arguments(_Raising(add_help=False, allow_abbrev=False)).parse_known_args(list(arguments))[1]


def carry_over(config: DeadpoolConfig, namespace: typing.Any) -> None:
    """Set the settings on a namespace under their argparse destinations.

    Megatron's ``load_yaml`` (``--yaml-cfg``) puts a namespace of its own in the place of the parsed one.
    """
    for f in fields(DeadpoolConfig):
        setattr(namespace, _dest(f), getattr(config, f.name))


def schema() -> dict[str, Any]:
    """JSON schema of the YAML file of ``--deadpool-config``, for editors and for checks before a job."""
    types_ = {bool: "boolean", int: "integer", float: "number", str: "string"}
    properties: dict[str, Any] = {}
    for f in fields(DeadpoolConfig):
        entry: dict[str, Any] = {"type": types_[_type(f)], "default": f.default, "description": f.metadata["help"]}
        if f.metadata["choices"]:
            entry["enum"] = list(f.metadata["choices"])
        properties[f.name] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DeadPool for Megatron-LM: settings",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
