"""`deadpool check` judges a command line by the table of features; the docs show that table."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from deadpool_megatron import support
from deadpool_megatron.cli import main
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.compat import UserError
from deadpool_megatron.support import FEATURES, Evidence, check_arguments, not_on_a_gpu, parse, used
from evidence import RECORD, note

ROOT = Path(__file__).parents[2]
LLAMA = [
    *("pretrain_gpt.py", "--tensor-model-parallel-size", "8", "--sequence-parallel"),
    *("--pipeline-model-parallel-size", "4", "--num-layers-per-virtual-pipeline-stage", "5"),
    *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--bf16", "--lr", "1e-4"),
    *("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather"),
]


def _names(*flags: str) -> set[str]:
    return {each.name for each in used(parse(flags))}


def test_an_accepted_command_line_has_a_line_for_each_feature(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *LLAMA]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"accepted: {len(lines)} features that a swap must carry"
    assert {line.split("  ")[0] for line in lines} == {
        *("tensor parallelism", "sequence parallelism", "pipeline parallelism", "interleaved pipeline"),
        *("distributed optimizer", "overlapped gradient reduction", "overlapped parameter gather"),
        *("layers of Transformer Engine", "FP8 with current scaling", "parameters in FP8"),
    }
    assert all("run on the emulation: tests/" in line for line in lines)


def test_all_refused_flags_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--use-sharp", "--moe-flex-dispatcher-backend=ncclep", "--iterations-to-skip", "3", "4"]
    assert main(["check", *LLAMA, *flags]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "--moe-flex-dispatcher-backend ncclep",
        "--use-sharp",
        "--iterations-to-skip [3, 4]",
    ]


def test_what_a_process_draws_by_itself_is_refused_and_what_a_generation_carries_is_not() -> None:
    def refused(*flags: str) -> bool:
        return any(each.evidence is Evidence.REFUSED for each in used(parse(flags)))

    assert refused("--fim-data", "--fim-rate", "0.5") and not refused("--fim-rate", "0.5")
    assert refused("--moe-router-force-biased", "-0.5") and not refused("--moe-router-force-biased", "0.5")


def test_a_flag_that_nobody_has_looked_at_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["check", "my_script.py", "--replication", "--my-flag=3", "--lr", "1e-4", "--deadpool", "--rl-profile"])
        == 0
    )
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    assert [flag for flag, _, said in lines if said.startswith("nobody has looked")] == ["--replication", "--my-flag"]


def test_what_check_refuses_a_job_refuses_and_the_other_way_round() -> None:
    for each in {*FEATURES} - {*support.COMBINATIONS}:
        for value in (True, "ncclep", "custom", "soap", "local", 2, -0.5):
            if each.evidence is Evidence.REFUSED and each in used({each.attribute: value}):
                with pytest.raises(UserError, match=f"^{each.flag}"):
                    check_arguments({each.attribute: value})
                break
        else:
            assert each.evidence is not Evidence.REFUSED, each.flag


def test_values_are_read_as_megatrons_parser_gives_them() -> None:
    values = parse(["script.py", "--a-b", "1", "--c", "--d=x", "--e", "1", "two", "3", "--fp8-format", "hybrid"])
    assert {name: value for name, value in values.items() if name not in support.DEFAULTS} == {
        "a_b": 1,
        "c": True,
        "d": "x",
        "e": [1, "two", 3],
        "fp8": "hybrid",
    }


def test_defaults_and_what_says_nothing_by_itself() -> None:
    assert "layers of Transformer Engine" in _names("--lr", "1")
    assert "layers of Transformer Engine" not in _names("--transformer-impl", "local")
    assert "FP8 with delayed scaling" in _names("--fp8-format", "hybrid")
    assert not {name for name in _names("--fp8-recipe", "mxfp8", "--lr", "1") if "FP8" in name}
    assert "tensor parallelism" not in _names("--tensor-model-parallel-size", "1")
    assert "Lion, Muon" in _names("--optimizer", "muon")
    assert "Lion, Muon" not in _names("--optimizer", "adam")


def test_a_runs_file_is_judged_and_a_broken_one_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert main(["check", "--config", str(path)]) == 0, path
    assert main(["check", "--config", str(ROOT / "configs" / "7b_64.yaml"), "--use-sharp"]) == 1
    capsys.readouterr()
    assert main(["check", "--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"deadpool: {tmp_path}/none.yaml: No such file or directory\n"
    for words, said in ((["check"], "no flags"), (["check", "--yaml-cfg", "a.yaml"], "--yaml-cfg are not read here")):
        with pytest.raises(SystemExit) as usage:
            main(words)
        assert usage.value.code == 2
        assert said in capsys.readouterr().err


def test_flags_that_the_shell_has_kept_together_are_read_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "pretrain_gpt.py", "--lr 1e-4 --use-sharp # not here\n--fp8-recipe custom"]) == 1
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [
        " --fp8-recipe custom",
        " --use-sharp",
    ]


def test_a_value_with_a_blank_in_it_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = "/data/a --use-sharp's"
    assert main(["check", "--data-path", hidden, "--lr", "1"]) == 0
    run = tmp_path / "run.yaml"
    run.write_text(
        (ROOT / "configs" / "7b_64.yaml").read_text().replace("  mock-data: true", f'  data-path: "{hidden}"')
    )
    assert main(["check", "--config", str(run)]) == 0
    assert main(["check", "--lr 1 --use-sharp"]) == main(["check", "a.py --use-sharp"]) == 1
    capsys.readouterr()
    assert main(["check", "a.py", "--lr '1"]) == 2
    assert capsys.readouterr().err == "deadpool: --lr '1: no closing quotation\n"


def test_a_size_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = "--tensor-model-parallel-size"
    for words, shown in (([size, "eight"], "'eight'"), ([size, "8", "9"], "[8, 9]"), ([size], "True")):
        assert main(["check", "--tp-comm-overlap", *words]) == 2
        assert capsys.readouterr().err == f"deadpool: {size}: expected a whole number, not {shown}\n"


def test_every_evidence_names_a_test_that_uses_the_flag() -> None:
    shared = (ROOT / "tests" / "flags.py").read_text()
    for each in FEATURES:
        if each.evidence is not Evidence.EMULATION:
            assert each.because, each
            continue
        text = (ROOT / each.because).read_text() + shared
        default = each.attribute in support.DEFAULTS and "default_gpt" in text
        assert default or all(word in text for word in each.flag.split()), each


FLEX = ("--moe-token-dispatcher-type", "flex", "--num-experts", "64", "--tensor-model-parallel-size", "2")


@pytest.mark.parametrize(
    ("processes", "flags", "inside"),
    [
        ([], ("--expert-model-parallel-size", "4"), True),  # two tensor-parallel ranks an expert: 8 processes
        ([], ("--expert-model-parallel-size", "8"), False),
        ([], ("--expert-model-parallel-size", "8", "--expert-tensor-parallel-size", "1"), True),
        (["--nproc-per-node", "4"], ("--expert-model-parallel-size", "4"), False),
        (["--nproc-per-node", "6"], ("--expert-model-parallel-size", "2"), False),  # groups of 4 on nodes of 6
        (["--nproc-per-node", "72"], ("--expert-model-parallel-size", "36"), True),
    ],
)
def test_kernels_that_wait_for_other_nodes_are_told_from_those_that_do_not(
    processes: list[str], flags: tuple[str, ...], inside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *processes, *FLEX, *flags]) == 0
    said = capsys.readouterr().out
    assert "tokens by DeepEP or HybridEP " in said
    assert ("tokens by DeepEP or HybridEP, across nodes" not in said) is inside
    number = int(processes[1]) if processes else support.PROCESSES_PER_NODE
    values = parse([*FLEX, *flags])
    assert support.waits_for_nodes(values, number) is not inside
    check_arguments(values, number)
    with contextlib.nullcontext() if inside else pytest.raises(UserError, match="use deadpool launch"):
        check_arguments(values, number, adopted=True)


@pytest.mark.parametrize(
    ("processes", "tensor", "accepted"), [(8, 8, True), (4, 8, False), (4, 2, True), (6, 4, False)]
)
def test_userbuffers_have_to_stay_inside_of_a_node(
    processes: int, tensor: int, accepted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tp-comm-overlap", "--sequence-parallel", "--tensor-model-parallel-size", str(tensor)]
    assert main(["check", "--nproc-per-node", str(processes), *flags]) == (0 if accepted else 1)
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused")]
    assert accepted or (len(refused) == 1 and "--tp-comm-overlap" in refused[0] and "spans nodes" in refused[0])


def test_activations_are_not_offloaded_within_graphs() -> None:
    def refused(*flags: str) -> bool:
        offloading = used(parse(["--fine-grained-activation-offloading", *flags]))
        return any(each.evidence is Evidence.REFUSED for each in offloading)

    assert refused("--cuda-graph-impl", "transformer_engine") and refused("--cuda-graph-impl", "full_iteration")
    assert not refused() and not refused("--cuda-graph-impl", "none")
    router = ("--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn", "moe_router")
    assert not refused(*router, "--offload-modules", "expert_fc1", "moe_act")
    assert refused(*router, "--offload-modules", "expert_fc1", "core_attn")
    assert refused("--cuda-graph-impl", "full_iteration", "--offload-modules", "expert_fc1")


def test_no_graph_has_a_dispatcher_in_it_for_which_the_host_waits() -> None:
    def refused(*flags: str, backend: str = "deepep") -> bool:
        values = parse([*FLEX, "--expert-model-parallel-size", "2", "--moe-flex-dispatcher-backend", backend, *flags])
        return any("DeepEP inside of the graphs" in each.because for each in used(values))

    assert refused("--cuda-graph-impl", "full_iteration")
    assert not refused("--cuda-graph-impl", "full_iteration", backend="hybridep")
    assert not refused() and not refused("--cuda-graph-impl", "none")
    for flag in ("--cuda-graph-scope", "--cuda-graph-modules"):
        assert not refused("--cuda-graph-impl", "transformer_engine", flag, "attn", "moe_router")
        assert refused("--cuda-graph-impl", "transformer_engine", flag, "moe", "attn")


def test_attention_in_fp8_is_judged_by_the_recipe() -> None:
    def refused(*flags: str) -> bool:
        values = parse(["--fp8-dot-product-attention", *flags])
        return any(each.evidence is Evidence.REFUSED for each in used(values))

    assert not refused() and not refused("--fp8-format", "e4m3", "--fp8-recipe", "mxfp8")
    assert refused("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise") and refused("--fp4-format", "e2m1")


def test_graphs_have_older_names() -> None:
    def names(*flags: str) -> list[str]:
        return [each.name or each.because for each in used(parse(flags)) if "--cuda-graph" in each.flag]

    want = names("--cuda-graph-impl", "full_iteration")
    assert want == ["CUDA graphs of whole iterations"]
    assert names("--cuda-graph-impl", "local", "--cuda-graph-scope", "full_iteration") == want
    assert names("--cuda-graph-impl", "local", "--cuda-graph-scope", "attn") != want
    assert names("--external-cuda-graph") == ["CUDA graphs of layers"]
    assert names("--enable-cuda-graph") == names("--cuda-graph-impl", "local") != []


@pytest.mark.parametrize(
    ("flags", "accepted"),
    [
        (["transformer_engine", "--cuda-graph-modules", "attn"], True),
        (["transformer_engine"], True),
        (["local"], False),
        (["transformer_engine", "--context-parallel-size", "2"], False),
        (["transformer_engine", "--context-parallel-size", "2", "--attention-dropout", "0.0"], True),
        (["transformer_engine", "--context-parallel-size", "2", "--cuda-graph-modules", "moe_router"], True),
        (["full_iteration", "--context-parallel-size", "2"], True),
    ],
)
def test_graphs_of_layers_are_judged_by_what_is_in_them(
    flags: list[str], accepted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--cuda-graph-impl", *flags]) == (0 if accepted else 1)
    said = capsys.readouterr().out
    assert ("refused" in said and "--cuda-graph-impl" in said) is not accepted


@pytest.mark.parametrize(
    ("flags", "accepted"),
    [
        ((), True),
        (("--fp8-format", "hybrid"), False),  # delayed is upstream's default
        (("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"), True),
        (("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--sequence-parallel"), False),
        (("--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", "--sequence-parallel"), True),
        (("--fp4-format", "e2m1"), True),
        (("--fp4-format", "e2m1", "--sequence-parallel"), False),
    ],
)
def test_the_operation_fuser_is_refused_where_it_keeps_what_scales_come_from(
    flags: tuple[str, ...], accepted: bool
) -> None:
    assert main(["check", "--use-transformer-engine-op-fuser", *flags]) == (0 if accepted else 1)


def test_a_runs_file_knows_how_big_its_nodes_are(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "configs" / "65b_a100_128x4.yaml")
    flags = ["--moe-token-dispatcher-type", "flex", "--num-experts", "8", "--expert-tensor-parallel-size", "1"]
    assert main(["check", "--config", file, *flags, "--expert-model-parallel-size", "8"]) == 0
    assert "across nodes" in capsys.readouterr().out
    assert main(["check", "--config", file, *flags, "--expert-model-parallel-size", "4"]) == 0
    assert "across nodes" not in capsys.readouterr().out


def test_what_has_not_been_run_on_a_gpu_is_told() -> None:
    assert not_on_a_gpu({"tensor_model_parallel_size": 2, "fp8": None, "fp8_recipe": "delayed"}, 8) == [
        "tensor parallelism"
    ]
    assert not_on_a_gpu({"tensor_model_parallel_size": 1}, 8) == []


def test_the_docs_have_the_table() -> None:
    text = (ROOT / "docs" / "support.md").read_text()
    table = support.table(json.loads(RECORD.read_text()))
    assert table in text, "deadpool check --table has changed: put it into docs/support.md"


def test_no_feature_claims_a_run_that_was_not_recorded() -> None:
    recorded = json.loads(RECORD.read_text())
    assert recorded.keys() <= {each.name for each in FEATURES}
    for each in FEATURES:
        if each.evidence is Evidence.EMULATION:
            assert any(test.startswith(f"{each.because}::") for test in recorded.get(each.name, ())), (
                f"{each.name}: scripts/test.sh --evidence -m 'slow or not slow' {each.because} has not shown it"
            )
    for test in {test for tests in recorded.values() for test in tests}:
        path, name = test.partition("[")[0].split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), f"{test} is recorded, and is no more"


def test_what_a_test_has_shown_is_recorded_and_taken_back_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    one = ["--transformer-impl", "local", "--tensor-model-parallel-size", "2"], 1
    other = ["--optimizer", "muon"], 1
    note("a.py::one", [one], path)
    note("a.py::both", [one, other], path)
    assert json.loads(path.read_text()) == {
        "Lion, Muon": ["a.py::both"],
        "layers of Transformer Engine": ["a.py::both"],
        "tensor parallelism": ["a.py::both", "a.py::one"],
    }
    note("a.py::both", [], path)
    assert json.loads(path.read_text()) == {"tensor parallelism": ["a.py::one"]}


def test_it_imports_nothing_of_megatron_or_torch() -> None:
    code = (
        "import sys; from deadpool_megatron.cli import main; code = main(['check', '--bf16']);"
        "assert not {'torch', 'megatron', 'transformer_engine'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("megatron.bridge") is not None, reason="Megatron-Bridge is here: tests/integration")
@pytest.mark.parametrize("words", [["--recipe", "llama3_8b_pretrain_config"], ["--recipes"]])
def test_a_recipe_without_megatron_bridge_is_answered_in_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words]) == Exit.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("deadpool: Megatron-Bridge is not in this environment: install megatron-bridge")
