"""Megatron-Bridge's own loop, unpatched: a node is lost, and the run ends bit for bit as if nothing had been.

In an environment of its own: scripts/test_bridge.sh; with ``main`` on the main branches of Bridge and Megatron-LM.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.observe import LOGS
from jobs import (
    BRIDGE,
    ROOT,
    Job,
    Jobs,
    assert_same_checkpoint,
    assert_same_training,
    launch_flags,
    set_pace,
    undisturbed,
)
from shrinking import Shrinking
from upstream import bridge

pytestmark = [
    pytest.mark.bridge,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("megatron.bridge") is None, reason="Megatron-Bridge is not in this environment"),
]

ITERATIONS = 8  # of `pretrain_bridge.tiny`
# Settings of layouts on nodes of one process, and of two.
ALONE = {
    "replicas": ["ddp.overlap_grad_reduce=True", "ddp.overlap_param_gather=True"],
    "pipeline": ["model.pipeline_model_parallel_size=2"],
    "interleaved pipeline": [
        *("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"),
        *("ddp.overlap_grad_reduce=True", "ddp.overlap_param_gather=True"),
    ],
    "experts": [
        *("model.num_moe_experts=4", "model.expert_model_parallel_size=2", "model.moe_router_topk=2"),
        *("model.moe_token_dispatcher_type=alltoall", "model.moe_ffn_hidden_size=64", "model.moe_grouped_gemm=True"),
    ],
    "averages over three iterations": ["logger.log_interval=3"],
}
IN_PAIRS = {
    "tensors and sequences": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=True"],
    "userbuffers": [
        *("model.tensor_model_parallel_size=2", "model.sequence_parallel=True", "model.tp_comm_overlap=True"),
        "model.tp_comm_bootstrap_backend=gloo",
    ],
    "tensors and pipeline": ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"],
}


# Published recipes, with what does not fit on so few processes.
RECIPES = {
    "llama3_8b_pretrain_config": [],
    "llama3_8b_low_precision_pretrain_config": [],
    "qwen3_30b_a3b_pretrain_config": ["model.expert_model_parallel_size=2"],
    "gpt_oss_20b_pretrain_config": ["model.pipeline_model_parallel_size=2", "model.expert_model_parallel_size=1"],
    "deepseek_v3_pretrain_config_32nodes": [
        *("model.pipeline_model_parallel_size=1", "model.expert_model_parallel_size=2"),
        *("model.tensor_model_parallel_size=1", "model.sequence_parallel=False"),
    ],
    "nemotronh_4b_pretrain_config": [],
}


def _start(jobs: Jobs, name: str, overrides: list[str], nodes: int, spares: int, slots: int = 1) -> Job:
    """Held at its first iteration."""
    return jobs.start(name, launch_flags(nodes + spares, spares, slots), overrides, BRIDGE, held=True)


def _survives(jobs: Jobs, name: str, overrides: list[str], *lost: tuple[int, int, int], slots: int = 1) -> Job:
    """A run on two nodes that loses (node, iteration, tick), one after the other, ends as the undisturbed one."""
    want = undisturbed(launch_flags(2, 0, slots), overrides, BRIDGE)
    job = _start(jobs, name, overrides, 2, len(lost), slots)
    job.arm(*lost)
    job.finished()
    assert [event["lost"] for event in job.events("declared")] == [[node] for node, _, _ in lost]
    mute = frozenset(iteration - 1 for _, iteration, _ in lost)
    assert_same_training(job, want, ITERATIONS, rank=2 * slots - 1, mute=mute)
    return job


@pytest.mark.parametrize("name", ALONE)
def test_a_run_survives_the_loss_of_both_its_nodes(name: str, jobs: Jobs) -> None:
    _survives(jobs, name.replace(" ", "-"), ALONE[name], (0, 4, 3), (1, 6, 5))


@pytest.mark.parametrize("name", IN_PAIRS)
def test_a_run_of_two_workers_a_node_survives_the_loss_of_one(name: str, jobs: Jobs) -> None:
    _survives(jobs, name.replace(" ", "-"), IN_PAIRS[name], (1, 5, 3), slots=2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_at_toy_size_survives_the_loss_of_a_node(name: str, jobs: Jobs) -> None:
    _survives(jobs, name, [f"recipe={name}", *RECIPES[name]], (0, 5, 3), slots=2)


def _operations(jobs: Jobs, name: str, rank: int) -> dict[int, float]:
    """By iteration, how many there were at the last line of the log, as of its last forward pass."""
    lines = (jobs.directory / f"{name}.look.{rank}").read_text().splitlines()
    return {look["step"]: look["operations"] for look in map(json.loads, lines)}


def test_a_line_of_the_log_counts_the_operations_before_a_recovery_too(jobs: Jobs) -> None:
    """As it counts their time: Bridge begins its count anew when it enters its loop."""
    flags = [*ALONE["replicas"], *ALONE["averages over three iterations"]]
    names = ["looked-calm", "looked-killed"]
    for name, spares in zip(names, (0, 1), strict=True):
        pace = jobs.directory / f"{name}.pace"
        set_pace(pace, "hold 0" if spares else "go")
        extra = {"PACE_FILE": str(pace), "LOOK_FILE": str(jobs.directory / f"{name}.look")}
        job = jobs.start(name, launch_flags(2 + spares, spares, 1), flags, BRIDGE, extra=extra)
        if spares:
            job.arm((0, 4, 3))
        job.finished()
    assert len(job.events("resumed")) == 1
    for rank in range(2):
        want, have = (_operations(jobs, name, rank) for name in names)
        assert want[3] < want[6] and {step: have[step] for step in (5, 6, 7)} == {
            step: want[step] for step in (5, 6, 7)
        }


def _saving(jobs: Jobs, name: str, interval: int, *more: str) -> list[str]:
    return [f"checkpoint.save={jobs.directory / name}.saved", f"checkpoint.save_interval={interval}", *more]


def _same_checkpoint(jobs: Jobs, iteration: int, *names: str) -> None:
    assert_same_checkpoint(*(jobs.directory / f"{name}.saved" / f"iter_{iteration:07}" for name in names))


def _kill_at(job: Job, *faults: tuple[int, str, int]) -> None:
    """Nodes at points of an iteration, in a job that is held; it goes on."""
    job.until_event("started")
    for node, point, iteration in faults:
        at = ["--at", point, "--at-iteration", str(iteration)]
        armed = job.command("inject", "--node", str(node), "--fault", "kill", *at)
        assert armed.returncode == 0, armed.stderr
    job.hold(None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_are_those_of_an_undisturbed_run(asynchronous: bool, jobs: Jobs) -> None:
    """A node is lost while one is written, and just before the last one is."""
    calm, killed = names = [f"{'async' if asynchronous else 'sync'}-{run}" for run in ("calm", "killed")]
    more = f"checkpoint.async_save={asynchronous}"
    want = jobs.start(calm, launch_flags(2, 0, 1), _saving(jobs, calm, 2, more), BRIDGE).finished()
    job = _start(jobs, killed, _saving(jobs, killed, 2, more), 2, 2)
    _kill_at(job, (0, "save.during", 3), (1, "save.before", ITERATIONS - 1))
    job.finished()
    assert len(job.events("resumed")) == 2
    assert_same_training(job, want, ITERATIONS, rank=1, mute=frozenset({ITERATIONS - 1}))
    _same_checkpoint(jobs, ITERATIONS, *names)


def test_a_writer_of_nvidia_resiliency_ext_is_killed_and_not_waited_for() -> None:
    """Bridge's default strategy; that class would give it an hour here, and then wait without limit."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async as of_core
    from nvidia_resiliency_ext.checkpointing.async_ckpt import core, filesystem_async

    from deadpool_megatron.megatron.reset import end_unfinished_saves, forget_write_results

    queue = core.AsyncCallsQueue(persistent=True)
    core.AsyncCallsQueue.warmup_persistent_caller(0, sigterm_timeout=3600.0, cpu_shm_mode=True)
    process = core.AsyncCallsQueue._warmup_persistent_caller.process
    os.kill(process.pid, signal.SIGSTOP)
    filesystem_async.get_write_results_queue().put("of a checkpoint that broke off")
    end_unfinished_saves(queue, 0)
    forget_write_results()
    process.join()
    assert process.exitcode == -signal.SIGKILL and core.AsyncCallsQueue._warmup_persistent_caller is None
    assert filesystem_async.get_write_results_queue().empty() and of_core._results_queue is None


