"""``python -m deadpool_megatron.worker SCRIPT [ARGS]``: one worker process, started by its agent.

Active workers run the script at once. A spare's worker, or one that stands by, imports everything the script needs,
brings up the device, parks, and runs the same script as the coordinate it is given, under torch's ``fake`` backend
until it joins the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import logging
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import msgspec

from deadpool_megatron import points
from deadpool_megatron.cluster import notices
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.pulse import PULSE_FD, PulsePage
from deadpool_megatron.cluster.agent.workers import (
    ADOPTED,
    CONTROL_FD,
    DOORBELL_FD,
    EMULATE,
    EPOCH,
    PARENT_PID,
    REHEARSES,
    STACKS_FILE,
    STACKS_SIGNAL,
    STANDBY,
)
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.output import never_fails
from deadpool_megatron.warm import serve, take_orders

if TYPE_CHECKING:
    from deadpool_megatron.megatron import Hooks

MODE = "DEADPOOL_MODE"  # "plain" or "deadpool"
CONFIG = "DEADPOOL_SETTINGS"  # the resolved settings, as JSON
_PR_SET_PDEATHSIG = 1


def _die_with_agent() -> None:
    """Ask the kernel to end this process when its agent ends: an agent's death fences its node.

    The kernel does that for children; an adopted worker leaves when its control socket ends. The same for what it forks
    (data loaders, checkpoint writers): they hold its sockets, and they write.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    by_main_thread = [True]

    def before_fork() -> None:
        by_main_thread[0] = threading.current_thread() is threading.main_thread()

    def in_child() -> None:
        if by_main_thread[0]:  # the signal comes with the end of the *thread* that forked
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(before=before_fork, after_in_child=in_child)
    if ADOPTED not in os.environ:
        _end_with_agent()


