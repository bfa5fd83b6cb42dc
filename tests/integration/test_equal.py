"""Whatever an iteration depends on comes back after a loss: what came out of a checkpoint, positions that no flag
expresses, sums that a process keeps. A killed run is compared with an undisturbed one, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from flags import Layout, duo_gpt, plain_optimizer, with_value, without_values
from jobs import EXAMPLE, ROOT, Job, Jobs, launch_flags
from upstream import scripts

ITERATIONS = 8
_MAKE_DATA = """
import sys, numpy as np, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
for name, docs in (("train", 60), ("valid", 12), ("other", 13)):
    builder = IndexedDatasetBuilder(f"{sys.argv[1]}/{name}.bin", dtype=np.int32)
    generator = torch.Generator().manual_seed(docs)
    for _ in range(docs):
        builder.add_item(torch.randint(0, 250, (90,), generator=generator, dtype=torch.int32))
        builder.end_document()
    builder.finalize(f"{sys.argv[1]}/{name}.idx")
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real ``.bin`` and ``.idx`` files: train, valid, other."""
    directory = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, "-c", _MAKE_DATA, str(directory)], check=True, capture_output=True)
    return directory


def _checkpoint(jobs: Jobs, flags: list[str], script: Path = EXAMPLE) -> list[str]:
    """The flags to load the checkpoint of iteration 4 of a run with these."""
    save = jobs.directory / "ckpt"
    saving = ["--exit-interval", "4", "--save", str(save), "--save-interval", "4", "--ckpt-format", "torch_dist"]
    jobs.start("first", launch_flags(2, slots=1), [*flags, *saving], script, deadpool=False).finished()
    return ["--load", str(save), "--ckpt-format", "torch_dist"]


def _killed(
    jobs: Jobs, flags: list[str], at: tuple[int, int], script: Path = EXAMPLE, node: int = 0
) -> tuple[Job, Job]:
    """The job whose node dies at (iteration, tick), and the undisturbed one; they have trained alike."""
    want = jobs.start("undisturbed", launch_flags(2, slots=1), flags, script).finished()
    job = jobs.start("killed", launch_flags(3, 1, slots=1), flags, script, held=True)
    job.arm((node, *at))
    job.finished()
    assert len(job.events("resumed")) == 1
    expected = {iteration: exact for iteration, *exact in want.exact()}
    assert max(expected) == ITERATIONS - 1
    assert all(exact == expected[iteration] for iteration, *exact in job.exact())
    assert want.printed(1) and job.printed(1) == want.printed(1)
    assert job.hashes() == want.hashes(), [
        (rank, part)
        for rank, parts in want.hashes().items()
        for part in parts
        if job.hashes()[rank][part] != parts[part]
    ]
    return job, want


def _validations(job: Job) -> list[str]:
    text = (job.run_dir / "logs" / "rank-1.log").read_text()
    return [line.split("|")[0] + line.split("|")[1] for line in text.splitlines() if "loss at iteration" in line]


MOE = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"),
    "--disable-bias-linear",
]
LOSSES = ["--moe-aux-loss-coeff", "1e-2", "--moe-z-loss-coeff", "1e-3"]


def _two_sets(data: Path) -> list[str]:
    return [
        *("--train-data-path", str(data / "train"), "--valid-data-path", str(data / "valid"), str(data / "other")),
        *("--full-validation", "--multiple-validation-sets", "--eval-interval", "2"),
    ]


def _on_files(flags: list[str]) -> list[str]:
    """Without mock data, and without the evaluation settings that full validation excludes."""
    return [f for f in without_values(flags, "--eval-iters", "--eval-interval") if f != "--mock-data"]


def test_a_resumed_run_of_experts_with_full_validation_ends_the_same_after_a_kill(jobs: Jobs, data: Path) -> None:
    """One run with a member of each kind: scheduler out of a checkpoint, positions of iterators, sums for the log."""
    flags = [*plain_optimizer(duo_gpt("data", ITERATIONS)), *MOE, *LOSSES]
    resume = [*_checkpoint(jobs, flags), "--lr-decay-iters", "12", "--use-checkpoint-opt_param-scheduler"]
    job, want = _killed(jobs, [*_on_files(flags), *resume, *_two_sets(data)], (6, 3))
    assert _validations(want) and set(_validations(job)) == set(_validations(want))
    assert all("load_balancing_loss" in line and "z_loss" in line for line in want.printed(1).values())


@dataclass(frozen=True)
class Recipe:
    """Flags on top of a data-parallel pair; ``resumes``: with a checkpoint of iteration 4 loaded."""

    flags: str = ""
    resumes: bool = False
    at: tuple[int, int] = (6, 3)
    base: Callable[[list[str]], list[str]] = list


RECIPES = {
    "checkpoint's scheduler": Recipe("--lr-decay-iters 12 --use-checkpoint-opt_param-scheduler", True),
    "scheduler overridden": Recipe("--weight-decay 0.05 --lr-decay-iters 12 --override-opt_param-scheduler", True),
    "weight decay that grows": Recipe(
        "--start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style linear"
    ),
    "warmup, stable, decay": Recipe("--lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-wsd-decay-style cosine"),
    "plain resume": Recipe("", True),
    "finetune": Recipe("--finetune", True),
    "only the model": Recipe("--no-load-optim --no-load-rng", True),
    "multi-token prediction": Recipe("--mtp-num-layers 1 --position-embedding-type rope"),
    "z loss": Recipe(" ".join([*MOE, *LOSSES])),
    "checkpoint's arguments": Recipe("--use-checkpoint-args", True),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_of_this_recipe_ends_the_same(name: str, jobs: Jobs) -> None:
    recipe = RECIPES[name]
    flags = plain_optimizer(duo_gpt("data", ITERATIONS)) if recipe.resumes else duo_gpt("data", ITERATIONS)
    more = _checkpoint(jobs, flags) if recipe.resumes else []
    _killed(jobs, [*flags, *more, *recipe.flags.split()], recipe.at)


# ---- other data, other models

EPOCHS = {
    "shuffled": "--dataloader-type cyclic",
    "shuffled, not by replica": "--dataloader-type cyclic --no-data-sharding",
    "shuffled, in processes of their own": "--dataloader-type cyclic --num-workers 2",
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", EPOCHS)
def test_several_epochs_of_data_in_another_order_each(name: str, jobs: Jobs) -> None:
    flags = without_values(duo_gpt("data", ITERATIONS), "--eval-iters", "--eval-interval", "--num-workers")
    more = EPOCHS[name].split()
    more += ["--eval-interval", "3", "--eval-iters", "2"]
    more += [] if "--num-workers" in more else ["--num-workers", "0"]
    _killed(
        jobs, [*flags, *more], (6, 3), ROOT / "tests" / "pretrain_epochs.py"
    )  # an epoch is two and a half iterations


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_several_epochs_of_files(jobs: Jobs, data: Path) -> None:
    flags = [*_on_files(duo_gpt("data", ITERATIONS)), "--eval-interval", "3", "--eval-iters", "2"]
    flags += ["--data-path", str(data / "valid"), "--split", "90,10,0"]  # 15 samples of 64 tokens, for 64 samples
    _killed(jobs, flags, (6, 3))


_SENTENCES = """
import sys, numpy as np, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
builder = IndexedDatasetBuilder(f"{sys.argv[1]}/sentences.bin", dtype=np.int32)
generator = torch.Generator().manual_seed(5)
for _ in range(60):
    for _ in range(9):
        builder.add_item(torch.randint(26, 320, (11,), generator=generator, dtype=torch.int32))
    builder.end_document()
