"""Megatron's own checkpoints, which the benches measure against: their flags, and whether they are what they say."""

from __future__ import annotations

from typing import Final, Literal

from deadpool_bench.harness.jobs import Job
from deadpool_megatron.observe import LOGS

CheckpointKind = Literal["sync", "async"]
# Without the persistent worker megatron-core 0.19 saves synchronously, with a warning.
CHECKPOINTS: Final[dict[str, list[str]]] = {
    "sync": [],
    "async": ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"],
}


def check_kind(job: Job) -> None:
    """Raises JobError if the job's checkpoints, asked for as asynchronous, are synchronous."""
    if any("Disabling --async-save" in path.read_text() for path in (job.run_dir / LOGS).glob("rank-*.log")):
        job.failed("this Megatron does not save asynchronously here; leave async out")
