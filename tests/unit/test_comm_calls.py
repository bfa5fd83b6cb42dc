"""No thread is inside of an operation of a process group when it is aborted, and none goes in after that."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from deadpool_megatron.comm.calls import Calls
from deadpool_megatron.comm.methods import Messages
from deadpool_megatron.comm.reports import CommunicatorAborted
from deadpool_megatron.comm.waits import Poison
from waiting import until


class Group:
    """Blocks in what it is told to; notes what reaches it."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: Exception | None = None

    def _enter(self, name: str) -> str:
        self.reached.append(name)
        self.go_on.wait()
        if self.error is not None:
            raise self.error
        return name

    def allreduce(self, tensors: list[Any]) -> str:
        return self._enter("allreduce")

    def send(self, tensors: list[Any], to: int, tag: int) -> str:
        return self._enter("send")

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 1

    def all_to_all_single(
        self, output: Any, input: Any, output_split_sizes: Any, input_split_sizes: Any, opts: Any = None
    ) -> str:
        return self._enter(f"all to all {output_split_sizes} {input_split_sizes} {opts}")

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: Any, inputs: Any) -> str:
        return self._enter("alltoall")

    def recv(self, tensors: list[Any], of: int, tag: int) -> str:
        return self._enter("recv")

    def _start_coalescing(self, device: Any) -> None:
        self.reached.append("start")

    def _end_coalescing(self, device: Any) -> str:
        self.reached.append(f"end on {device}")
        return "work"


@pytest.fixture
def guarded() -> tuple[Calls, Poison, Any]:
    poison = Poison()
    calls = Calls(poison)
    kind: Any = type("Kind", (Group,), dict(vars(Group)))
    calls.guard(kind)
    calls.guard(kind)  # the next group that is made
    return calls, poison, kind()


def in_background(call: Any) -> list[BaseException | None]:
    ended: list[BaseException | None] = []

    def work() -> None:
        try:
            call()
            ended.append(None)
        except RuntimeError as err:
            ended.append(err)

    threading.Thread(target=work, daemon=True).start()
    return ended


def test_after_an_abort_nothing_is_begun(guarded: tuple[Calls, Poison, Any]) -> None:
    calls, poison, group = guarded
    assert group.allreduce([]) == "allreduce" and group.send([], 1, tag=0) == "send"
    poison.set = True
    for operation in (
        lambda: group.allreduce([]),
        lambda: group.send([], 1, 0),
        lambda: group._start_coalescing("gpu"),
    ):
        with pytest.raises(CommunicatorAborted):
            operation()
    assert group.reached == ["allreduce", "send"] and calls.wait_outside(0.0) == 0
    poison.set = False
    assert group.allreduce([]) == "allreduce"


@pytest.mark.parametrize("error", [None, RuntimeError("NCCL communicator was aborted on rank 0")])
def test_what_the_abort_has_freed_is_no_result_and_no_error_of_its_own(
    guarded: tuple[Calls, Poison, Any], error: Exception | None
) -> None:
    calls, poison, group = guarded
    group.go_on.clear()
    ended = in_background(lambda: group.allreduce([]))
    until(lambda: group.reached, "the call")
    assert calls.anybody
    poison.set = True
    assert calls.wait_outside(0.01) == 1
    group.error = error
    group.go_on.set()
    assert calls.wait_outside(600.0) == 0
    until(lambda: ended, "its end")
    assert isinstance(ended[0], CommunicatorAborted) and not calls.anybody


def test_a_coalescing_block_is_left_at_its_end_and_the_abort_waits_for_that(guarded: tuple[Calls, Poison, Any]) -> None:
    calls, poison, group = guarded

    def batch() -> None:
        group._start_coalescing("gpu")
        group.send([], 1, 0)
        group.send([], 2, 0)
        group._end_coalescing("gpu")

    group.go_on.clear()
    ended = in_background(batch)
    until(lambda: "send" in group.reached, "the block")
    poison.set = True
    assert calls.wait_outside(0.01) == 1
    group.go_on.set()
    assert calls.wait_outside(600.0) == 0
    until(lambda: ended, "its end")
    assert isinstance(ended[0], CommunicatorAborted) and group.reached == ["start", "send", "send", "end on gpu"]


def test_a_block_in_which_an_operation_fails_does_not_stay_open(guarded: tuple[Calls, Poison, Any]) -> None:
    calls, _, group = guarded
    group._start_coalescing("gpu")
    group.error = RuntimeError("NCCL error")
    with pytest.raises(RuntimeError, match="NCCL error"):
        group.send([], 1, 0)
    assert group.reached == ["start", "send", "end on gpu"] and calls.wait_outside(0.0) == 0


@pytest.mark.parametrize("name", ["all_to_all_single", "alltoall_base"])
def test_an_all_to_all_of_equal_parts_names_their_sizes(guarded: tuple[Calls, Poison, Any], name: str) -> None:
    """Without them torch takes what a nonblocking communicator of NCCL 2.28 or newer says for an error."""
    _, _, group = guarded
    all_to_all = getattr(group, name)
    output, rows = torch.empty(16, 1), torch.empty(8, 2)
    all_to_all(output, rows, [], [], "options")
    all_to_all(output, rows, output_split_sizes=[], input_split_sizes=[])
    all_to_all(output, rows, [13, 1, 1, 1], [], "options")
    all_to_all(output, rows, [], [5, 1, 1, 1])
    all_to_all(output, torch.empty(7, 2), [], [])  # torch says what is wrong with it
    assert group.reached == [
        "all to all [4, 4, 4, 4] [2, 2, 2, 2] options",
        "all to all [4, 4, 4, 4] [2, 2, 2, 2] None",
        "all to all [13, 1, 1, 1] [] options",
        "all to all [] [5, 1, 1, 1] None",
        "all to all [] [] None",
    ]


def test_it_is_known_who_has_exchanged_messages_with_whom_and_how(guarded: tuple[Calls, Poison, Any]) -> None:
    calls, _, group = guarded
    group._start_coalescing("gpu")
    group.send([], 2, 0)
    group.recv([], 0, 0)
    group.send([], 1, 0)  # to itself: no connection
    group._end_coalescing("gpu")
    group.recv([], 3, 0)
    group.send([], 3, 0)
    assert calls.messages(group) == Messages(batched=((0, 1), (1, 2)), alone=((1, 3),))
    other = type(group)()
    assert calls.messages(other) == Messages()
    other.alltoall([], [])
    assert calls.messages(other) == Messages(everybody=True)


@pytest.mark.parametrize("name", ["all_to_all_single", "alltoall_base"])
def test_an_all_to_all_is_one_of_everybody(guarded: tuple[Calls, Poison, Any], name: str) -> None:
    calls, _, group = guarded
    getattr(group, name)(torch.empty(4), torch.empty(4), [], [])
    assert calls.messages(group) == Messages(everybody=True)