builder.finalize(f"{sys.argv[1]}/sentences.idx")
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_upstreams_other_models(model: str, layers: str, jobs: Jobs) -> None:
    directory = jobs.directory
    scripts("core_v0.19.0", directory, f"examples/{model}/pretrain_{model}.py")
    scripts("core_v0.19.0", directory, "pretrain_gpt.py", "gpt_builders.py", "model_provider.py", "hybrid_builders.py")
    subprocess.run([sys.executable, "-c", _SENTENCES, str(directory)], check=True, capture_output=True)
    flags = without_values(_on_files(duo_gpt("data", ITERATIONS)), "--tokenizer-type", "--vocab-size")
    flags += ["--data-path", str(directory / "sentences"), "--split", "90,10,0", "--eval-interval", "3"]
    flags += ["--eval-iters", "2"]
    if layers == "transformer_engine":
        flags = with_value(with_value(flags, "--transformer-impl", layers), "--attention-backend", "auto")
    elif model == "bert":
        flags = [*with_value(flags, "--attention-backend", "local"), "--spec", "local"]
    if model == "t5":
        flags += ["--decoder-seq-length", "32"]
    _killed(jobs, [str(directory / f"pretrain_{model}.py"), *flags], (6, 3), ROOT / "tests" / "pretrain_wordpiece.py")