def _evaluations(job: Job) -> list[str]:
    lines = [line for path in sorted(job.run_dir.glob("logs/rank-1*.log")) for line in path.read_text().splitlines()]
    return [line for line in lines if line.startswith(" validation loss at")]


def test_nodes_lost_after_the_last_iteration_cost_nothing(jobs: Jobs) -> None:
    """In the evaluation that comes after training, and when all else is done."""
    flags = ["validation.eval_interval=100"]
    want = undisturbed(launch_flags(2, 0, 1), flags, BRIDGE)
    job = _start(jobs, "after-the-last", flags, 2, 2)
    _kill_at(job, (0, "evaluation.during", ITERATIONS - 1), (1, "step.finished", ITERATIONS - 1))
    job.finished()
    assert len(job.events("resumed")) == 2
    assert job.hashes() == want.hashes()
    assert len(_evaluations(want)) == 2 and set(_evaluations(job)) == set(_evaluations(want))


def test_a_run_that_goes_on_from_a_checkpoint_survives_a_kill(jobs: Jobs) -> None:
    ends = _saving(jobs, "first", 100, "train.exit_interval=4")
    jobs.start("first", launch_flags(2, 0, 1), ends, BRIDGE).finished()
    load = [f"checkpoint.load={jobs.directory / 'first.saved'}"]
    want = undisturbed(launch_flags(2, 0, 1), load, BRIDGE)
    job = _start(jobs, "resumed", load, 2, 1)
    job.arm((0, 6, 3))
    job.finished()
    assert len(job.events("resumed")) == 1 and min(iteration for iteration, *_ in job.exact()) == 4
    assert sorted({iteration for iteration, *_ in want.exact()}) == [4, 5, 6, 7]
    expected = {iteration: exact for iteration, *exact in want.exact()}
    assert all(exact == expected[iteration] for iteration, *exact in job.exact())
    assert want.printed(1) and job.printed(1) == want.printed(1) and job.hashes() == want.hashes()


