"""The tape that stands for a CUDA graph: a replay computes on the memory of the capture, and runs no Python of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deadpool_megatron.emulation.graphs import Capture, CUDAGraph, DefaultGenerator, is_capturing, noted

pytestmark = pytest.mark.versions(torch=True)


class Layer:
    """A weight whose gradient a hook adds to a main gradient, as Megatron's DDP does."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.weight = torch.nn.Parameter(torch.randn(4, 4))
        self.main_grad = torch.zeros(4, 4)
        self.hooks = 0
        accumulate = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        accumulate.register_hook(self._add)
        self._keep = accumulate

    def _add(self, *unused: object) -> None:
        assert self.weight.grad is not None
        self.main_grad.add_(self.weight.grad.data)
        self.weight.grad = None
        self.hooks += 1

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """Forward and backward."""
        out = torch.nn.functional.linear(x, self.weight)
        loss = torch.nn.functional.dropout(out, 0.5).pow(2).sum()
        out.data = torch.empty(1)  # as Megatron lets go of outputs that it has sent
        loss.backward()
        return loss


@pytest.fixture
def layer() -> Iterator[Layer]:
    state = torch.get_rng_state()
    yield Layer()
    torch.set_rng_state(state)


def test_a_replay_computes_what_the_function_would_on_new_data_in_the_same_memory(layer: Layer) -> None:
    x = torch.randn(2, 4)
    wanted = []
    torch.manual_seed(7)
    for data in (x.clone(), x + 1, x - 2):
        layer.main_grad.zero_()
        wanted.append((layer.step(data).item(), layer.main_grad.clone()))
    torch.manual_seed(7)
    graph = CUDAGraph()
    layer.main_grad.zero_()
    assert not is_capturing()
    with Capture(graph):
        assert is_capturing()
        loss = layer.step(x)
    hooks = layer.hooks
    got = []
    for data in (x.clone(), x + 1, x - 2):
        x.copy_(data)
        if got:
            layer.main_grad.zero_()
        graph.replay()
        got.append((loss.item(), layer.main_grad.clone()))
    for (a, grad_a), (b, grad_b) in zip(got, wanted, strict=True):
        assert a == b and torch.equal(grad_a, grad_b)
    assert layer.hooks == hooks, "a replay runs no hook"


def test_a_graph_draws_from_the_generators_it_was_captured_with(layer: Layer) -> None:
    device = DefaultGenerator()
    tracked = device.clone_state()
    tracked.manual_seed(11)
    graph = CUDAGraph()
    drawn = torch.zeros(3)

    def draw() -> None:
        before = device.graphsafe_get_state()
        device.graphsafe_set_state(tracked)
        drawn.copy_(torch.rand(3))
        device.graphsafe_get_state()
        device.graphsafe_set_state(before)

    wanted = torch.Generator().manual_seed(11)
    outside = torch.get_rng_state()
    with Capture(graph):
        draw()
    for _ in range(3):
        graph.replay()
        assert torch.equal(drawn, torch.rand(3, generator=wanted))
    assert torch.equal(torch.get_rng_state(), outside), "the default state is back in place"
    tracked.manual_seed(11)  # as a recovery puts back the numbers of a generation
    graph.replay()
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(11)))


def test_an_empty_graph_cannot_be_replayed() -> None:
    graph = CUDAGraph()
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        graph.replay()
    with pytest.raises(ZeroDivisionError), Capture(graph):
        raise ZeroDivisionError
    assert not is_capturing()
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        graph.replay()


def test_what_no_operator_does_happens_at_its_place_in_each_replay() -> None:
    memory, seen = torch.zeros(()), []
    graph = CUDAGraph()
    with Capture(graph):
        memory.add_(1)
        noted(lambda: seen.append(int(memory)))
        memory.add_(1)
    graph.replay()  # the capture has computed it
    graph.replay()
    assert seen == [1, 3]


def test_a_replay_goes_to_its_end_behind_what_is_aborted_in_it() -> None:
    memory, aborted = torch.zeros(()), False

    def collective() -> None:
        if aborted:
            raise ConnectionError("the neighbour is gone")

    graph = CUDAGraph()
    with Capture(graph):
        noted(collective)
        memory.add_(1)
    graph.replay()
    aborted = True
    with pytest.raises(ConnectionError):
        graph.replay()
    assert memory == 2
    aborted = False
    graph.replay()
    assert memory == 3


def test_operators_of_what_is_noted_are_on_the_tape_once() -> None:
    memory = torch.zeros(())
    graph = CUDAGraph()
    with Capture(graph):
        noted(lambda: memory.add_(1))
    graph.replay()
    graph.replay()
    assert memory == 2