@pytest.mark.perf
def test_the_time_of_an_iteration_that_is_printed_counts_those_before_the_recovery(jobs: Jobs) -> None:
    job, _ = _killed(jobs, [*duo_gpt("data", ITERATIONS), "--log-interval", "3"], (4, 2))
    text = (job.run_dir / "logs" / "rank-1.log").read_text()
    (printed,) = re.findall(r"iteration +6/ .*elapsed time per iteration \(ms\): ([\d.]+)", text)
    seconds = {e["iteration"]: e["seconds"] for e in job.events("iteration")}
    assert 3 * float(printed) + 1 >= 1000 * sum(seconds[i] for i in (3, 4, 5))


@pytest.mark.slow
def test_a_spare_whose_disk_lacks_the_index_of_the_data_makes_it(jobs: Jobs, data: Path) -> None:
    flags = _on_files(duo_gpt("data", ITERATIONS))
    flags += ["--data-path", str(data / "train"), "--split", "90,10,0", "--eval-interval", "3", "--eval-iters", "2"]
    flags += ["--data-cache-path", str(jobs.directory / "cache")]
    want = jobs.start("undisturbed", launch_flags(2, slots=1), flags).finished()
    job = jobs.start("killed", launch_flags(3, 1, slots=1), flags, held=True)
    job.arm((1, 3, 2), until=0)
    job.until_event("committed")
    shutil.rmtree(jobs.directory / "cache")
    job.hold(None)
    job.finished()
    assert len(job.events("resumed")) == 1 and "makes the index of its data sets itself" in job.log_tails(200)
    assert job.hashes() == want.hashes()


# ---- parameters that no optimizer holds

_FROZEN = """
import runpy
from megatron.core.models.gpt import GPTModel

init = GPTModel.__init__

def __init__(self, *args, **kwargs):
    init(self, *args, **kwargs)
    for name, parameter in self.named_parameters():
        if FROZEN in name:
            parameter.requires_grad_(False)

GPTModel.__init__ = __init__
runpy.run_path("EXAMPLE", run_name="__main__")
"""


@pytest.mark.parametrize(
    "frozen", ["embedding", pytest.param("mlp", marks=pytest.mark.slow), pytest.param("norm", marks=pytest.mark.slow)]
)
def test_frozen_layers_out_of_a_checkpoint_are_a_spare_s_too(frozen: str, jobs: Jobs) -> None:
    plain = plain_optimizer(duo_gpt("data", ITERATIONS))
    more = [*_checkpoint(jobs, plain), "--finetune", "--no-load-optim", "--no-load-rng"]
    script = jobs.directory / "frozen.py"
    script.write_text(_FROZEN.replace("EXAMPLE", str(EXAMPLE)).replace("FROZEN", repr(frozen)))
    _killed(jobs, [*duo_gpt("data", ITERATIONS), *more], (3, 2), script=script)


def test_frozen_layers_without_a_replica_come_from_the_vault(jobs: Jobs) -> None:
    plain = plain_optimizer(duo_gpt("pipeline", ITERATIONS))
    more = [*_checkpoint(jobs, plain), "--finetune", "--no-load-optim", "--no-load-rng"]
    script = jobs.directory / "frozen.py"
    script.write_text(_FROZEN.replace("EXAMPLE", str(EXAMPLE)).replace("FROZEN", "'mlp'"))
    _killed(jobs, [*duo_gpt("pipeline", ITERATIONS), *more], (3, 2), script=script)


