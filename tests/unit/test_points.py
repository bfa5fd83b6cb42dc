"""Every crash point is passed somewhere, and nothing is told or begun without one."""

from __future__ import annotations

import ast
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import deadpool_megatron
from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import RECOVERING
from deadpool_megatron.megatron import faults

PACKAGE = Path(deadpool_megatron.__file__).parent
_LITERAL = re.compile(r'reach\("([a-z.-]+)"')


@pytest.fixture(autouse=True)
def _nothing_armed() -> Iterator[None]:
    yield
    points.disarm()
    points.iteration_is(-1)


def passed_by_name() -> set[str]:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "points.py"]
    return {name for source in sources for name in _LITERAL.findall(source)} | set(faults._INSIDE) | {faults.STEP}


def by_construction() -> set[str]:
    families = {"worker": r.WorkerRecord, "agent": r.AgentRecord, "coordinator": r.CoordinatorRecord}
    names = {
        f"{who}.{points.kebab(each.__name__)}" for who, union in families.items() for each in typing.get_args(union)
    }
    return names | {f"step.{step}" for step in typing.get_args(r.Step)}


def test_every_point_in_the_sources_is_in_the_registry() -> None:
    assert passed_by_name() <= set(points.POINTS)


def test_every_point_of_the_registry_is_passed_in_the_sources_or_with_every_message() -> None:
    assert set(points.POINTS) - passed_by_name() - by_construction() == set()


def test_no_message_can_be_sent_without_a_point() -> None:
    tools = {"agent.inject", "agent.drain", "agent.enlist", "agent.add-spare"}
    assert by_construction() - set(points.POINTS) == tools | {"worker.worker-step", "coordinator.changed"}
    # Whoever encodes a record passes the point of its name in the same function. Tools are in no assignment; what an
    # agent tells its workers is lost with the one or the other, each of which has points of its own.
    free = {"commands/control.py:_ask", "launcher/enlisting.py:enlist", "cluster/agent/workers.py:send"}
    free |= {"worker.py:tell", "worker.py:main"}  # before there is a session nothing can be armed
    free |= {
        "cluster/records/tables.py:packets",
        "cluster/records/tables.py:_declare",
    }  # for the coordinator, which passes the point
    assert _encoders(passing=False) == free
    assert {
        "cluster/agent/agent.py:send",
        "cluster/coordinator/coordinator.py:_reply",
        "recovery/session.py:tell",
    } <= _encoders(True)


def _encoders(passing: bool) -> set[str]:
    """The functions that encode a record, and pass its point or do not."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                if "r.encode" in calls and ("points.reach_record" in calls) == passing:
                    found.add(f"{path.relative_to(PACKAGE)}:{node.name}")
    return found


# By phase of a recovery: the points of what ends it, on a worker and on an agent.
_ENDS_OF_PHASES = {
    "ARRIVING": ["worker.arrived", "agent.offer"],
    "PREPARING": ["step.ready", "agent.node-ready"],
    "FORMING": ["step.formed", "agent.node-formed"],
    "WAITING": ["agent.join", "agent.worker-ready"],
    "RESTORING": ["step.restored", "agent.node-restored", "step.resumed", "agent.node-resumed"],
}


def test_every_phase_of_a_recovery_ends_in_points_of_the_worker_and_of_the_agent() -> None:
    assert set(_ENDS_OF_PHASES) == {phase.name for phase in RECOVERING}
    assert {name for names in _ENDS_OF_PHASES.values() for name in names} <= set(points.POINTS)


def test_everything_a_worker_does_in_a_recovery_is_followed_by_a_point() -> None:
    source = (PACKAGE / "recovery" / "protocol.py").read_text()
    (rejoin,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "rejoin"]
    (loop,) = [n for n in rejoin.body if isinstance(n, ast.While)]
    (attempt,) = [n for n in loop.body if isinstance(n, ast.Try)]
    # (letting graphs go is the first half of the abort, and nobody else sees it)
    acts = ("trainer.", "communicators.", "session.wait_generation")
    done = False
    for statement in attempt.body:
        text = ast.unparse(statement)
        if "points.reach(" in text:
            done = False
        elif any(act + name in text for act in acts for name in _calls(statement, act) if name != "let_go"):
            assert not done, f"no crash point before {text}"
            done = True
    assert not done


def _calls(statement: ast.stmt, prefix: str) -> list[str]:
    names = [ast.unparse(n.func) for n in ast.walk(statement) if isinstance(n, ast.Call)]
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


# By function of Megatron's that the hooks replace, a point in it; none where nothing of a job's state changes.
_HOOKED = {
    "initialize_megatron": "take-over.building",
    "_initialize_tp_communicators": "",
    "pretrain": "",
    "train": "take-over.built",
    "train_step": "small-state.before",
    "training_log": "log.before",
    "evaluate": "evaluation.during",
    "evaluate_and_print_results": "evaluation.before",
    "save_checkpoint_and_time": "save.before",
    "maybe_finalize_async_save": "save.finalized",
    "backward_step": "slice.before",
    "add_megatron_arguments": "",
    "print_datetime": "",
    "load_yaml": "",
    "load_checkpoint": "",
    "cyclic_iter": "",
    "build_train_valid_test_data_iterators": "",
    "build_train_valid_test_datasets": "",
    "build_train_valid_test_data_loaders": "",
    "_build_num_microbatches_calculator": "",
    "forward_step_calc_loss": "",
    "validate_args": "",
    "validate_yaml": "",
    "checkpoint_and_decide_exit": "",
}


# The same of Megatron-Bridge's, where its name is not one of those.
_HOOKED_IN_BRIDGE = {
    "_pretrain": "",
    "setup_data_iterators": "",
    "barrier_and_log": "",
    "_finish_train": "",
    "_cleanup_after_pretrain_failure": "",
    "_maybe_destroy_process_group": "",
    "pretrain_megatron_mimo": "",
    "maybe_wrap_for_inprocess_restart": "",
}


def test_every_hook_in_megatron_has_a_point() -> None:
    source = "".join((PACKAGE / "megatron" / name).read_text() for name in ("hooks.py", "lm/host.py", "lm/dealing.py"))
    assert set(re.findall(r'\.replace\(\w+, "(\w+)"', source)) == set(_HOOKED)
    bridge = (PACKAGE / "megatron" / "bridge" / "host.py").read_text()
    assert set(re.findall(r'\.replace\(\w+, "(\w+)"', bridge)) - set(_HOOKED) == set(_HOOKED_IN_BRIDGE)
    assert {name for name in _HOOKED.values() if name} <= passed_by_name()


def test_points_inside_of_other_peoples_code_have_a_place_that_is_wrapped_when_armed() -> None:
    for module, holder, name, _ in faults._INSIDE.values():
        owner = importlib.import_module(module)
        assert callable(getattr(getattr(owner, holder) if holder else owner, name))


def test_a_fault_strikes_once_at_its_point_and_not_before_its_iteration() -> None:
    struck: list[int] = []
    points.arm("slice.before", 5, lambda: struck.append(1))
    for iteration in (3, 4, 5, 5, 6):
        points.iteration_is(iteration)
        points.reach("slice.after")
        points.reach("slice.before")
        assert len(struck) == (iteration >= 5)


def test_a_message_passes_the_point_of_its_name() -> None:
    struck: list[int] = []
    points.arm("agent.node-ready", -1, lambda: struck.append(1))
    points.reach_record("agent", r.NodeFormed(1, 0, 3))
    assert not struck
    points.reach_record("agent", r.NodeReady(1, 0))
    assert struck
