"""What CUDA says after a kernel has failed: that is how a worker knows that its device is lost to it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = """
    import time
    import torch
    from deadpool_megatron.recovery.protocol import device_is_lost

    def what(call):
        try:
            return call()
        except RuntimeError as err:
            return err

    weight, beyond = torch.zeros(4, device="cuda"), torch.tensor([9], device="cuda")
    stream = torch.cuda.current_stream()
    what(lambda: weight[beyond])  # a device-side assert, met later
    while not isinstance(said := what(stream.query), Exception):
        time.sleep(0.01)
    assert device_is_lost(said), said
    for later in (torch.cuda.synchronize, lambda: weight.sum().item(), lambda: torch.ones(1, device="cuda").item()):
        assert device_is_lost(what(later)), later
    print("lost")
"""


def test_a_failed_kernel_is_seen_without_waiting_and_in_every_later_call() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 0 and "lost" in done.stdout, done.stderr
