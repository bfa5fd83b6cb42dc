"""A one-way operation in a group formed anew waits as long as operations may take, not as long as forming may."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from jobs import environment

SCRIPT = """
    import sys, threading, time
    import torch
    import torch.distributed as dist
    from deadpool_megatron.comm import gloo
    from deadpool_megatron.comm.connections import GlooConnections
    from deadpool_megatron.comm.table import GroupRecord
    from deadpool_megatron.comm.waits import Poison, Waits
    from datetime import timedelta

    waits = Waits(Poison())
    waits.install()
    store, groups = dist.HashStore(), {}

    def form(rank):
        record = GroupRecord("1", (0, 1), "", "gloo", {"cpu": "gloo"}, timedelta(seconds=60))
        devices, _ = gloo.create_devices(GlooConnections())
        groups[rank] = gloo.build(record, store, rank, devices, 1.5, 6.0)

    threads = [threading.Thread(target=form, args=(rank,)) for rank in (0, 1)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    if sys.argv[1] == "limited":
        waits.at_most(6.0)
    begun = time.monotonic()
    try:
        groups[0].recv([torch.zeros(4)], 1, 0).wait()
    except RuntimeError as err:
        print(time.monotonic() - begun, err)
"""


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("how", "low", "high"), [("limited", 5.5, 30.0), ("left to torch", 1.0, 5.0)])
def test_a_receive_waits_for_the_operations_time_out(how: str, low: float, high: float) -> None:
    """The second case is torch's own behaviour: should it change, `Waits.at_most` can go."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), how],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=80,
        check=False,
    )
    assert done.stdout, done.stderr
    assert low < float(done.stdout.split()[0]) < high, done.stdout
