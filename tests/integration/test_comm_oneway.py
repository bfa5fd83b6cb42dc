"""A one-way operation in a group formed anew waits as long as operations may take, not as long as forming may."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from jobs import environment

pytestmark = pytest.mark.versions(torch=True)
SCRIPT = """
    import sys, threading
    import torch
    import torch.distributed as dist
    from deadpool_megatron.comm.connections import GlooConnections
    from deadpool_megatron.comm.forming import build_gloo, create_devices
    from deadpool_megatron.comm.table import GroupRecord
    from deadpool_megatron.comm.waits import Poison, Waits
    from datetime import timedelta

    waits = Waits(Poison())
    waits.install()
    store, groups = dist.HashStore(), {}

    def form(rank):
        record = GroupRecord("1", (0, 1), "", "gloo", {"cpu": "gloo"}, timedelta(seconds=60))
        devices, _ = create_devices(GlooConnections())
        groups[rank] = build_gloo(record, store, rank, devices, float(sys.argv[1]), float(sys.argv[2]))

    threads = [threading.Thread(target=form, args=(rank,)) for rank in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    if sys.argv[3] == "limited":
        waits.at_most(float(sys.argv[2]))
    try:
        groups[0].recv([torch.zeros(4)], 1, 0).wait()
    except RuntimeError as err:
        print(err)
"""


@pytest.mark.parametrize(
    ("forming", "operations", "how", "waits"), [("60", "2", "limited", 2000), ("10", "60", "left to torch", 10000)]
)
def test_a_receive_waits_for_the_operations_time_out(forming: str, operations: str, how: str, waits: int) -> None:
    """The second case is torch's own behaviour: should it change, `Waits.at_most` can go."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), forming, operations, how],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert f"Timed out waiting {waits}ms" in done.stdout, done.stdout + done.stderr