def _end_with_agent() -> None:
    """This process alone: what it forks does not."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT_PID]):
        sys.exit(81)


def _show_stacks_when_asked() -> None:
    """The agent asks a stuck worker for the stacks of all its threads; this works in any state but a dead one."""
    file: TextIO = sys.stderr  # where a disk that is full or read-only has no room for one of its own
    with contextlib.suppress(OSError):
        file = open(os.environ[STACKS_FILE], "a")  # noqa: SIM115 - the signal handler writes to it as long as we live
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


def _run_script(script: str, module: str, arguments: list[str]) -> None:
    """Run ``script`` as ``python script`` would, or ``module`` as ``python -m module``."""
    sys.argv = [script, *arguments]
    if module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")


def _rendezvous_under(epoch: int) -> None:
    """In which the job begins; not 0 where it begins anew: workers of before may have left addresses in the store.

    Torch has a new store for each start, and so no prefix of its own (`rendezvous._create_c10d_store`).
    """
    if not epoch:
        return
    from torch.distributed import PrefixStore, Store

    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # the package has a function of that name
    create: Callable[..., Store] = rendezvous._create_c10d_store

    def created(*args: Any, **kwargs: Any) -> Store:
        return PrefixStore(f"deadpool/epoch-{epoch}", create(*args, **kwargs))

    rendezvous._create_c10d_store = created


def _install(standby: bool, script: str, rehearses: bool) -> Hooks:
    """Import torch and Megatron, wrap process groups, connect to the agent, install the hooks."""
    from deadpool_megatron import config as settings
    from deadpool_megatron.comm import Communicators, ReformError, StoreClients
    from deadpool_megatron.hosts import host_of
    from deadpool_megatron.megatron import Hooks, SelfChecks, arm
    from deadpool_megatron.recovery import Session

    config = msgspec.json.decode(os.environ[CONFIG], type=settings.DeadpoolConfig)
    if config.on_preempt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent says when it is time to go
    _log_to_stderr()
    communicators = Communicators.install(
        standby=standby,
        keep=config.keep_groups,
        form_timeout_s=config.form_deadline,
        operation_timeout_s=config.operation_timeout,
    )

    def end_epochs_before(epoch: int) -> None:
        communicators.abort(epoch - 1)

    def begin_to_form(epoch: int) -> None:
        with contextlib.suppress(ReformError):  # the training thread will see for itself
            communicators.begin_reform(epoch, store)

    begins = int(os.environ.get(EPOCH, "0"))
    _rendezvous_under(begins)
    session = Session(int(os.environ[CONTROL_FD]), end_epochs_before, begin_to_form, begins)

    def place() -> tuple[str, int]:
        return session.rendezvous or (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))

    store = StoreClients(place, config.form_deadline)
    if standby:
        session.on_check = SelfChecks(session).begin
        communicators.prepare(store())  # connections now and then take seconds: not in a recovery
    page = PulsePage(int(os.environ[PULSE_FD]))
    doorbell = int(os.environ[DOORBELL_FD])
    hooks = Hooks(host_of(script), session, communicators, config, doorbell, store, standby, page, rehearses)
    hooks.install()
    session.call_on_arm(arm)
    session.is_waiting = hooks.is_waiting
    session.on_exit_notice = hooks.take_exit_notice
    session.on_replaced = hooks.look_for_neighbours
    return hooks


def _park(hooks: Hooks, script: str, rehearses: str | None) -> None:
    """Make warm what may be warm, and become the coordinate that this worker is given: of a job that trains, or of one
    that begins anew.

    Who rehearses one goes on as soon as the job trains: the script comes to where it waits for its state to be there.
    """
    from deadpool_megatron.megatron import RunningJob, WarmUp, follow_job, numa_node

    # The device is another process's until this one takes its place.
    warm_up, session = WarmUp(script, hooks.host, os.environ.get(STANDBY) != "imports"), hooks.session

    def learn(job: RunningJob) -> None:
        hooks.learn_job(job)
        if warm_up.learn(job.environment) and rehearses is None:
            session.step("parked", 0, numa=numa_node())  # once more: the device is known now

    known = follow_job(hooks.store.connect, learn)  # of its own: a blocked wait blocks every user of a client
    warm_up.begin()
    if rehearses is None:
        session.step("parked", 0, numa=numa_node())
        taken = session.wait_take_over()
        os.environ["RANK"] = str(taken.rank)
        if taken.world_size:  # fewer than when this process was started, perhaps
            os.environ["WORLD_SIZE"] = str(taken.world_size)
        if taken.environment:
            os.environ.update(taken.environment)
            _rendezvous_under(taken.epoch)
            session.begin(taken.epoch)
            hooks.communicators.begin()
            hooks.standby = False
    else:
        known.join()
        os.environ["RANK"] = rehearses
    warm_up.end()


def _log_to_stderr() -> None:
    """What our packages have to tell goes into the rank's log, whatever Megatron does to the root logger."""
    log, handler = logging.getLogger("deadpool_megatron"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[deadpool] %(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _failed(hooks: Hooks | None, error: BaseException, tell: Callable[[r.WorkerFailed], None]) -> int:
    """Tell the agent; returns the code with which the job ends because of it, 0 where that is not known yet."""
    from deadpool_megatron.comm import is_communication_error
    from deadpool_megatron.config import ConfigError
    from deadpool_megatron.megatron import Unequal, UserError

    lines = str(error).strip().splitlines() or [""]
    code = Exit.USAGE if isinstance(error, (UserError, ConfigError)) else 0
    code = Exit.UNEQUAL if isinstance(error, Unequal) else code
    message = lines[0] if code else f"{type(error).__name__}: {lines[-1] if len(lines) > 1 else lines[0]}"
    trace = "".join(traceback.format_exception(error))
    phase: Any = hooks.phase if hooks is not None else "setup"
    begins = int(os.environ.get(EPOCH, "0"))
    epoch, iteration = (hooks.session.joined_epoch, hooks.iteration) if hooks is not None else (begins, -1)
    kind, place = f"{type(error).__module__}.{type(error).__qualname__}", _place(error)
    told = r.WorkerFailed(
        0,
        0,
        None,
        phase,
        epoch,
        iteration,
        code,
        kind,
        place,
        message[:2000],
        trace[-12000:],
        is_communication_error(error),
    )
    tell(told)
    return code


@contextlib.contextmanager
def _recorded() -> Iterator[None]:
    """An exception is written to the file where torchrun's workers write theirs."""
    try:
        yield
    except Exception as error:
        from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

        with contextlib.suppress(OSError):
            ErrorHandler().record_exception(error)
        raise


def _place(error: BaseException) -> str:
    """The line of code that raised it, the same wherever the code is installed."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    return f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}"


def _begin() -> None:
    _die_with_agent()
    never_fails()
    _show_stacks_when_asked()
    notices.ignored()


def main() -> int:
    orders = take_orders()
    _begin() if orders is None else _end_with_agent()
    module = sys.argv.pop(2) if sys.argv[1] == "-m" else ""
    script, arguments = sys.argv[1], sys.argv[2:]
    # As `python script` has it, and from now on: a checkout's megatron comes before an installed one.
    if sys.flags.safe_path:
        sys.path.insert(0, "")
    sys.path[0] = os.getcwd() if module else str(Path(script).resolve().parent)
    if module:
        from deadpool_megatron.launcher.plan import module_file

        script = module_file(module)
    if os.environ.get(EMULATE):
        from deadpool_megatron import emulation

        emulation.install()
    if orders is not None:
        serve(orders, script)
        _begin()
    standby = "RANK" not in os.environ
    if os.environ.get(MODE) != "deadpool":
        with _recorded():
            _run_script(script, module, arguments)
        return 0
    hooks: Hooks | None = None

    def tell(record: r.WorkerFailed) -> None:
        if hooks is not None:
            hooks.session.tell(record)
        else:
            socket.socket(fileno=os.dup(int(os.environ[CONTROL_FD]))).send(r.encode(record))

    try:
        with _recorded():
            rehearses = os.environ.get(REHEARSES)
            hooks = _install(standby, script, rehearses is not None)
            if standby:
                _park(hooks, script, rehearses)
            _run_script(script, module, hooks.host.arguments_for_script(arguments))
    except SystemExit as exit_:
        if exit_.code not in (None, 0) and hooks is not None and hooks.phase == "setup":
            _failed(hooks, exit_, tell)
        raise
    except BaseException as error:  # noqa: BLE001 - the process boundary: tell the agent why, then end
        code = _failed(hooks, error, tell)
        traceback.print_exception(error)
        sys.stderr.flush()
        return code or Exit.FAILED
    return 0


def _leave(code: int) -> NoReturn:
    """End the process as the interpreter would, but without destructing the process groups.

    The end of a Gloo backend waits for its threads, which for some dozens of groups on busy cores takes seconds.
    """
    if ADOPTED in os.environ:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(os.environ[CONTROL_FD]))) as control:
            leaving = r.Leaving(code)
            points.reach_record("worker", leaving)
            control.send(r.encode(leaving))
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if os.environ.get(MODE) != "deadpool":
        sys.exit(main())
    try:
        _leave(main())
    except SystemExit as leaving:
        if leaving.code is not None and not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr)
        _leave(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
