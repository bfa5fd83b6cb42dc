"""`deadpool plan`: its arithmetic is that of Megatron's real models, its files work, what cannot work is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from deadpool_megatron import cli
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.config import from_script_arguments
from deadpool_megatron.planning import report
from deadpool_megatron.planning.budget import Budget, budget
from deadpool_megatron.planning.files import PlanError, RunFile, load
from deadpool_megatron.planning.model import Counted, Layout, Shard, layout, model
from deadpool_megatron.planning.narrower import narrower
from deadpool_megatron.planning.spares import spares
from deadpool_megatron.planning.workload import Workload

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LARGE = ROOT / "configs" / "65b_a100_64x8.yaml"


def _changed(tmp_path: Path, cluster: dict[str, Any] | None = None, deadpool: dict[str, Any] | None = None,
             **megatron: Any) -> RunFile:  # fmt: skip
    data = yaml.safe_load(LARGE.read_text())
    data["cluster"].update(cluster or {})
    data["deadpool"].update(deadpool or {})
    for name, value in megatron.items():
        data["megatron"][name.replace("_", "-")] = value
        if value is None:
            del data["megatron"][name.replace("_", "-")]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return load(str(path))


# ---- the files in configs/


def test_there_is_a_file_for_each_kind_of_run() -> None:
    names = {path.stem for path in CONFIGS}
    wanted = {"65b_a100_64x8", "65b_a100_128x4", "65b_h100_32x8", "65b_h200_16x8", "7b_64", "moe_8x7b", "cpu_tiny"}
    assert names == wanted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_works_and_its_flags_are_flags_of_megatron_and_deadpool(path: Path) -> None:
    run = load(str(path))
    budget(run)
    assert from_script_arguments(run.flags()) == run.deadpool and run.deadpool.deadpool
    arguments = pytest.importorskip("megatron.training.arguments")
    import argparse

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known, unknown = parser.parse_known_args(run.flags())
    assert [flag for flag in unknown if flag.startswith("--") and not flag.startswith("--deadpool")] == []
    assert known.num_layers == run.megatron["num-layers"] and isinstance(known.lr, float)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_has_the_spares_that_the_plan_finds_best_and_one_at_least(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--config", str(path), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["spares"]["best"]
    assert load(str(path)).cluster.spare_nodes == max(1, best)
    assert cli.main(["plan", "--config", str(path)]) == 0
    assert (": best 0, asked for are 1" in capsys.readouterr().out) == (best == 0)


def test_the_small_file_is_the_demos_job() -> None:
    run = load(str(ROOT / "configs" / "cpu_tiny.yaml"))
    tiny = (ROOT / "examples" / "cpu_tiny.args").read_text().split()
    assert run.flags() == [*tiny, "--train-iters", "20", "--deadpool"]
    assert (run.cluster.nodes, run.cluster.spare_nodes, run.cluster.gpus_per_node) == (4, 1, 2)


# ---- the arithmetic


def test_65b_on_512_devices_is_the_arithmetic_it_was_designed_by() -> None:
    plan = budget(load(str(LARGE)))
    assert plan.model.parameters == pytest.approx(65e9, rel=0.01)
    assert (
        plan.unique_mean
        == pytest.approx(12 * plan.model.parameters / 512, rel=0.001)
        == pytest.approx(1.52e9, rel=0.01)
    )
    assert plan.weights_mean == pytest.approx(2.03e9, rel=0.01)
    assert plan.unique_mean / 25e9 == pytest.approx(0.061, rel=0.01)
    assert plan.iteration_s == pytest.approx(11, rel=0.1)
    assert (plan.groups_changed, plan.ranks_touched) == ((17, 192), 120)
    assert plan.spare_device == pytest.approx(3.6e9, rel=0.02)
    assert plan.vault_node == pytest.approx(2 * 2 * 8 * plan.unique, rel=0.01)
    assert plan.network_share == pytest.approx(8 * plan.unique / (200e9 * plan.iteration_s), rel=0.01)
    assert plan.tolerated.startswith("any 1 node; any 2 nodes but these 32 pairs")


def test_without_the_distributed_optimizer_a_device_holds_all_and_still_copies_its_part(tmp_path: Path) -> None:
    with_it, without = budget(load(str(LARGE))), budget(_changed(tmp_path, use_distributed_optimizer=None))
    assert without.unique == with_it.unique
    assert without.optimizer == pytest.approx(8 * with_it.optimizer, rel=0.001)


REAL = """
import json, sys
import torch, torch.distributed as dist
torch.Tensor.cuda = lambda tensor, *args, **more: tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
out = []
for case in json.loads(sys.argv[1]):
    tp, pp, stage, ep, etp = case["tp"], case["pp"], case["stage"], case["ep"], case["etp"]
    dist.init_process_group("fake", store=FakeStore(), rank=stage * tp, world_size=tp * pp)
    ps.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp,
                                 create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=case["layers"], hidden_size=64, num_attention_heads=8, ffn_hidden_size=case["ffn"],
        num_query_groups=case["groups"], gated_linear_unit=case["gated"], add_bias_linear=case["bias"],
        normalization=case["norm"], num_moe_experts=case["experts"], use_cpu_initialization=True,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32,
        expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    spec = get_gpt_layer_local_spec(num_experts=case["experts"], moe_grouped_gemm=False, normalization=case["norm"])
    model = GPTModel(config, spec, case["vocab"], 32, pre_process=stage == 0, post_process=stage == pp - 1,
                     share_embeddings_and_output_weights=case["tied"], position_embedding_type=case["positions"])
    out.append(sum(p.numel() for p in model.parameters()))
    ps.destroy_model_parallel()
    dist.destroy_process_group()