_ADAPTERS = """
import runpy
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP

mlp_init, mlp_forward, gpt_init = MLP.__init__, MLP.forward, GPTModel.__init__

def init(self, *args, **kwargs):
    mlp_init(self, *args, **kwargs)
    width = self.config.hidden_size
    self.down = torch.nn.Linear(width, 4, bias=False, dtype=self.config.params_dtype)
    self.up = torch.nn.Linear(4, width, bias=False, dtype=self.config.params_dtype)

def forward(self, hidden, *args, **kwargs):
    out, bias = mlp_forward(self, hidden, *args, **kwargs)
    return out + self.up(self.down(hidden)), bias

def gpt(self, *args, **kwargs):
    gpt_init(self, *args, **kwargs)
    for name, parameter in self.named_parameters():
        parameter.requires_grad_(".down." in name or ".up." in name)

MLP.__init__, MLP.forward, GPTModel.__init__ = init, forward, gpt
runpy.run_path("EXAMPLE", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", ["pipeline", "data"])
def test_low_rank_adapters_on_a_base_that_does_not_change(layout: Layout, jobs: Jobs) -> None:
    script = jobs.directory / "adapters.py"
    script.write_text(_ADAPTERS.replace("EXAMPLE", str(EXAMPLE)))
    flags = plain_optimizer(duo_gpt(layout, ITERATIONS))
    base = _checkpoint(jobs, [*flags, "--seed", "99"], script)  # a spare's own base would be another one
    _killed(jobs, [*flags, *base, "--finetune", "--no-load-optim", "--no-load-rng"], (3, 2), script)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_goes_on_from_disk_with_its_frozen_layers_though_the_checkpoint_is_gone(jobs: Jobs) -> None:
    plain = plain_optimizer(duo_gpt("pipeline", ITERATIONS))
    more = [*_checkpoint(jobs, plain), "--finetune", "--no-load-optim", "--no-load-rng"]
    script = jobs.directory / "frozen.py"
    script.write_text(_FROZEN.replace("EXAMPLE", str(EXAMPLE)).replace("FROZEN", "'mlp'"))
    flags = [*duo_gpt("pipeline", ITERATIONS), *more]
    want = jobs.start("undisturbed", launch_flags(2, slots=1), flags, script).finished()
    durable = ["--deadpool-durable-dir", str(jobs.directory / "durable"), "--deadpool-durable-interval", "2"]
    first = jobs.start("killed", launch_flags(2, slots=1), [*flags, *durable], script, held=True)
    first.hold(5)
    first.until_event("durable")
    first.end()
    resumed = jobs.start(
        "resumed",
        launch_flags(2, slots=1),
        [*duo_gpt("pipeline", ITERATIONS), *durable, "--deadpool-resume", "auto"],
        script,
    ).finished()
    assert resumed.exact()[0][0] >= 2 and len(resumed.events("compared")) == 1
    assert resumed.hashes() == want.hashes()
    command = [sys.executable, "-m", "deadpool_megatron.cli", "export", "--emulate-cpu", "--durable-dir", durable[1]]
    command += ["--output", str(jobs.directory / "exported"), "--run-dir", str(jobs.directory / "run")]
    command += ["--script", str(script)]  # a held job has another one around it
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr  # its ranks load no checkpoint, and compare what they have


# ---- a recovery proves itself

_SPOILT = """
import os, runpy
import torch
from deadpool_megatron.megatron import trainer

compare, what, left = trainer.MegatronTrainer._compare, os.environ["SPOIL"], [int(os.environ["TIMES"])]

def _compare(self):
    if self.rank == 0 and left[0]:
        left[0] -= 1
        with torch.no_grad():
            if what == "parameters":
                parameter = next(p for p in self._model[0].parameters() if p.requires_grad)
                parameter.view(-1).view(torch.int16)[7] ^= 1
            elif what == "frozen":
                next(p for p in self._model[0].parameters() if not p.requires_grad).view(-1)[7] += 1
            elif what == "hyperparameters":
                self._optimizer.param_groups[0]["weight_decay"] += 0.125
            elif what == "seed":
                torch.manual_seed(4711)
            elif what == "schedule":
                self._scheduler.num_steps += 8
    return compare(self)

trainer.MegatronTrainer._compare = _compare
runpy.run_path("SCRIPT", run_name="__main__")
"""


def _spoilt(jobs: Jobs, what: str, times: int) -> Job:
    """A job whose spare's state is spoilt after it was restored, so many times; it is held, and its kill armed."""
    frozen, script = jobs.directory / "frozen.py", jobs.directory / "spoilt.py"
    frozen.write_text(_FROZEN.replace("EXAMPLE", str(EXAMPLE)).replace("FROZEN", "'embedding'"))
    script.write_text(_SPOILT.replace("SCRIPT", str(frozen)))
    job = jobs.start(
        f"spoilt-{what}-{times}",
        launch_flags(3, 1, slots=1),
        duo_gpt("data", 5),
        script,
        held=True,
        extra={"SPOIL": what, "TIMES": str(times)},
    )
    job.arm((0, 3, 2))
    return job


SPOILS = {
    "parameters": "parameters",
    "frozen": "parameters",
    "hyperparameters": "hyperparameters",
    "seed": "small state",
    "schedule": "progress and schedule",
}


