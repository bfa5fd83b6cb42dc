"""Whole iterations as CUDA graphs (emulated by a tape of operators): no Python between microbatches, still no loss."""

from __future__ import annotations

import pytest

from flags import tiny_gpt, with_value
from jobs import Jobs, assert_same_training, launch_flags, undisturbed

ITERATIONS = 12
GRAPHS = ["--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "1", "--logging-level", "20"]


def _gpt() -> list[str]:
    """PP2 x DP2, with both overlaps and dropout."""
    flags = with_value(tiny_gpt(iters=ITERATIONS), "--tensor-model-parallel-size", 1)
    return [*flags, "--no-check-for-nan-in-loss-and-grad"]


@pytest.mark.timeout(300)
def test_nodes_lost_while_a_graph_is_replayed_and_after_it_was_captured_anew(jobs: Jobs) -> None:
    want = undisturbed(launch_flags(4, slots=1), _gpt())  # graphs compute the same
    job = jobs.start("killed", launch_flags(6, 2, slots=1), [*_gpt(), *GRAPHS], held=True)
    job.arm((0, 5, 1), (1, 9, 1))  # the others wait for it inside of the graph
    job.finished()
    assert [event["epoch"] for event in job.events("resumed")] == [1, 2]
    # Warmed up and captured at the start and after each recovery.
    said = "".join(path.read_text() for path in (job.run_dir / "logs").glob("*.log") if not path.is_symlink())
    assert said.count("CUDA graph capture done for training") >= 3
    assert_same_training(job, want, ITERATIONS, 3)
    copied = [event for event in job.events("iteration") if event["copied_bytes"]]
    assert len({event["iteration"] for event in copied}) == ITERATIONS, "a generation of every iteration"
