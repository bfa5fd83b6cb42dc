"""What spares are told of the job outlives the store it is told through."""

import threading
from datetime import timedelta

import torch.distributed as dist

from deadpool_megatron.megatron.standby import follow_job, publish_job
from machines import free_port


def _learn(connect: object) -> str:
    learnt: list[str] = []
    done = threading.Event()

    def learn(digest: str) -> None:
        learnt.append(digest)
        done.set()

    follow_job(connect, learn)  # type: ignore[arg-type]
    assert done.wait(40), "nobody told it"
    return learnt[0]


def test_a_spare_that_comes_after_the_store_was_started_again_learns_of_the_job_too() -> None:
    port = free_port()

    def connect() -> dist.Store:
        return dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=5))

    def serve() -> dist.Store:
        return dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, timeout=timedelta(seconds=5))

    server = serve()
    publish_job(connect, "groups")
    assert _learn(connect) == "groups"
    del server
    server = serve()
    assert not server.check(["deadpool/job"])
    assert _learn(connect) == "groups"
