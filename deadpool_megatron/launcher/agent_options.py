"""The options of `deadpool agent`: torchrun's names and environment, so that a script changes one word."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from deadpool_megatron.cluster.store import EMBEDDED
from deadpool_megatron.config import from_script_arguments
from deadpool_megatron.launcher.local import add_common_arguments
from deadpool_megatron.launcher.plan import LaunchError, LaunchPlan, check, whole
from deadpool_megatron.options import count, host_name, number

DEFAULT_PORT = 29500
_JOIN_S = 300.0
_COORDINATOR_GONE_S = 60.0
# What has no place here, and what to do about it.
_REFUSED = {
    "no_python": "--no-python: DeadPool runs Python scripts, in its own worker process; leave it out",
    "run_path": "--run-path: leave it out, scripts are always run like that",
}


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """One `deadpool agent`, checked.

    ``endpoint`` is (host, port) as given; ``node`` None lets the coordinator choose; ``hosts`` says whether the
    coordinator is started here: None for "if the endpoint is an address of this machine". ``join_s`` is how long to
    wait for the coordinator and for the other nodes, ``gone_s`` for a coordinator that is gone to come back. ``adopt``
    is the socket at which the ranks of a patched Megatron come to be this node's workers.
    """

    launch: LaunchPlan
    endpoint: tuple[str, int]
    node: int | None
    hosts: bool | None
    job_name: str
    join_s: float
    gone_s: float
    local_addr: str | None
    secret_file: str | None
    local_ranks: frozenset[int] | None
    adopt: str = ""


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deadpool agent` (and `deadpool coordinator`, which is started with the same)."""
    add = parser.add_argument
    add("--nnodes", metavar="N", help="nodes of the job, spares included (default: 1)")
    add("--spare-nodes", type=count(), default=0, metavar="S", help="how many of them are warm spares (default: 0)")
    add("--nproc-per-node", "--nproc_per_node", metavar="P", help="workers (devices) a node: a number, or gpu")
    add(
        "--node-rank",
        "--node_rank",
        metavar="R",
        help="this node's number; the last S are the spares (default: as Slurm or Kubernetes number it, else any)",
    )
    add(
        "--rdzv-endpoint",
        "--rdzv_endpoint",
        metavar="HOST[:PORT]",
        help=f"where the coordinator listens (default port: {DEFAULT_PORT})",
    )
    add("--master-addr", "--master_addr", metavar="HOST", help="the same in torchrun's other words")
    add("--master-port", "--master_port", metavar="PORT", help="the same in torchrun's other words")
    add("--rdzv-id", "--rdzv_id", metavar="NAME", help="the job's name (default: none)")
    add("--rdzv-backend", "--rdzv_backend", metavar="static|c10d", help="no difference: the coordinator is the one")
    add(
        "--rdzv-conf",
        "--rdzv_conf",
        default="",
        metavar="K=V,...",
        help=f"seconds to wait: join_timeout for the coordinator and all nodes (default: {_JOIN_S:g}), "
        f"coordinator_timeout for a coordinator that is gone (default: {_COORDINATOR_GONE_S:g})",
    )
    add("--standalone", action="store_true", help="this node alone, on any free port")
    add("--local-addr", "--local_addr", metavar="ADDR", help="this node's address for the others (default: found)")
    add("--run-dir", metavar="DIR", help="shared by all nodes: status, events (default: --log-dir, else runs/latest)")
    add("--log-dir", "--log_dir", metavar="DIR", help="logs of this node's workers (default: under --run-dir)")
    add("--secret-file", metavar="FILE", help="64 hex digits, the same for all (default: made at each start)")
    add(
        "--no-coordinator",
        action="store_true",
        help="never start the coordinator here: a `deadpool coordinator` runs at the endpoint",
    )
    add("-t", "--tee", default="all", metavar="none|...", help="none: show no output of workers (default: show it)")
    add("-r", "--redirects", metavar="...", help="accepted and ignored: all output goes to the logs")
    add("--local-ranks-filter", "--local_ranks_filter", metavar="I,...", help="show only these workers of the node")
    add("--max-restarts", "--max_restarts", metavar="K", help="accepted and ignored: nothing is restarted")
    add("--monitor-interval", "--monitor_interval", metavar="S", help="accepted and ignored: ends are seen at once")
    add("--no-python", "--no_python", action="store_true", help=argparse.SUPPRESS)
    add("--run-path", "--run_path", action="store_true", help=argparse.SUPPRESS)
    add("--adopt", default="", help=argparse.SUPPRESS)  # given by `intree.attach`
    add_common_arguments(parser)


def _nodes(text: str) -> int:
    low, _, high = text.partition(":")
    if high and high != low:
        raise LaunchError(f"--nnodes {text}: the number of nodes is fixed (spares count): give one number")
    return whole(low, "--nnodes")


