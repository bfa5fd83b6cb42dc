"""How coordinator and agents are started: their settings, their processes, and the end of both.

`deadpool launch` starts all of a job here; `deadpool agent` one agent and, on one node, the coordinator. The settings
go through stdin, since the job's secret is among them.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from deadpool_megatron.cluster import notices
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec, gather_s
from deadpool_megatron.cluster.notices import INTERRUPT, PREEMPT, TERMINATE
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import PASSWORD
from deadpool_megatron.cluster.store.leadership import Leadership
from deadpool_megatron.config import DeadpoolConfig
from deadpool_megatron.launcher.plan import LaunchPlan, value_of
from deadpool_megatron.launcher.rendezvous import StoreWatch

NODE_MODULE = "deadpool_megatron.launcher.node"
# Not for workers: the job's secret, and the file that holds it.
SECRET_VARIABLES = ("DEADPOOL_SECRET", "DEADPOOL_SECRET_FILE", PASSWORD)
# What does not end a process that does not listen to it yet. A coordinator is told again when it does.
HELD_BACK: Final = {"coordinator": (PREEMPT, INTERRUPT, TERMINATE), "agent": (PREEMPT,)}
_AGAIN_S = 1.0  # from the first try to start the coordinator again to the next; each time twice as long


@dataclass(frozen=True, slots=True)
class DurableStart:
    """How the coordinator of a job begins with the durable directory.

    Args:
        spec: what the job does about it.
        resume: ``auto``, ``none``, or the number of a generation.
        writes: this job owns the directory.
        launcher: the process with which all of the job ends; 0: none.
        newer_than: only a generation after this iteration is worth more than the checkpoint that is loaded.
        shrinks: with fewer replicas the job begins anew with what is there, whatever it began with.
    """

    spec: DurableSpec
    resume: str
    writes: bool
    launcher: int
    newer_than: int
    shrinks: bool = False


@dataclass(frozen=True, slots=True)
class CoordinatorStart:
    """What a coordinator has to know before it starts. It comes as JSON (msgspec) on its stdin.

    Args:
        agent: settings of an agent of this job but for its node, for `deadpool join`.
        store: where the coordinator's state is kept, and the job's name there.
        host: the address that is told to others; ``bind`` is the one it listens on, ``port`` 0 for any.
        store_port: where the rendezvous store of the process groups listens; 0 for any.
        resume: go on where a coordinator that is gone left off.
        guard: of the leadership; goes with every write.
        alone: all of the job ends with the process that starts this one.
    """

    job: JobSpec
    agent: AgentSettings
    run_dir: str
    store: tuple[str, str]
    host: str
    bind: str = "127.0.0.1"
    port: int = 0
    store_port: int = 0
    durable: DurableStart | None = None
    resume: bool = False
    guard: tuple[str, int] = ("", 0)
    alone: bool = False


def coordinator_settings(
    plan: LaunchPlan,
    job_id: str,
    secret: bytes,
    bind: str = "127.0.0.1",
    port: int = 0,
    join_s: float = 120.0,
    store_name: str = "",
    alone: bool = False,
) -> CoordinatorStart:
    """Of the coordinator of a job.

    Args:
        alone: all of the job ends with this process.
        store_name: of the job in the store; its id where nobody else has to find it there.
        bind: the address it listens on; ``plan.host`` is the one that is told to others.
        port: 0 for any.
        join_s: seconds that agents have to join.
    """
    c = plan.config
    job = JobSpec(
        plan.nodes,
        plan.spare_nodes,
        plan.slots_per_node,
        c.deadpool,
        Deadlines(lease=c.lease, abort=c.abort_deadline, build=c.build_deadline, form=c.form_deadline, join=join_s),
        c.transient_retries,
        c.redundancy,
        plan.domains,
        on_preempt=c.deadpool and c.on_preempt,
        snapshot_interval=c.snapshot_interval,
        wait_for_spare_s=60 * c.wait_for_spare,
        rehearsals=c.rehearsals,
        when_out_of_spares=c.when_out_of_spares,
        spare_check_s=c.spare_check if c.deadpool else 0.0,
        gather_s=gather_s(plan.nodes),
        durable=DurableSpec("", "", resume=True) if c.deadpool and c.when_out_of_spares == "shrink" else None,
    )
    agent = agent_settings(plan, -1, job_id, secret, (plan.host, 0), 0, plan.host, store_name=store_name)
    return CoordinatorStart(
        job,
        agent,
        plan.run_dir,
        (c.store, store_name or job_id),
        plan.host,
        bind,
        port,
        durable=_durable(plan, job_id, alone),
        alone=alone,
    )


def agent_settings(
    plan: LaunchPlan,
    node: int,
    job_id: str,
    secret: bytes,
    coordinator: tuple[str, int],
    store_port: int,
    host: str,
    devices: str | None = None,
    adopt: str = "",
    store_name: str = "",
) -> AgentSettings:
    """Of the agent of ``node``.

    Args:
        store_name: of the job in the store, where the coordinator may move; else empty.
        coordinator: address and port.
        store_port: where the rendezvous store of the process groups listens, beside the coordinator.
        host: the node's own address, for its vault.
        devices: CUDA devices of this node; None: all that are visible.
        adopt: the socket at which workers come to the agent; empty: it starts them.
    """
    c = plan.config
    return AgentSettings(
        c,
        job_id,
        node,
        plan.slots_per_node,
        plan.nodes - plan.spare_nodes,
        host,
        f"{coordinator[0]}:{coordinator[1]}",
        secret,
        plan.log_dir,
        [sys.executable, "-m", "deadpool_megatron.worker", *plan.command],
        _environment(plan, coordinator[0], store_port, job_id, devices),
        plan.shm_directory,
        [c.store, plan.run_dir, store_name] if store_name else [],
        adopt,
        metrics_port=metrics_port(c, node, host),
        exit_signal=_exit_signal(plan.arguments),
        pin=c.deadpool and c.pin_agents and not _shared(host),  # they would all choose the same processors
        kernel_log="" if _shared(host) or plan.emulate_cpu else "/dev/kmsg",  # nor is it said whose device it is
    )


def metrics_port(config: DeadpoolConfig, node: int, host: str) -> int:
    """Where the agent of ``node`` serves its metrics; 0: nowhere. Agents of one machine share its ports."""
    return config.metrics_port + node if config.metrics_port and _shared(host) else config.metrics_port


def _shared(host: str) -> bool:
    return host.startswith("127.")


def _exit_signal(arguments: Sequence[str]) -> int:
    """The signal on which Megatron saves a checkpoint and ends; 0 for none."""
    if "--exit-signal-handler" not in arguments:
        return 0
    return int(getattr(signal, value_of(arguments, "--exit-signal", "SIGTERM"), 0))


def _durable(plan: LaunchPlan, job_id: str, alone: bool) -> DurableStart | None:
    """What the coordinator is told of the durable tier; None when there is none."""
    c = plan.config
    if not (c.deadpool and c.durable_dir):
        return None
    spec = DurableSpec(
        directory=c.durable_dir,
        job=re.sub("[^A-Za-z0-9]", "", job_id),
        interval=0 if c.export else c.durable_interval,
        keep=c.durable_keep,
        deadline=c.durable_deadline,
        preempt_deadline=c.preempt_deadline,
    )
    launcher = os.getpid() if alone else 0
    newer_than = -1 if c.export else _checkpoint_to_load(plan.arguments)  # an export is of what is durable
    shrinks = c.when_out_of_spares == "shrink"
    return DurableStart(spec, c.resume, not c.export, launcher, newer_than, shrinks)


def _checkpoint_to_load(arguments: Sequence[str]) -> int:
    """The iteration of Megatron's checkpoint that --load names; -1 when there is none.

    With --finetune a job begins at iteration 0 whatever it loads, so any durable generation of it is newer.
    """
    if "--finetune" in arguments:
        return -1
    directory = value_of(arguments, "--load", "")
    try:
        text = (Path(directory) / "latest_checkpointed_iteration.txt").read_text().strip() if directory else ""
    except OSError:
        return -1
    return int(text) if text.isdecimal() else -1


def _environment(
    plan: LaunchPlan, store_host: str, store_port: int, job_id: str, local_devices: str | None
) -> dict[str, str]:
    """What every worker of the job finds in its environment, as under torchrun."""
    env = dict(os.environ)
    env.update(
        {
            "MASTER_ADDR": store_host,
            "MASTER_PORT": str(store_port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": job_id,
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "PYTHONUNBUFFERED": "1",
            "DEADPOOL_MODE": "deadpool" if plan.config.deadpool else "plain",
            "DEADPOOL_SETTINGS": msgspec.json.encode(plan.config).decode(),
        }
    )
    for name in ("RANK", *SECRET_VARIABLES):
        env.pop(name, None)
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if plan.emulate_cpu:
        from deadpool_megatron.emulation import environment

        env.update(environment())
        env["DEADPOOL_EMULATE_CPU"] = "1"
    if local_devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = local_devices
    return env


def end_with_parent(signum: int = signal.SIGTERM) -> None:
    """Run in a child before exec: the kernel ends it when its parent ends."""
    ctypes.CDLL(None).prctl(1, signum)


def _begin(signum: int, ignored: Sequence[int]) -> None:
    """Of a child, before exec. What a warning means to it, it says when it is ready for one."""
    notices.ignored()
    for notice in ignored:
        signal.signal(notice, signal.SIG_IGN)
    if signum:
        end_with_parent(signum)


def start_node(role: str, signum: int, **extra: Any) -> subprocess.Popen[bytes]:
    """The process of `Processes.start`, its stdin a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", NODE_MODULE, role],
        stdin=subprocess.PIPE,
        preexec_fn=partial(_begin, signum, HELD_BACK[role]),
        start_new_session=True,
        **extra,
    )


