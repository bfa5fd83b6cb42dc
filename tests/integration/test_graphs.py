"""Whole iterations and layers as CUDA graphs (emulated by a tape of operators): captured anew, and still no loss."""

from __future__ import annotations

import pytest

from flags import default_gpt, tiny_gpt, with_value
from jobs import Jobs, assert_same_training, launch_flags, survives, undisturbed

ITERATIONS = 8
GRAPHS = ["--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "1", "--logging-level", "20"]


def _gpt() -> list[str]:
    """PP2 x DP2, with both overlaps and dropout."""
    flags = with_value(tiny_gpt(iters=ITERATIONS), "--tensor-model-parallel-size", 1)
    return [*flags, "--no-check-for-nan-in-loss-and-grad"]


@pytest.mark.timeout(300)
def test_nodes_lost_while_a_graph_is_replayed_and_after_it_was_captured_anew(jobs: Jobs) -> None:
    want = undisturbed(launch_flags(4, slots=1), _gpt())  # graphs compute the same
    job = jobs.start("killed", launch_flags(6, 2, slots=1), [*_gpt(), *GRAPHS], held=True)
    job.arm((0, 3, 1), (1, 6, 1))  # the others wait for it inside of the graph
    job.finished()
    assert [event["epoch"] for event in job.events("resumed")] == [1, 2]
    # Warmed up and captured at the start and after each recovery.
    said = "".join(path.read_text() for path in (job.run_dir / "logs").glob("*.log") if not path.is_symlink())
    assert said.count("CUDA graph capture done for training") >= 3
    assert_same_training(job, want, ITERATIONS, 3)
    before, told = 0, job.events("iteration")  # of rank 2, which lives through both losses
    for event in told:  # a generation is skipped, and counted, where the one before is not committed yet
        assert event["copied_bytes"] or event["skipped_generations"] > before, event
        before = event["skipped_generations"]
    assert any(event["copied_bytes"] for event in told if event["iteration"] > 1), "of a replayed one"


_LAYERS = ["--cuda-graph-impl", "transformer_engine", "--logging-level", "20", "--cuda-graph-warmup-steps"]
_TP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
_DP = ["--overlap-grad-reduce", "--overlap-param-gather"]
_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --disable-bias-linear --moe-grouped-gemm "
    "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --moe-router-dtype fp32"
)
# Of the layers' graphs: warm-up iterations, modules, other flags; iterations in which nodes are lost, if not 3 and 6.
_CASES = {
    "attention and mlp, with their collectives": (1, ["attn", "mlp"], _TP),
}
_SLOW_CASES = {
    "whole layers": (2, [], _DP),
    "data parallelism": (1, ["attn"], _DP),
    "router and preprocessing": (1, ["attn", "moe_router", "moe_preprocess"], [*_TP, *_EXPERTS.split()]),
    "pipeline": (1, ["attn", "mlp"], ["--pipeline-model-parallel-size", "2"]),
    "before and just after the capture, data parallelism": (2, ["attn", "mlp"], _DP, (1, 3)),
    "before and just after the capture, collectives in it": (2, ["attn", "mlp"], _TP, (1, 3)),
    "no warm-up": (0, ["attn"], _DP),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*_CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW_CASES)])
def test_graphs_of_layers_are_captured_anew_after_a_loss(name: str, jobs: Jobs) -> None:
    warmup, modules, more, *at = (_CASES | _SLOW_CASES)[name]
    first, second = at[0] if at else (3, 6)
    graphs = [*_LAYERS, str(warmup), *(["--cuda-graph-modules", *modules] if modules else [])]
    flags = default_gpt(
        *more, *graphs, iters=9
    )  # warm-up and capture once more after the second, at the latest in the last
    job, _ = survives(jobs, name, flags, (1, first, 2), (0, second, 1))
    said = "".join(path.read_text() for path in (job.run_dir / "logs").glob("*.log") if not path.is_symlink())
    assert said.count("Start CUDA Graphs capture") >= (3 if first > warmup else 2)