@pytest.mark.parametrize(
    "what", [each if each == "parameters" else pytest.param(each, marks=pytest.mark.slow) for each in SPOILS]
)
def test_what_a_recovery_brought_back_wrong_is_found_and_made_right(what: str, jobs: Jobs) -> None:
    frozen = jobs.directory / "frozen.py"
    job = _spoilt(jobs, what, 1).finished()
    want = jobs.start("undisturbed", launch_flags(2, slots=1), duo_gpt("data", 5), frozen).finished()
    assert job.hashes() == want.hashes()
    unlike = job.events("unlike")
    assert SPOILS[what] in {each["part"] for each in unlike} and all(each["equal"] for each in unlike)
    assert {0} <= {rank for each in unlike for rank in each["ranks"]}
    assert len(job.events("compared")) == 1


@pytest.mark.slow
def test_what_cannot_be_made_right_ends_the_job_with_a_code_of_its_own(jobs: Jobs) -> None:
    job = _spoilt(jobs, "hyperparameters", 2)
    assert job.wait() == Exit.UNEQUAL
    assert "after the recovery" in job.output and "hyperparameters of rank" in job.output


@pytest.mark.slow
def test_replicas_are_compared_every_so_many_iterations_and_what_differs_is_named(jobs: Jobs) -> None:
    script = jobs.directory / "flipped.py"
    script.write_text(
        "import os, runpy, torch\n"
        "from megatron.training import training\n"
        "step, calls = training.train_step, [0]\n"
        "def train_step(forward, data, model, *args, **kwargs):\n"
        "    calls[0] += 1\n"
        "    result = step(forward, data, model, *args, **kwargs)\n"
        "    if calls[0] == 3 and os.environ['RANK'] == '1':\n"
        "        with torch.no_grad():\n"
        "            next(model[0].parameters()).view(-1).view(torch.int32)[5] ^= 1 << 20\n"
        "    return result\n"
        "training.train_step = train_step\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    flags = [
        *(flag for flag in plain_optimizer(duo_gpt("data", 8)) if flag != "--bf16"),
        "--deadpool-check-replicas",
        "2",
    ]
    job = jobs.start("flipped", launch_flags(2, slots=1), flags, script).finished()
    assert [e["iteration"] for e in job.events("compared")] == [2, 4, 6]
    unlike = job.events("unlike")
    assert {e["iteration"] for e in unlike} <= {4, 6} and unlike
    assert any(e["part"].endswith("parameters") and 1 in e["ranks"] and 1 in e["nodes"] for e in unlike)


# ---- the same error again

_FAILING = """
import errno, os, runpy, time
from pathlib import Path
from megatron.core.models.gpt import GPTModel
from megatron.training import get_args

forward_ = GPTModel.forward

def forward(self, *args, **kwargs):
    rank, at = os.environ["RANK"], get_args().consumed_train_samples >= 24 and self.training
    BODY
    return forward_(self, *args, **kwargs)

GPTModel.forward = forward
runpy.run_path("EXAMPLE", run_name="__main__")
"""
_ONCE_EACH = """flag = Path("DIRECTORY", "raised-" + rank)
    if at and rank in ("0", "1") and not flag.exists():
        flag.touch()
        while not all(Path("DIRECTORY", "raised-" + each).exists() for each in "01"):
            time.sleep(0.01)
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/scratch/data_text_document.bin")"""
_ALWAYS = """if at and rank == "0":
        raise RuntimeError(f"DataLoader worker (pid {os.getpid()}) is killed by signal: Killed.")"""


def _script(jobs: Jobs, body: str) -> Path:
    path = jobs.directory / "failing.py"
    text = _FAILING.replace("BODY", body).replace("EXAMPLE", str(EXAMPLE))
    path.write_text(text.replace("DIRECTORY", str(jobs.directory)))
    return path


def test_two_ranks_of_a_node_that_fail_at_once_cost_one_spare(jobs: Jobs) -> None:
    job = jobs.start("twins", launch_flags(3, 1, slots=2), duo_gpt("data", 6), _script(jobs, _ONCE_EACH)).finished()
    errors = job.events("worker_error")
    assert {e["rank"] for e in errors} <= {0, 1} and errors
    assert len({e["node"] for e in errors}) == 1 and max(e["iteration"] for e in job.events("iteration")) == 5


def test_an_error_with_a_process_id_in_its_text_is_the_same_again(jobs: Jobs) -> None:
    job = jobs.start("pid", launch_flags(3, 1, slots=1), duo_gpt("data", 6), _script(jobs, _ALWAYS))
    assert job.wait() == Exit.REPEATED_ERROR
    assert "raised the same error at iteration 3 again" in job.output and "(pid " in job.output