def test_a_job_that_was_killed_whole_goes_on_from_its_durable_directory_which_becomes_a_checkpoint(jobs: Jobs) -> None:
    store = jobs.directory / "store"
    more = ["--deadpool-durable-dir", str(store), "--deadpool-durable-interval", "2", "--deadpool-resume", "auto"]
    more += ["--deadpool-durable-keep", "9"]  # the one to export, too
    want = undisturbed(launch_flags(2, 0, 1), [], BRIDGE)
    job = _start(jobs, "ended", more, 2, 0)
    job.hold(6)
    job.until_event("durable")
    job.kill_everything()
    newest = max(int(path.parent.name.split("-")[1]) for path in store.glob("*/manifest.json"))
    again = jobs.start("again", launch_flags(2, 0, 1), more, BRIDGE).finished()
    expected = {iteration: exact for iteration, *exact in want.exact()}
    seen = {iteration: exact for iteration, *exact in again.exact()}
    assert newest and sorted(seen) == list(range(newest, ITERATIONS))
    assert all(expected[iteration] == exact for iteration, exact in seen.items()) and again.hashes() == want.hashes()
    calm, exported = "exported-calm", jobs.directory / "exported.saved"
    jobs.start(calm, launch_flags(2, 0, 1), _saving(jobs, calm, 1), BRIDGE, deadpool=False).finished()
    command = ["export", "--durable-dir", str(store), "--output", str(exported), "--emulate-cpu"]
    command += ["--run-dir", str(jobs.directory / "exporting"), "--generation", str(newest)]
    done = subprocess.run(
        [sys.executable, "-m", "deadpool_megatron.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"generation {newest} is Megatron's checkpoint now: checkpoint.load={exported}" in done.stdout
    _same_checkpoint(jobs, newest, "exported", calm)


def test_without_a_spare_the_survivors_save_bridges_checkpoint(jobs: Jobs) -> None:
    calm, rescued = "spared", "rescued"
    jobs.start(calm, launch_flags(2, 0, 1), _saving(jobs, calm, 1), BRIDGE, deadpool=False).finished()
    job = _start(jobs, rescued, _saving(jobs, rescued, 100), 2, 0)
    job.arm((0, 3, 3), until=3)
    job.until("a generation to save", lambda: [e for e in job.events("committed") if e["iteration"]])
    job.hold(None)
    assert job.wait() == Exit.NO_SPARE_SAVED, job.log_tails()
    saved = int((jobs.directory / "rescued.saved" / "latest_checkpointed_iteration.txt").read_text())
    assert 1 <= saved <= 3
    _same_checkpoint(jobs, saved, rescued, calm)


def test_without_a_spare_a_replica_is_left_out_and_comes_back_with_a_node(jobs: Jobs) -> None:
    it = Shrinking(jobs, "narrower", ["train.train_iters=12"], 2, script=BRIDGE)
    it.shrinks_and_grows(1)
    assert [(e["event"], e["width"], e["nodes"]) for e in it.compare()] == [("shrunk", 1, [0]), ("grown", 2, [0, 2])]


def test_a_run_under_deadpool_prints_what_bridge_prints_without_it(jobs: Jobs) -> None:
    plain = jobs.start("plain", launch_flags(2, 0, 1), ALONE["replicas"], BRIDGE, deadpool=False).finished()
    assert plain.printed(1) and plain.printed(1) == undisturbed(
        launch_flags(2, 0, 1), ALONE["replicas"], BRIDGE
    ).printed(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["dist.use_decentralized_pg=True", "dist.use_gloo_process_groups=False"],
            "dist.use_decentralized_pg (its process groups are none of parallel_state's)",
        ),
        (["train.iterations_to_skip=[3]"], "--iterations-to-skip is not supported with --deadpool yet"),
        (["inprocess_restart.enabled=True"], "inprocess_restart is not supported with --deadpool"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings: list[str], said: str, jobs: Jobs) -> None:
    job = jobs.start(settings[0].partition("=")[0], launch_flags(2, 0, 1), settings, BRIDGE)
    assert job.wait() == Exit.USAGE
    assert said in job.output


def test_a_bridge_that_the_megatron_core_is_too_old_for_is_named(jobs: Jobs, tmp_path: Path) -> None:
    """Bridge's main on the release that is installed."""
    job = jobs.start("old", launch_flags(2, 0, 1), [], BRIDGE, extra={"PYTHONPATH": f"{ROOT}:{bridge(tmp_path)}"})
    assert job.wait() == Exit.USAGE
    said = f"megatron-bridge cannot be imported with megatron-core {metadata.version('megatron-core')}"
    assert said in job.output and "is_gated_delta_net_variant" in job.output


def _transformer() -> str:
    """Where the layout of a GPT is: configs of models that are to be built have it apart, providers (0.6) do not."""
    found = find_spec("megatron.bridge")
    assert found is not None and found.origin is not None
    apart = (Path(found.origin).parent / "models" / "gpt" / "model_config.py").exists()
    return "model.transformer" if apart else "model"


def _deadpool(*words: str) -> subprocess.CompletedProcess[str]:
    """Beside the tests' recipes."""
    command = [sys.executable, "-m", "deadpool_megatron.cli", *words]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)


def _check(*words: str) -> subprocess.CompletedProcess[str]:
    return _deadpool("check", *words)


def _plan(*words: str) -> dict[str, Any]:
    done = _deadpool("plan", *words, "--json")
    assert done.returncode == 0, done.stderr
    numbers: dict[str, Any] = json.loads(done.stdout)
    return numbers


def test_a_recipe_by_name_is_judged_as_the_job_it_makes_would_be() -> None:
    """With overrides; where Bridge turns a setting on by itself (overlaps) that counts, too."""
    layout = [f"{_transformer()}.tensor_model_parallel_size=2", f"{_transformer()}.sequence_parallel=true"]
    done = _check("--recipe", "llama3_8b_low_precision_pretrain_config", "--nodes", "2", *layout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama3_8b_low_precision_pretrain_config: 16 processes, 8 a node" in done.stdout
    names = {line.partition("  ")[0] for line in done.stdout.splitlines()}
    assert {"tensor parallelism", "sequence parallelism", "overlapped gradient reduction"} <= names
    assert {"FP8 with current scaling", "distributed optimizer"} <= names


def test_all_that_is_refused_of_a_recipe_is_named() -> None:
    """Bridge's own settings beside those that Megatron-LM has too; of one's own function."""
    more = ["train.iterations_to_skip=[3]", "dist.lazy_mpu_init=true"]
    done = _check("--recipe", "megatron.bridge.recipes:llama3_8b_pretrain_config", *more)
    assert done.returncode == 1, done.stdout + done.stderr
    refused = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert refused == ["--iterations-to-skip [3]", "dist.lazy_mpu_init"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama3_8b_pretrain_confi"], "none of that name; near it: llama3_8b_pretrain_config"),
        (["nowhere:recipe"], "No module named 'nowhere'"),
        (["llama32_1b_pretrain_config"], "its architecture, meta-llama/Llama-3.2-1B, could not be read"),
        (["llama3_8b_pretrain_config", "model.nothing=2"], "Could not override 'model.nothing'"),
    ],
)
def test_a_recipe_that_cannot_be_had_is_answered_in_one_line(words: list[str], said: str) -> None:
    done = _check("--recipe", *words)
    assert done.returncode == Exit.USAGE and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


# By version of Bridge, of its performance recipes: how many there are, how many are accepted at least, and the file
# that those which cannot be read want and the wheel lacks.
_JUDGED = {"0.6.2": (411, 371, "te_quant.cfg"), "0.7.0": (399, 369, "")}


def test_all_performance_recipes_are_judged_in_one_command() -> None:
    """Each is accepted, refused by name, or named with why it cannot be read."""
    done = _check("--recipes")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    accepted, of = (int(word) for word in first.split() if word.isdecimal())
    known, least, missing = _JUDGED[first.split()[-1]]
    refused = {line.split(": ")[1] for line in lines if line.startswith("refused: ")}
    unread = [line for line in lines if line.startswith("not read: ")]
    assert of == known and accepted + len(refused) + len(unread) == of
    assert accepted >= least and "deepseek_v3_pretrain_64gpu_gb300_bf16_fsdp_config" in refused
    assert bool(unread) == bool(missing) and all("nemotron_3_super" in line and missing in line for line in unread)


# ---- `deadpool plan --recipe`

_DIVIDED = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "sequence_parallel=true",
            "context_parallel_size=1"]  # fmt: skip