def _node_rank(given: str | None, environ: Mapping[str, str], nodes: int) -> int | None:
    """The node's number from the command line or what the cluster says; None where nobody says it."""
    if given is not None:
        return whole(given, "--node-rank")
    if "PET_NODE_RANK" in environ:
        return whole(environ["PET_NODE_RANK"], "PET_NODE_RANK")
    # A batch script has these too; only in a step with one task a node do they number the agents.
    if environ.get("SLURM_STEP_NUM_TASKS") == environ.get("SLURM_STEP_NUM_NODES") == str(nodes):
        return whole(environ.get("SLURM_PROCID", ""), "SLURM_PROCID")
    if "JOB_COMPLETION_INDEX" in environ:
        return whole(environ["JOB_COMPLETION_INDEX"], "JOB_COMPLETION_INDEX")
    return 0 if nodes == 1 else None


def _endpoint(
    options: argparse.Namespace, environ: Mapping[str, str], nodes: int, elected: bool = False
) -> tuple[str, int]:
    if options.standalone:
        return "127.0.0.1", 0
    text = options.rdzv_endpoint or environ.get("PET_RDZV_ENDPOINT", "")
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, ""
    host = host or options.master_addr or environ.get("PET_MASTER_ADDR") or environ.get("MASTER_ADDR", "")
    port = port or options.master_port or environ.get("PET_MASTER_PORT") or environ.get("MASTER_PORT", "")
    if not host and nodes == 1:
        return "127.0.0.1", 0
    if not host and elected:
        return "", whole(port, "--rdzv-endpoint port") if port else 0
    if not host:
        raise LaunchError(f"--nnodes {nodes} needs --rdzv-endpoint HOST:PORT, the same on every node")
    at = whole(port, "--rdzv-endpoint port") if port else DEFAULT_PORT
    if not 0 < at < 65536:
        raise LaunchError(f"--rdzv-endpoint {host}:{at}: a port is between 1 and 65535")
    return _host(host.strip("[]"), "--rdzv-endpoint"), at


def _host(text: str, flag: str) -> str:
    try:
        return host_name(text)
    except argparse.ArgumentTypeError as err:
        raise LaunchError(f"{flag}: {err}") from None


def _seconds(conf: str) -> dict[str, float]:
    """The waits of ``--rdzv-conf``; torchrun's other keys have no meaning here."""
    waits = {"join_timeout": _JOIN_S, "coordinator_timeout": _COORDINATOR_GONE_S}
    for pair in filter(None, conf.split(",")):
        key, _, value = (x.strip() for x in pair.partition("="))
        if key in waits:
            try:
                waits[key] = number(1e-3)(value)
            except argparse.ArgumentTypeError as err:
                raise LaunchError(f"--rdzv-conf {pair}: the seconds {err}") from None
    return waits


def check_agent(options: argparse.Namespace, environ: Mapping[str, str]) -> AgentPlan:
    """Turn a command line and the cluster's environment into a plan.

    Raises:
        LaunchError, ConfigError, UserError: with one line for the user.
    """
    for name, why in _REFUSED.items():
        if getattr(options, name):
            raise LaunchError(why)
    backend = options.rdzv_backend or environ.get("PET_RDZV_BACKEND", "static")
    if backend not in ("static", "c10d"):
        raise LaunchError(f"--rdzv-backend {backend}: the coordinator is the rendezvous; give static, c10d or nothing")
    nodes = _nodes(options.nnodes or environ.get("PET_NNODES", "1"))
    options.nproc_per_node = options.nproc_per_node or environ.get("PET_NPROC_PER_NODE", "1")
    log_dir = options.log_dir or environ.get("PET_LOG_DIR")
    options.run_dir = options.run_dir or log_dir or "runs/latest"
    elected = from_script_arguments(list(options.arguments)).store != EMBEDDED
    job_name = options.rdzv_id or environ.get("PET_RDZV_ID", "none")
    if elected and job_name == "none":
        raise LaunchError("--deadpool-store etcd needs --rdzv-id NAME: it tells this job from others in the same etcd")
    if elected and options.no_coordinator:
        raise LaunchError("--no-coordinator: with --deadpool-store etcd every agent may be elected; leave it out")
    host, port = _endpoint(options, environ, nodes, elected)
    node = 0 if options.standalone else _node_rank(options.node_rank, environ, nodes)
    if node is not None and not 0 <= node < nodes:
        raise LaunchError(f"--node-rank {node}: with --nnodes {nodes} there are nodes 0 to {nodes - 1}")
    shown = None
    if options.local_ranks_filter:
        shown = frozenset(whole(x, "--local-ranks-filter") for x in options.local_ranks_filter.split(","))
    local_addr = options.local_addr or environ.get("PET_LOCAL_ADDR")
    waits = _seconds(options.rdzv_conf or environ.get("PET_RDZV_CONF", ""))
    launch = check(options, nodes, "--nnodes", host, log_dir)
    if options.adopt and launch.config.standby_workers != "none":
        raise LaunchError(
            "--deadpool-standby-workers: another launcher starts the workers, each of them once; leave it out, or "
            "start the job with deadpool agent"
        )
    return AgentPlan(
        launch,
        (host, port),
        node,
        False if options.no_coordinator else None if node is None else node == 0,
        job_name,
        waits["join_timeout"],
        waits["coordinator_timeout"],
        _host(local_addr, "--local-addr") if local_addr else None,
        options.secret_file,
        shown,
        options.adopt,
    )
