"""What a broken iteration leaves half-done in modules is taken back, whatever it is called."""

from __future__ import annotations

import enum
from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from deadpool_megatron.megatron.at_rest import AtRest


class Progress(enum.Enum):
    IDLE = 0
    BEGUN = 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.progress: Any = Progress.IDLE
        self.count = 3
        self.cached: Any = None
        self.waiting: list[Any] = []
        self.queue: deque[Any] = deque()
        self.learned: list[Any] = ["before"]
        self.helper = SimpleNamespace(value=1)
        self.tensor = torch.zeros(1)
        self.token_dispatcher = Dispatcher()


class Dispatcher:
    """As of tokens to experts: no module, and with a helper of its own."""

    def __init__(self) -> None:
        self._comm_manager = SimpleNamespace(handle=None, size=None)
        self.shape: Any = None


def begun() -> tuple[Layer, AtRest]:
    layer = Layer()
    at_rest = AtRest([SimpleNamespace(module=nn.Sequential(layer))])
    at_rest.begin()
    return layer, at_rest


def test_numbers_flags_and_what_was_empty_come_back_and_new_attributes_go() -> None:
    layer, at_rest = begun()
    waiting, queue = layer.waiting, layer.queue
    layer.progress, layer.count, layer.cached = Progress.BEGUN, 4, torch.ones(2)
    layer.waiting.append(torch.ones(1))
    layer.queue = deque([1])
    layer.handle = object()  # type: ignore[assignment]
    layer.eval()
    manager = layer.token_dispatcher._comm_manager
    layer.token_dispatcher.shape, manager.handle, manager.size = (1,), object(), torch.ones(1)
    at_rest.restore()
    assert (layer.token_dispatcher.shape, manager.handle, manager.size) == (None, None, None)
    assert (layer.progress, layer.count, layer.cached) == (Progress.IDLE, 3, None)
    assert layer.waiting is waiting and layer.queue is queue and not waiting and not queue
    assert not hasattr(layer, "handle") and layer.training and layer.inner.training


def test_parameters_hooks_tensors_and_objects_stay_as_they_are() -> None:
    layer, at_rest = begun()
    weight, helper, tensor = nn.Parameter(torch.ones(2, 2)), SimpleNamespace(), torch.ones(1)
    layer.inner.weight = weight
    layer.inner.register_forward_hook(lambda *_: None)
    layer.register_buffer("late", torch.ones(1))
    layer.helper, layer.tensor = helper, tensor
    layer.learned.append("now")
    at_rest.restore()
    assert layer.inner.weight is weight and layer.helper is helper and layer.tensor is tensor
    assert len(layer.inner._forward_hooks) == 1 and layer.late.item() == 1 and layer.learned == ["before", "now"]


def test_what_changes_outside_of_an_iteration_stays() -> None:
    layer, at_rest = begun()
    at_rest.end()
    layer.count = 9
    at_rest.restore()
    assert layer.count == 9
    at_rest.begin()
    layer.count = 10
    at_rest.restore()
    layer.count = 11  # by the recovery itself
    at_rest.restore()
    assert layer.count == 11
