"""What the launcher and the workers refuse before anything is built, each with one line that says what to do."""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

import pytest

from deadpool_megatron.compat import SUPPORTED, UserError, check_version
from deadpool_megatron.config import ConfigError
from deadpool_megatron.launcher import local as launch
from deadpool_megatron.launcher import plan as checks
from deadpool_megatron.launcher.plan import LaunchError, LaunchPlan
from deadpool_megatron.launcher.processes import agent_settings


def check(options: argparse.Namespace) -> LaunchPlan:
    return checks.check(options, options.local_nodes, "--local-nodes", launch.LOCALHOST)


def plan(tmp_path: Path, options: str, script: str = "") -> LaunchPlan:
    (tmp_path / "train.py").write_text("")
    parser = argparse.ArgumentParser()
    launch.add_launch_arguments(parser)
    return check(parser.parse_args([*options.split(), str(tmp_path / "train.py"), *script.split()]))


REFUSED = {
    "no worker": ("--nproc-per-node 0", "", "--nproc-per-node 0: at least 1 worker"),
    "workers in other digits": ("--nproc-per-node ٢", "", "--nproc-per-node ٢: not a whole number"),
    "workers in words": ("--nproc_per_node two", "", "--nproc-per-node two: not a whole number"),
    "no such module": ("-m", "", "there is no such module here"),
    "only spares": ("--local-nodes 3 --spare-nodes 3", "--deadpool", "--spare-nodes 3 leaves no node to train"),
    "spares for nothing": ("--local-nodes 3 --spare-nodes 1", "", "--spare-nodes 1 needs --deadpool"),
    "one active node": ("--local-nodes 2 --spare-nodes 1", "--deadpool", "one active node has no peer"),
    "indivisible": (
        "--local-nodes 3 --nproc-per-node 2",
        "--deadpool --tensor-model-parallel-size 4",
        "6 active ranks (3 nodes of 2) are not a multiple of --tensor-model-parallel-size 4",
    ),
    "indivisible, with equals sign": (
        "--local-nodes 3",
        "--pipeline-model-parallel-size=2 --tensor-model-parallel-size=1",
        "--pipeline-model-parallel-size 2",
    ),
    "size zero": ("--local-nodes 2", "--tensor-model-parallel-size 0", "are not a multiple"),
    "size in words": ("--local-nodes 2", "--tensor-model-parallel-size two", "two: not a whole number"),
    "settings without the switch": ("--local-nodes 2", "--deadpool-lease 3", "--deadpool-lease has no effect without"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    options, script, why = REFUSED[case]
    with pytest.raises(LaunchError) as refused:
        plan(tmp_path, options, script)
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_the_spellings_of_torchrun_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(tmp_path, "--standalone --nnodes 1 --nproc_per_node 2 --local-nodes 2")
    assert (made.nodes, made.slots_per_node, made.module) == (2, 2, "")
    package = tmp_path / "recipes"
    package.mkdir()
    for name in ("__init__", "__main__", "gpt"):
        (package / f"{name}.py").write_text("")
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    launch.add_launch_arguments(parser)
    for module, file in (("recipes.gpt", "gpt.py"), ("recipes", "__main__.py")):
        made = check(parser.parse_args(["--local-nodes", "2", "-m", module, "--lr", "1"]))
        assert made.script == str(package / file) and made.command == ["-m", module, "--lr", "1"]


def test_several_machines_are_not_for_launch(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    launch.add_launch_arguments(parser)
    assert launch.run(parser.parse_args(["--nnodes", "2", "train.py"])) == 2
    assert "on several run `deadpool agent` on each" in capsys.readouterr().err


def test_a_script_that_is_not_there_is_named(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    launch.add_launch_arguments(parser)
    with pytest.raises(LaunchError, match=r"script nowhere\.py does not exist"):
        check(parser.parse_args(["nowhere.py"]))


def test_what_can_work_becomes_a_plan(tmp_path: Path) -> None:
    made = plan(
        tmp_path,
        "--local-nodes 5 --spare-nodes 1 --nproc-per-node 2 --emulate-cpu",
        "--deadpool --deadpool-lease 3 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --bf16",
    )
    assert (made.nodes, made.spare_nodes, made.slots_per_node, made.emulate_cpu) == (5, 1, 2, True)
    assert made.config.deadpool and made.config.lease == 3.0
    assert Path(made.script).is_absolute() and made.arguments[-1] == "--bf16"


def test_of_a_size_given_twice_the_last_one_counts_as_it_does_for_megatron(tmp_path: Path) -> None:
    sizes = "--tensor-model-parallel-size 4 --tensor-model-parallel-size 2"
    assert plan(tmp_path, "--local-nodes 2", sizes).nodes == 2
    with pytest.raises(LaunchError):
        plan(tmp_path, "--local-nodes 2", "--tensor-model-parallel-size 2 --tensor-model-parallel-size=4")


def test_an_unknown_deadpool_flag_is_refused_and_the_nearest_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown flag --deadpool-leese; did you mean --deadpool-lease\?"):
        plan(tmp_path, "--local-nodes 2", "--deadpool --deadpool-leese 3")


@pytest.mark.parametrize("value", ["soon", "-1", "0"])
def test_a_bad_value_is_refused_by_its_flag(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="--deadpool-lease"):
        plan(tmp_path, "--local-nodes 2", f"--deadpool --deadpool-lease={value}")


def test_a_megatron_that_is_not_supported_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.12.1")
    with pytest.raises(UserError, match=r"megatron-core 0\.12\.1 is not supported.*0\.19\.x.*install"):
        plan(tmp_path, "--local-nodes 2", "--deadpool")
    assert plan(tmp_path, "--local-nodes 2").nodes == 2, "without DeadPool any version will do"


def test_a_megatron_checkout_without_a_wheel_is_left_to_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert plan(tmp_path, "--local-nodes 2", "--deadpool").config.deadpool


def test_a_checkout_beside_the_script_comes_before_an_unsupported_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.12.1")
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    assert plan(tmp_path, "--local-nodes 2", "--deadpool").config.deadpool


@pytest.mark.parametrize("version", ["0.17.1", "0.190.0", "0.1", "1.19.0", ""])
def test_versions_outside_of_the_supported_lines_are_refused(version: str) -> None:
    with pytest.raises(UserError):
        check_version(version)


@pytest.mark.parametrize("line", SUPPORTED)
def test_every_release_of_a_supported_line_is_taken(line: str) -> None:
    for version in (line, f"{line}.0", f"{line}.2", f"{line}.0rc1"):
        check_version(version)


# ---- flags of Megatron that no swap can carry


def _unsupported() -> list[tuple[str, str]]:
    pytest.importorskip("megatron.core")
    from deadpool_megatron import support

    refused = {each for each in support.FEATURES if each.evidence is support.Evidence.REFUSED}
    return sorted((each.flag, each.attribute) for each in refused - {*support.COMBINATIONS})


BAD_VALUES: dict[str, list[object]] = {
    "cuda_graph_impl": ["local"],
    "optimizer": ["soap", "adaptive_muon"],
    "experimental_attention_variant": ["gdn2"],
    "moe_flex_dispatcher_backend": ["ncclep"],
    "fp8_recipe": ["custom"],
    "fp4_recipe": ["custom"],
    "iterations_to_skip": [[3]],
    "pipeline_model_parallel_comm_backend": ["ucc"],
    "symmetric_ar_type": ["two_shot"],
    "gtp_weight_remat_size": [2],
    "expert_gtp_weight_remat_size": [4],
    "moe_router_force_biased": [-0.5],
}
GOOD_VALUES: dict[str, list[object]] = {
    "cuda_graph_impl": [None, "none", "full_iteration", "transformer_engine"],
    "optimizer": ["adam", "sgd", "muon"],
    "experimental_attention_variant": ["dsa", "gated_delta_net", "gdn", None],
    "moe_flex_dispatcher_backend": ["deepep", "hybridep", None],
    "fp8_recipe": ["delayed", "tensorwise", "blockwise", "mxfp8", None],
    "fp4_recipe": ["nvfp4", None],
    "iterations_to_skip": [[], None],
    "moe_router_force_biased": [0.5, None],
    "pipeline_model_parallel_comm_backend": [None, "nccl"],
    "cpu_offloading_num_layers": [0],
    "gtp_weight_remat_size": [1, None],
    "expert_gtp_weight_remat_size": [1, None],
}


@pytest.mark.parametrize(("flag", "name"), _unsupported())
def test_a_mode_that_is_not_supported_is_refused_by_its_flag(flag: str, name: str) -> None:
    from deadpool_megatron.support import check_arguments

    for value in BAD_VALUES.get(name, [True]):
        with pytest.raises(UserError) as refused:
            check_arguments({name: value})
        said = str(refused.value)
        assert said.startswith(flag) and "not supported with --deadpool" in said and "\n" not in said
        assert value is True or str(value) in said
    for value in GOOD_VALUES.get(name, [False, None]):
        check_arguments({name: value})


def test_all_modes_that_are_not_supported_are_named_at_once() -> None:
    from deadpool_megatron.support import check_arguments

    with pytest.raises(UserError, match=r"^--fp8-recipe \(here: custom\), --use-sharp are not"):
        check_arguments({"fp8_recipe": "custom", "use_sharp": True})


@pytest.mark.parametrize("name", ["TORCH_DIST_USE_NCCL2", "TORCH_DISTRIBUTED_USE_TORCHCOMMS"])
def test_process_groups_of_another_kind_are_refused_by_the_variable_that_selects_them(name: str) -> None:
    from deadpool_megatron.support import check_environment

    for value in ("1", "true"):
        with pytest.raises(UserError) as refused:
            check_environment({name: value, "PATH": "/bin"})
        said = str(refused.value)
        assert said.startswith(f"{name}={value} is not supported with --deadpool: ") and "\n" not in said
    for environ in ({}, {name: "0"}, {name: ""}):
        check_environment(environ)


def test_every_refused_flag_is_one_that_megatron_knows() -> None:
    """A misspelt attribute would never refuse anything."""
    training = pytest.importorskip("megatron.training.arguments")
    known = {action.dest for action in training.add_megatron_arguments(argparse.ArgumentParser())._actions}
    derived = {"gtp_weight_remat_size", "expert_gtp_weight_remat_size"}  # by Megatron's main, from flags of other names
    unknown = {name for _, name in _unsupported()} - known - derived
    assert not unknown
    parser = training.add_megatron_arguments(argparse.ArgumentParser())
    by_flag = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    others = {flag: name for flag, name in _unsupported() if name not in derived and by_flag.get(flag) != name}
    assert others == {}


def test_an_agent_is_pinned_where_it_has_a_machine_of_its_own_and_nobody_objects(tmp_path: Path) -> None:
    def pins(host: str, flags: str) -> bool:
        made = plan(tmp_path, "--local-nodes 2", flags)
        pin = agent_settings(made, 0, "job", b"secret", (host, 1), 2, host).pin
        return pin

    assert pins("10.1.2.3", "--deadpool")
    assert not pins("127.0.0.2", "--deadpool")  # the nodes share this machine, and would choose the same processors
    assert not pins("10.1.2.3", "--deadpool --no-deadpool-pin-agents")
    assert not pins("10.1.2.3", "")


@pytest.mark.versions(megatron=True)
def test_every_flag_of_megatron_has_been_judged() -> None:
    pytest.importorskip("megatron.core")
    from megatron.training.arguments import add_megatron_arguments

    from deadpool_megatron import support

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    text = (Path(support.__file__).with_name("judged.txt")).read_text()
    unjudged = {word for word in text.partition(support.UNJUDGED)[2].split() if word.startswith("--")}
    flags = {word for action in parser._actions for word in action.option_strings if word.startswith("--")}
    assert not unjudged & {each.flag.split()[0] for each in support.FEATURES}
    # A new version of Megatron has new flags: read what they do, then put them there, or into the table.
    assert set(support.not_looked_at(flags)) == unjudged & flags