print(json.dumps(out))
"""


def _case(tp: int = 1, pp: int = 1, stage: int = 0, **more: Any) -> dict[str, Any]:
    plain = {"layers": 4, "ffn": 256, "groups": 8, "gated": False, "bias": True, "norm": "LayerNorm", "experts": None}
    plain |= {"vocab": 1024, "tied": True, "positions": "learned_absolute", "ep": 1, "etp": tp}
    return plain | {"tp": tp, "pp": pp, "stage": stage} | more


LLAMA = {"gated": True, "bias": False, "tied": False, "positions": "rope", "groups": 2, "ffn": 192}
CASES = [
    _case(),
    _case(tp=2),
    _case(tp=2, pp=2, stage=0),
    _case(tp=2, pp=2, stage=1),
    _case(pp=4, stage=1),
    _case(**LLAMA),
    _case(tp=2, pp=2, stage=1, **LLAMA),
    _case(**(LLAMA | {"experts": 4})),
    _case(tp=2, ep=2, etp=1, **(LLAMA | {"experts": 4})),
]


@pytest.mark.timeout(120)
def test_parameters_are_counted_as_megatron_builds_them() -> None:
    pytest.importorskip("megatron.core")
    done = subprocess.run(
        [sys.executable, "-c", REAL, json.dumps(CASES)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case, real in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        flags: dict[str, Any] = {
            "num-layers": case["layers"], "hidden-size": 64, "num-attention-heads": 8, "seq-length": 32,
            "ffn-hidden-size": case["ffn"], "group-query-attention": True, "num-query-groups": case["groups"],
            "max-position-embeddings": 32, "vocab-size": case["vocab"], "normalization": case["norm"],
            "tensor-model-parallel-size": case["tp"], "pipeline-model-parallel-size": case["pp"],
            "position-embedding-type": case["positions"], "expert-model-parallel-size": case["ep"],
            "expert-tensor-parallel-size": case["etp"],
        }  # fmt: skip
        if case["experts"]:
            flags["num-experts"] = case["experts"]
        switches = {
            "swiglu": case["gated"],
            "disable-bias-linear": not case["bias"],
            "untie-embeddings-and-output-weights": not case["tied"],
        }
        flags |= {name: True for name, on in switches.items() if on}
        sizes = layout("test", flags, case["tp"] * case["pp"])
        shard = model("test", flags, sizes).stage(case["stage"], sizes)
        assert shard.dense + shard.expert == real, case


def _work(stages: int = 2, **more: Any) -> Workload:
    """Of a model of a million parameters a stage, on 128 nodes of 4."""
    plain: dict[str, Any] = {
        "sizes": Layout(512, 1, stages, 1, 1, 1, 1),
        "model": Counted(stages * 10**6, stages * 10**6),
        "shards": (Shard(10**6, 0),) * stages,
        "activations": (5e6,) * stages,
        "operations": 1e20,
        **{"weight": 2, "gradient": 4, "state": 12, "own_state": 12, "divided": True},
    }
    return Workload(**(plain | more))


def test_each_stage_has_its_numbers_and_the_fullest_one_is_the_devices() -> None:
    run = load(str(LARGE))
    plan = budget(run, _work(shards=(Shard(10**6, 0), Shard(2 * 10**6, 10**6))))
    first, last = plan.stages
    assert (first.parameters, first.weights, first.gradients) == (10**6, 2e6, 4e6)
    # Experts, on every rank of a stage here, have as many replicas as all else.
    assert last.unique == last.optimizer == 12 * (-(-2 * 10**6 // 256) + -(-(10**6) // 256))
    assert plan.device - 4e9 == last.all == 6e6 + 12e6 + last.optimizer + 5e6
    assert plan.iteration_s == pytest.approx(1e20 / (512 * 312e12 * 0.45))
    of_flags = budget(run)
    assert sum(s.parameters for s in of_flags.stages) * 8 == pytest.approx(of_flags.model.parameters, rel=0.001)
    assert max(s.activations for s in of_flags.stages) == of_flags.activations


def test_frozen_parameters_are_kept_once_with_each_keeper_and_nothing_else_is_copied_of_them() -> None:
    run = load(str(LARGE))
    trained, frozen = budget(run, _work()), budget(run, _work(shards=(Shard(10**6, 0), Shard(10**6, 0, 10**6))))
    assert frozen.unique == trained.unique and frozen.sent_node == trained.sent_node
    assert frozen.vault_node - trained.vault_node == 2 * 8 * 2e6
    assert frozen.stages[1].weights == 4e6 and frozen.stages[1].gradients == 4e6
    assert frozen.spare_device == trained.spare_device + 2e6


def test_an_estimate_that_is_too_large_is_told_and_refuses_nothing() -> None:
    run = load(str(LARGE))
    with pytest.raises(PlanError, match="a device of stage 1 needs"):
        budget(run, _work(activations=(5e6, 90e9)))
    plan = budget(run, _work(activations=(5e6, 90e9), estimated=True, notes=("first",)))
    assert plan.warnings[0] == "first" and plan.warnings[1].startswith("a device of stage 1 needs 94.0 GB")


def test_more_spares_pay_the_more_often_nodes_fail_and_none_pays_where_none_fails(tmp_path: Path) -> None:
    def best(failures: float) -> int:
        return spares(_changed(tmp_path, {"failures": failures}).cluster, 30.0).best

    assert best(0.0) == 0
    assert 0 < best(6.5) < best(65.0)
    worth = spares(_changed(tmp_path, {"failures": 6.5}).cluster, 0.0)
    assert worth.hours_between == pytest.approx(1000 * 24 / 6.5 / 64)
    assert worth.break_even_hours == pytest.approx(worth.hours_between / 64)


def test_the_first_spare_pays_exactly_beyond_the_printed_cost(tmp_path: Path) -> None:
    limit = spares(_changed(tmp_path).cluster, 0.0).break_even_hours
    rare = {"checkpoint_minutes": 1e-6, "restart_minutes": 0.0}
    below = spares(_changed(tmp_path, {**rare, "replace_hours": limit * 0.99}).cluster, 0.0).goodput
    above = spares(_changed(tmp_path, {**rare, "replace_hours": limit * 1.05}).cluster, 0.0).goodput
    # The pool of one may be empty too, which the short formula leaves out.
    assert below[1] < below[0] and above[1] > above[0] * 0.999


# ---- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one node": ({"cluster": {"nodes": 1}}, "one node that trains has no peer"),
    "layout": ({"cluster": {"nodes": 63}}, "504 GPUs that train are not a multiple of TP 8 x PP 8"),
    "layers": ({"num_layers": 81}, "81 layers cannot be dealt out evenly"),
    "heads": ({"num_attention_heads": 60, "kv_channels": 128}, "num-attention-heads 60 is not a multiple of TP 8"),
    "batch": ({"global_batch_size": 1020}, "global-batch-size 1020 is not a multiple of micro-batch-size 1 x DP 8"),
    "device memory": ({"cluster": {"gpu_memory": 16}}, "needs 17.6 GB"),
    "activations": ({"micro_batch_size": 16}, "activations 91."),
    "vault": ({"cluster": {"host_memory": 64}}, "/dev/shm has 32.0"),
    "network": ({"cluster": {"network": 0.5}}, "sending to the peers takes"),
    "redundancy": ({"deadpool": {"redundancy": "4+70"}}, "redundancy"),
    "unsupported": ({"fp8_recipe": "custom"}, "--fp8-recipe is not supported"),
    "cluster's spelling": ({"cluster": {"gpu_memry": 80}}, "unknown field 'gpu_memry'; did you mean 'gpu_memory'?"),
    "setting's spelling": ({"deadpool": {"leese": 3}}, "unknown setting 'leese'; did you mean 'lease'?"),
    "an infinite wait": (
        {"cluster": {"replace_hours": float("inf")}},
        "replace_hours must be more than 0, and at most",
    ),
    "no number": ({"cluster": {"failures": float("nan")}}, "failures must be 0 or more, and at most 1e+09, not nan"),
    "too many devices": ({"cluster": {"nodes": 10**8}}, "devices are more than can be planned"),
    "a domain of nobody": ({"deadpool": {"domains": "0-67=r1"}}, "there is no node 67: the job has nodes 0 to 66"),
    "a word for a switch": ({"swiglu": "true"}, "swiglu is a switch: true (or leave it out), not 'true'"),
    "a setting without a value": ({"deadpool": {"durable_dir": None}}, "deadpool: durable_dir: give a value"),
    "a word for a size": (
        {"tensor_model_parallel_size": "eight"},
        "--tensor-model-parallel-size: expected a whole num",
    ),
    "a list for a size": ({"tensor_model_parallel_size": [8]}, "--tensor-model-parallel-size: expected a whole number"),
    "an infinite size": ({"tensor_model_parallel_size": float("inf")}, "expected a whole number, not inf"),
    "a mapping for a flag": ({"lr": {"a": 1}}, "lr: expected a value or a list of them, not {'a': 1}"),
    "words for numbers": ({"cluster": {"nodes": "many"}}, "nodes: expected a whole number, not 'many'"),
    "underscore": ({"cluster": {"utilisation": 45}}, "utilisation is a share"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_work_is_refused_with_the_reason_in_one_line(case: str, tmp_path: Path) -> None:
    changes, why = REFUSED[case]
    with pytest.raises(PlanError) as refused:
        budget(_changed(tmp_path, **changes))
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_no_run_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    twice = "cluster: {}\ncluster: {}"
    for text, why in ((twice, "line 2: 'cluster' stands"), ("a: 2026-31-12", "line 1: '2026-31-12'")):
        path.write_text(text)
        assert cli.main(["plan", "--config", str(path)]) == Exit.USAGE
        assert capsys.readouterr().err.startswith(f"deadpool: {path}: not YAML: {why}")
    for text, why in (("[1", "not YAML"), ("a: 1", "expected the sections"), ("cluster: {}\nmodel: {}", "'model'")):
        path.write_text(text)
        assert cli.main(["plan", "--config", str(path)]) == Exit.USAGE
        assert why in capsys.readouterr().err
    assert cli.main(["plan", "--config", str(tmp_path / "nowhere")]) == Exit.USAGE


def test_it_is_said_how_many_losses_of_each_domain_spares_cover(tmp_path: Path) -> None:
    """64 nodes train; 64 and 65 are spares."""
    domains = {"domains": "0-64=r1", "nvlink_domains": "0-31=n1,32-63=n2,64-65=n1"}
    plan = budget(_changed(tmp_path, deadpool=domains))
    said = "losses that spares of the same nvlink domain cover: n1 2, none of n2"
    assert plan.covered == [
        said,
        "losses that spares of the same rack domain cover: r1 1",
        "a whole nvlink lost at once, its spares too: not n1 (32 nodes, 1 spares elsewhere), n2 (32 nodes, 3 spares "
        "elsewhere)",
    ]
    assert not budget(load(str(LARGE))).covered


def test_the_command_prints_text_json_or_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", str(LARGE)]) == 0
    text = capsys.readouterr().out
    assert "65.3e9 parameters on 64 nodes of 8" in text and "pays for itself" in text and "tolerated at once" in text
    assert cli.main(["plan", "--config", str(LARGE), "--json", "--spare-nodes", "3"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(Budget.__slots__) <= set(numbers) and numbers["model"]["parameters"] > 65e9
    assert cli.main(["plan", "--config", str(LARGE), "--flags"]) == 0
    assert capsys.readouterr().out.split() == load(str(LARGE)).flags()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of --config and --recipe is required"),
        (["--config", "FILE", "model.seq_length=1"], "unrecognized arguments: model.seq_length=1"),
        (["--recipe", "some", "--verbos"], "unrecognized arguments: --verbos"),
        (["--recipe", "some", "--flags"], "--flags: a recipe of Megatron-Bridge has none"),
        (["--recipe", "some", "--nodes", "0"], "--nodes: must be 1 to 1000000000, not 0"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *words])
    assert ended.value.code == Exit.USAGE and capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_a_recipe_takes_the_cluster_of_a_file_and_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--recipe", "some", "--config", str(LARGE)]) == Exit.USAGE
    assert capsys.readouterr().err == f"deadpool: {LARGE}: megatron: the recipe says this: leave the section out\n"


@pytest.mark.skipif(find_spec("megatron.bridge") is not None, reason="Megatron-Bridge is in this environment")
def test_without_megatron_bridge_a_recipe_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--recipe", "llama3_8b_pretrain_config"]) == Exit.USAGE
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "install megatron-bridge" in said.err and not said.out


def test_the_numbers_are_json_and_finite_whatever_fails_how_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def strange(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for cluster in ({"failures": 0}, {"failures": 1e9, "replace_hours": 1e9}):
        run = _changed(tmp_path, cluster)
        assert cli.main(["plan", "--config", run.name, "--json"]) == 0
        worth = json.loads(capsys.readouterr().out, parse_constant=strange)["spares"]
        assert all(0 <= share <= 1 for share in worth["goodput"])
        assert (worth["hours_between"] is None) is (cluster["failures"] == 0)


# ---- the durable tier


def test_a_durable_directory_costs_a_copy_of_the_nodes_own_shards_beside_the_vault(tmp_path: Path) -> None:
    without = budget(_changed(tmp_path))
    with_it = budget(_changed(tmp_path, deadpool={"durable_dir": "/durable"}))
    assert without.drainer_node == 0 and with_it.vault_node == without.vault_node
    # mirrored: the vault has two slots of the own shards and two of the peer's
    assert with_it.drainer_node == pytest.approx(with_it.vault_node / 4)


def test_a_node_with_room_for_the_vault_alone_is_refused_with_the_durable_directory(tmp_path: Path) -> None:
    vault = budget(_changed(tmp_path)).vault_node / 1e9
    tight = {"host_memory": 1.1 * vault, "shared_memory": 1.05 * vault}
    budget(_changed(tmp_path, tight))
    with pytest.raises(PlanError, match=r"and its drainer \(durable_dir\) .* and the node has") as refused:
        budget(_changed(tmp_path, tight, {"durable_dir": "/durable"}))
    assert "\n" not in str(refused.value)


def test_a_spares_device_has_room_for_what_it_rehearses_or_the_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert budget(_changed(tmp_path)).rehearsals == 0
    plans = {k: budget(_changed(tmp_path, {"gpu_memory": 800}, {"rehearsals": k})) for k in (1, 2)}
    at_rest = plans[1].device - plans[1].activations
    assert plans[2].rehearsals - plans[1].rehearsals == pytest.approx(at_rest) and plans[1].rehearsals > plans[1].device
    run = _changed(tmp_path, {"gpu_memory": 800}, {"rehearsals": 2})
    assert cli.main(["plan", "--config", run.name]) == 0
    assert "GB of 800 GB of a device, 2 at rest and one that trains" in capsys.readouterr().out
    with pytest.raises(PlanError, match=r"rehearsals 9 needs .* rehearse fewer nodes"):
        budget(_changed(tmp_path, deadpool={"rehearsals": 9}))


def test_the_plan_says_what_processes_that_stand_by_take_and_refuses_what_does_not_fit_beside_the_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none, imports, device, whole = (
        budget(_changed(tmp_path, {"gpu_memory": 800}, {"standby_workers": level}))
        for level in ("none", "imports", "device", "coordinate")
    )
    assert none.standby_node == none.standby_device == imports.standby_device == 0 < imports.standby_node
    assert 0 < device.standby_device < whole.standby_device < whole.device
    run = _changed(tmp_path, {"gpu_memory": 800}, {"standby_workers": "imports"})
    assert cli.main(["plan", "--config", run.name]) == 0
    assert "of a node's host memory, nothing of a device (standby_workers imports)" in capsys.readouterr().out
    with pytest.raises(PlanError, match=r"standby_workers coordinate needs .* beside the .* of the worker"):
        budget(_changed(tmp_path, {"gpu_memory": whole.device / 1e9 + 1}, {"standby_workers": "coordinate"}))


def test_the_plan_counts_the_warm_server_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shrinks = {"when_out_of_spares": "shrink"}
    plans = [budget(_changed(tmp_path, deadpool=more)) for more in ({}, shrinks, shrinks | {"warm_server": "never"})]
    assert [plan.warm_node > 0 for plan in plans] == [False, True, False]
    run = _changed(tmp_path, deadpool={"warm_server": "always"})
    assert cli.main(["plan", "--config", run.name]) == 0
    assert "warm server of a node                about 1.50 GB of host memory" in capsys.readouterr().out
    vault = plans[1].vault_node / 1e9
    tight = {"host_memory": vault + 1, "shared_memory": vault + 1}
    with pytest.raises(PlanError, match=r"its warm server 1\.5, and the node has"):
        budget(_changed(tmp_path, tight, {"warm_server": "always"}))


def test_the_report_names_what_the_drainer_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _changed(tmp_path, deadpool={"durable_dir": "/durable"})
    for path, said in ((run.name, True), (str(LARGE), False)):
        assert cli.main(["plan", "--config", path]) == 0
        assert ("its drainer to the durable directory" in capsys.readouterr().out) is said


_SHRINKS = {"when_out_of_spares": "shrink"}


def test_a_run_that_may_become_narrower_is_told_how_far_its_memory_lets_it(tmp_path: Path) -> None:
    run = _changed(tmp_path, cluster={"gpu_memory": 23}, deadpool=_SHRINKS)
    plan = budget(run)
    widths = narrower(run, plan)
    fit = [each for each in widths if not each.why_not]
    assert [each.replicas for each in widths] == [*range(plan.sizes.dp - 1, plan.sizes.dp - 1 - len(widths), -1)]
    assert fit and widths[-1].why_not and len(widths) == len(fit) + 1, "down to the first that does not fit"
    replica = plan.sizes.world // plan.sizes.dp
    assert all(each.nodes * run.cluster.gpus_per_node == each.replicas * replica for each in widths)
    # Each device holds the optimizer's state of a larger part of its parameters, and nothing else grows.
    least = fit[-1]
    more = plan.optimizer * (plan.sizes.dp / least.replicas - 1)
    assert least.device - plan.device == pytest.approx(more, rel=1e-6)
    assert least.vault_node > plan.vault_node
    (line,) = [line for line in report.text(run, plan) if line.startswith("fewer replicas")]
    assert f"{least.replicas} or more fit" in line


def test_what_fewer_replicas_begin_with_has_to_fit_beside_their_vaults(tmp_path: Path) -> None:
    small = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 1, "num_layers": 4}
    run = _changed(tmp_path, cluster={"nodes": 4}, deadpool=_SHRINKS, **small)
    wide, (least, *_) = budget(run), narrower(run, budget(run))
    needs = least.vault_node + wide.vault_node / 2
    for shm, fits in ((needs + 1e6, True), (needs - 1e6, False)):
        tight = _changed(tmp_path, {"nodes": 4, "shared_memory": shm / 1e9}, _SHRINKS, **small)
        (first, *_) = narrower(tight, budget(tight))
        assert (first.why_not == "") is fits
    assert "of what the job begins with" in first.why_not


def test_a_run_that_fits_at_its_full_width_alone_says_so(tmp_path: Path) -> None:
    device = budget(_changed(tmp_path)).device / 1e9
    run = _changed(tmp_path, cluster={"gpu_memory": round(device + 0.01, 2)}, deadpool=_SHRINKS)
    (line,) = [line for line in report.text(run, budget(run)) if line.startswith("fewer replicas")]
    assert "none fit, so when_out_of_spares is save" in line and "a device of stage" in line


def test_one_node_that_holds_a_whole_replica_goes_on_alone(tmp_path: Path) -> None:
    small = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 1, "num_layers": 4}
    run = _changed(tmp_path, cluster={"nodes": 4}, deadpool=_SHRINKS, **small)
    assert [(each.replicas, each.nodes, each.why_not) for each in narrower(run, budget(run))] == [
        (3, 3, ""),
        (2, 2, ""),
        (1, 1, ""),
    ]


def test_widths_that_instances_of_the_distributed_optimizer_do_not_divide_are_none(tmp_path: Path) -> None:
    small = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 1, "num_layers": 4}
    run = _changed(tmp_path, {"nodes": 4}, _SHRINKS, **small, num_distributed_optimizer_instances=2)
    assert [each.replicas for each in narrower(run, budget(run))] == [2]


def test_spares_are_worth_less_where_the_job_goes_on_without_them(tmp_path: Path) -> None:
    cluster = _changed(tmp_path).cluster
    stops, shrinks = spares(cluster, 30.0), spares(cluster, 30.0, replicas=8)
    assert shrinks.cost_without_hours == 2 * cluster.restart_minutes / 60 + cluster.replace_hours / 8
    assert shrinks.goodput[0] > stops.goodput[0] and shrinks.best < stops.best
    run = _changed(tmp_path, deadpool=_SHRINKS)
    plan = budget(run)
    assert report.numbers(run, plan)["spares"]["best"] < report.numbers(_changed(tmp_path), plan)["spares"]["best"]


def test_a_run_that_does_not_shrink_has_one_width(tmp_path: Path) -> None:
    run = _changed(tmp_path)
    assert narrower(run, budget(run)) == []