_LLAMA = {
    **{"num-layers": 32, "hidden-size": 4096, "ffn-hidden-size": 14336, "num-attention-heads": 32},
    **{"group-query-attention": True, "num-query-groups": 8, "vocab-size": 128256, "seq-length": 8192},
    **{"max-position-embeddings": 8192, "swiglu": True, "normalization": "RMSNorm", "position-embedding-type": "rope"},
    **{"disable-bias-linear": True, "untie-embeddings-and-output-weights": True, "bf16": True},
    **{"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2, "sequence-parallel": True},
    **{"use-distributed-optimizer": True, "grad-reduce-in-bf16": True},
    **{"micro-batch-size": 1, "global-batch-size": 128},
}


def _cluster(path: Path, **sections: Any) -> str:
    """A file for two nodes of two devices, so slow that copying takes no time beside an iteration of any model."""
    cluster = {"nodes": 2, "gpus_per_node": 2, "gpu_memory": 80, "host_memory": 2048, "tflops": 1e-3, "network": 100}
    path.write_text(yaml.safe_dump({"cluster": cluster, "deadpool": {"deadpool": True}, **sections}))
    return str(path)


def test_a_recipe_has_the_numbers_of_the_flags_that_say_the_same(tmp_path: Path) -> None:
    """Counted in the model that Bridge builds, and by formula, stage by stage."""
    words = ["--nodes", "2", "--nproc-per-node", "4"]
    recipe = _plan(
        "--recipe",
        "llama3_8b_pretrain_8gpu_h100_bf16_config",
        *words,
        *(f"{_transformer()}.{each}" for each in _DIVIDED),
    )
    flags = _plan("--config", _cluster(tmp_path / "run.yaml", megatron=_LLAMA), *words)
    assert recipe["sizes"] == flags["sizes"]
    assert recipe["model"]["parameters"] == flags["model"]["parameters"] == 8_030_261_248  # as published
    for counted, computed in zip(recipe["stages"], flags["stages"], strict=True):
        assert 0 < counted.pop("activations") <= computed.pop("activations")  # with the true width of keys and values
        assert counted == computed
    # Looking up an embedding is no operation; by flags it is counted as one.
    assert recipe["operations"] == pytest.approx(flags["operations"], rel=0.1)
    assert any(note.startswith("assumed of the cluster") for note in recipe["warnings"])


@pytest.mark.parametrize(
    ("recipe", "parameters", "active", "stages"),
    [
        ("qwen3_30b_a3b_pretrain_16gpu_h100_bf16_config", 30_532_122_624, 3_353_032_704, 1),
        # 671.03e9 are published, without the layer that predicts the next but one token.
        ("deepseek_v3_pretrain_1024gpu_h100_bf16_config", 682_636_472_320, 38_240_382_976, 8),
    ],
)
def test_parameters_of_experts_are_the_published_ones_whatever_the_layout(
    recipe: str, parameters: int, active: int, stages: int
) -> None:
    plan = _plan("--recipe", recipe)
    assert plan["model"] == {"parameters": parameters, "active_parameters": active}
    sizes = plan["sizes"]
    assert sizes["ep"] > 1 and len(plan["stages"]) == sizes["pp"] == stages
    # Each expert's state is held once, and that of everything else too.
    copied = sum(stage["unique"] for stage in plan["stages"]) * sizes["world"] / sizes["pp"]
    assert copied == pytest.approx(plan["state_bytes"] * parameters, rel=0.01)


@pytest.mark.parametrize("name", ["llama3_8b_pretrain_config", "gpt_oss_20b_pretrain_config",
                                  "qwen3_30b_a3b_pretrain_config", "deepseek_v3_pretrain_config_32nodes"])  # fmt: skip
def test_what_a_plan_says_is_copied_is_what_the_job_finds(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """Each rank says what it has to copy by the parameters it trains and the optimizer's state there is."""
    job = undisturbed(launch_flags(2, 0, 2), [f"recipe={name}", *RECIPES[name]], BRIDGE)
    logs = "".join(path.read_text() for path in (job.run_dir / LOGS).glob("rank-*.log"))
    found = [int(count.replace(",", "")) for count in re.findall(r"pieces; ([\d,]+) by the arithmetic", logs)]
    plan = _plan("--recipe", f"bridge_recipes:{name}", "--config", _cluster(tmp_path / "run.yaml"), *RECIPES[name])
    planned = [stage["unique"] for stage in plan["stages"] for _ in range(4 // len(plan["stages"]))]
    assert sorted(found) == pytest.approx(sorted(planned), abs=2 * plan["state_bytes"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama3_8b_pretrain_8gpu_h100_bf16_config"], "one node that trains has no peer"),
        (["llama3_8b_pretrain_8gpu_r100_bf16_config"], "what a node of r100 has is not known here: give --config"),
        (["nemotron_3_super_pretrain_64gpu_h100_bf16_config"], "Super-120B-A12B-BF16 is not known here"),
        (["nemotronh_4b_pretrain_config", "tokenizer.tokenizer_type=HuggingFaceTokenizer"], "give model.vocab_size=N"),
        (["llama3_8b_pretrain_config", "dist.lazy_mpu_init=true"], "dist.lazy_mpu_init: not supported with --deadpool"),
    ],
)
def test_a_recipe_that_cannot_be_planned_is_answered_in_one_line(words: list[str], said: str) -> None:
    done = _deadpool("plan", "--recipe", *words)
    assert done.returncode == Exit.USAGE and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