class Processes:
    """The children of a command, ended by their ids. They end by themselves when it is killed."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[bytes]] = []

    def start(
        self, role: str, settings: AgentSettings | CoordinatorStart, signum: int = signal.SIGTERM, **extra: Any
    ) -> subprocess.Popen[bytes]:
        """Start ``coordinator`` or ``agent``. From the main thread: the child ends with the thread that made it.

        ``signum`` is what it gets then; 0: it lives on.
        """
        process = start_node(role, signum, **extra)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(settings))
        process.stdin.close()
        self.all.append(process)
        return process

    def end(self, grace_s: float) -> None:
        """Have those that live end, SIGKILL after ``grace_s`` seconds; returns when all are reaped."""
        for process in self.all:
            if process.poll() is None:
                process.send_signal(INTERRUPT)  # SIGTERM may be a notice only
                process.terminate()
        end = time.monotonic() + grace_s
        for process in self.all:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def code_of(signum: int) -> Exit:
    """How a command ends that was interrupted by this signal."""
    return Exit.TERMINATED if signum == signal.SIGTERM else Exit.INTERRUPTED


class CoordinatorProcess:
    """The coordinator as a child; started again, where it listened, when a signal has ended it, or when it hangs.

    Its state lies in the store and with the agents, so training does not notice. More than ``_RESTARTS`` times
    within ``_RESTARTS_S`` seconds is no accident: then the job ends. ``port`` is 0 when it could not start.

    Args:
        leadership: taken already; its guard goes with every write of the coordinator's.
        others_lead: when this process dies another node leads: the child must not end the job then.
    """

    _RESTARTS = 5
    _RESTARTS_S = 120.0

    def __init__(
        self, processes: Processes, settings: CoordinatorStart, leadership: Leadership, others_lead: bool = False
    ) -> None:
        self._others_lead = others_lead
        self._processes = processes
        self._settings = settings
        self._leadership = leadership
        self._died: list[float] = []
        self._interrupted = 0  # by which signal to the command
        self._preempted = self._listens = False
        self._watch: StoreWatch | None = None
        self.port = self.store_port = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        guard = self._leadership.guard
        assert guard is not None, "who does not lead starts no coordinator"
        self._settings = replace(self._settings, guard=(guard.key, guard.revision))
        signum = signal.SIGKILL if self._others_lead else signal.SIGTERM
        process = self._processes.start("coordinator", self._settings, signum, stdout=subprocess.PIPE)
        assert process.stdout is not None
        told = process.stdout.readline().split()
        self._listens = len(told) == 2 and all(each.isdigit() for each in told)
        if self._listens:  # else it has ended, with its last words
            self.port, self.store_port = map(int, told)
            self._settings = replace(self._settings, port=self.port, store_port=self.store_port, resume=True)
            self._watch = StoreWatch(process, self.store_port, self._settings.agent.config.lease)
        return process

    def _watch_no_more(self) -> str:
        """Why the watch has ended the process; empty when it has not."""
        watch, self._watch = self._watch, None
        if watch is None:
            return ""
        watch.end()
        return watch.why

    def interrupt(self, signum: int = signal.SIGINT) -> None:
        """The user wants the end, and has sent SIGINT or SIGTERM; safe in a signal handler."""
        self._interrupted = self._interrupted or signum
        if self.process.poll() is None:
            self.process.send_signal(TERMINATE if self._interrupted == signal.SIGTERM else INTERRUPT)

    def preempt(self) -> None:
        """The machines are wanted soon (see `Core.preempted`). Safe in a signal handler."""
        self._preempted = True
        if self.process.poll() is None:
            self.process.send_signal(PREEMPT)

    def kill(self) -> None:
        """End the process at once, for good: somebody else leads, or is to."""
        self._watch_no_more()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def revive(self) -> tuple[int, str] | None:
        """The process has ended: start it again (None), or say its exit code and message. Blocks for its last words."""
        assert self.process.stdout is not None
        message = self.process.stdout.read().decode().strip()
        code = self.process.wait()
        why = self._watch_no_more()
        if code >= 0 or self._interrupted:
            return code, message
        if (over := self._died_of(-code, why)) is not None:
            return over
        began, pause = time.monotonic(), _AGAIN_S
        while (failed := self._start_again()) is not None:
            code, message = failed
            if code < 0 and (over := self._died_of(-code)) is not None:  # before it listened
                return over
            # Nobody has decided that the job ends, and what has ended the one before, want of memory perhaps, may pass.
            if code in (Exit.DEPOSED, Exit.RECOVERY_FAILED) or self._interrupted:
                return max(code, int(Exit.FAILED)), message
            if time.monotonic() - began > self._RESTARTS_S:
                return Exit.RECOVERY_FAILED, message
            time.sleep(pause)
            pause *= 2
        # Whoever was told meanwhile, or was told and has died of something else, has told nobody.
        if self._preempted:
            self.preempt()
        if self._interrupted:
            self.interrupt(self._interrupted)
        return None

    def _died_of(self, signum: int, why: str = "") -> tuple[int, str] | None:
        """One more has been ended by a signal: how the job ends if it is one too many."""
        now = time.monotonic()
        self._died = [t for t in self._died if now - t < self._RESTARTS_S] + [now]
        if len(self._died) > self._RESTARTS:
            text = f"the coordinator was ended by signal {signum} again and again; the job is over"
            return Exit.RECOVERY_FAILED, text
        why = why or f"the coordinator was ended by signal {signum}"
        print(f"deadpool: {why}; it is started again", file=sys.stderr)
        return None

    def _start_again(self) -> tuple[int, str] | None:
        """None once it listens; else how that has failed: exit code, negative for a signal, and message."""
        try:
            self.process = self._start()
        except OSError as err:
            return Exit.FAILED, f"the coordinator cannot be started again: {err}"
        if self._listens:
            return None
        assert self.process.stdout is not None
        message = self.process.stdout.read().decode().strip() or "the coordinator cannot be started again"
        return self.process.wait() or Exit.FAILED, message

    def begun(self) -> tuple[int, str] | None:
        """None once it listens; else how it has ended. As `wait` it waits for a store that does not answer."""
        end: tuple[int, str] | None = None
        while not self._listens and end is None:
            end = self._over()
        return end

    def wait(self) -> tuple[int, str]:
        """Its exit code and message, once the job is over. Where nobody else can lead, it leads again if deposed."""
        while (end := self._over()) is None:
            pass
        return end

    def _over(self) -> tuple[int, str] | None:
        """When this process has ended: how the job did, or None where another one goes on with it."""
        end = self.revive()
        if end is None or end[0] != Exit.DEPOSED or self._interrupted or self._others_lead:
            return end
        if self._leadership.campaign(1, lambda: bool(self._interrupted)) is None:
            return code_of(self._interrupted), "interrupted while the store did not answer"
        self.process = self._start()
        return None
