"""What of the copies on a device can be seen without one: the device that its background thread works on."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch

from deadpool_megatron.snapshot import CudaCopyEngine


def test_the_publisher_works_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = object.__new__(CudaCopyEngine)  # a whole one needs a stream
    engine._device, engine._queue = torch.device("cuda", 3), queue.SimpleQueue()
    seen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    engine._queue.put(None)
    publisher = threading.Thread(target=engine._publish, name="publisher")
    publisher.start()
    publisher.join()
    assert seen == [("publisher", engine._device)]
