"""What spares are told of the job outlives the store it is told through, and is no secret: anybody may read that."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from deadpool_megatron.megatron import standby
from deadpool_megatron.megatron.standby import RunningJob, follow_job, publish_job
from machines import free_port


def _learn(connect: Callable[[], dist.Store]) -> RunningJob:
    learnt: list[RunningJob] = []
    done = threading.Event()

    def learn(job: RunningJob) -> None:
        learnt.append(job)
        done.set()

    follow_job(connect, learn)
    assert done.wait(), "nobody told it"
    return learnt[0]


def main() -> None:
    port = free_port()
    standby._LOOK_S, standby._AGAIN_S = 0.5, 0.1

    def connect() -> dist.Store:
        return dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=60))

    def serve() -> dist.Store:
        return dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, timeout=timedelta(seconds=60))

    server = serve()
    job = RunningJob("groups", 1764450000.123456, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "OUR_DATA", "NCCL_OUR_TOKEN", "LD_PRELOAD"), "s3cr3t")
    publish_job(connect, msgspec.structs.replace(job, environment={**job.environment, **secrets}))
    told = _learn(connect)
    assert b"s3cr3t" not in server.get(standby._KEY)
    assert msgspec.structs.replace(told, modules=[]) == job and "torch" in told.modules
    stranger = RunningJob("groups", 0.0, secrets, ["antigravity", "torch.nn"])
    server.set(standby._KEY, msgspec.json.encode(stranger).decode())
    assert _learn(connect) == RunningJob("groups", 0.0, {}, ["torch.nn"])
    server.set("first server", "")
    del server
    server = serve()
    assert not server.check(["first server"])
    assert _learn(connect) == told
    os._exit(0)  # the thread that tells it goes on for ever


def test_a_spare_that_comes_after_the_store_was_started_again_learns_of_the_job_too() -> None:
    tests = Path(__file__).parents[1]
    env = dict(os.environ, PYTHONPATH=f"{tests.parent}{os.pathsep}{tests}")
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()


def test_a_spare_that_still_imports_tells_the_job_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other thread does: who looks at what is imported may find another number of modules with each."""

    class Growing(dict[str, object]):
        def items(self) -> Any:
            for each in super().items():
                self[f"later{len(self)}"] = None
                yield each

    monkeypatch.setattr(standby, "sys", SimpleNamespace(modules=Growing(there=object(), gone=None)))
    assert standby._imported() == ["there"]
