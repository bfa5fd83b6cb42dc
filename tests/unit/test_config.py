"""A setting means the same wherever it is given, and a wrong one is answered in one line that helps."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadpool_megatron.config import (
    OTHER_VARIABLES,
    ConfigError,
    DeadpoolConfig,
    add_arguments,
    carry_over,
    from_script_arguments,
    resolve,
    schema,
    unit,
    variable,
)
from deadpool_megatron.yaml_file import read_yaml


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for f in fields(DeadpoolConfig):
        monkeypatch.delenv("DEADPOOL_" + f.name.upper(), raising=False)
    monkeypatch.delenv("DEADPOOL", raising=False)
    monkeypatch.delenv("DEADPOOL_CONFIG", raising=False)


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "deadpool.yaml"
    path.write_text(text)
    return str(path)


def refusal(*arguments: str) -> str:
    """The message for these script arguments, which must be one line."""
    with pytest.raises(ConfigError) as info:
        from_script_arguments(arguments)
    message = str(info.value)
    assert "\n" not in message
    return message


# Precedence


def test_without_any_setting_the_defaults_hold_and_deadpool_is_off() -> None:
    assert resolve({}, {}) == DeadpoolConfig()
    assert not from_script_arguments(["--num-layers", "4"]).deadpool


def test_flag_beats_environment_beats_yaml_beats_default(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "lease: 2\nsnapshot_interval: 2\nslice_bytes: 8192\n")
    environ = {"DEADPOOL_LEASE": "3", "DEADPOOL_SNAPSHOT_INTERVAL": "3"}
    config = resolve({"deadpool_config": path, "deadpool_lease": 4.0, "deadpool_slice_bytes": None}, environ)
    assert config.lease == 4.0
    assert config.snapshot_interval == 3
    assert config.slice_bytes == 8192
    assert config.form_deadline == DeadpoolConfig().form_deadline


def test_a_flag_that_equals_the_default_still_beats_the_rest(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "lease: 2\n")
    config = from_script_arguments(["--deadpool-config", path, "--deadpool-lease", str(DeadpoolConfig().lease)])
    assert config == DeadpoolConfig()


def test_the_yaml_file_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADPOOL_CONFIG", yaml_file(tmp_path, "deadpool: yes\ntransport: tcp\n"))
    assert from_script_arguments([]) == DeadpoolConfig(deadpool=True, transport="tcp")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("yes", True), ("ON", True), ("0", False), ("false", False)])
def test_the_environment_switches_deadpool_on_and_off(text: str, value: bool) -> None:
    assert resolve({}, {"DEADPOOL": text}).deadpool is value


def test_megatrons_own_parser_takes_every_setting() -> None:
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--num-layers", type=int)
    namespace = parser.parse_args(["--num-layers", "4", "--deadpool", "--deadpool-lease", "1.5"])
    assert resolve(vars(namespace)) == DeadpoolConfig(deadpool=True, lease=1.5)
    helped = parser.format_help()
    for f in fields(DeadpoolConfig):
        name = f.name.replace("_", "-")
        assert name == "deadpool" or f"--deadpool-{name}" in helped


def test_settings_are_found_among_the_scripts_own_arguments() -> None:
    arguments = ["--lr", "1e-3", "--deadpool", "--train-iters", "6", "--deadpool-transport=tcp", "positional"]
    assert from_script_arguments(arguments) == DeadpoolConfig(deadpool=True, transport="tcp")


def test_every_number_says_its_unit_and_every_setting_its_default_in_the_help() -> None:
    helped = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    for f in fields(DeadpoolConfig):
        if type(f.default) in (int, float):
            assert unit(f), f"the help of {f.name} names no unit"
            assert f"--deadpool-{f.name.replace('_', '-')} {unit(f).upper()}" in helped
        assert f.metadata["help"] in helped and "(default: " in helped


def test_a_parser_that_has_the_group_already_is_left_alone() -> None:
    # A patched Megatron under `deadpool launch` asks twice.
    parser = add_arguments(add_arguments(argparse.ArgumentParser()))
    assert parser.parse_args(["--deadpool"]).deadpool is True


# Megatron's own --yaml-cfg


def test_the_section_of_megatrons_yaml_file_counts_where_no_file_of_ours_is_named(tmp_path: Path) -> None:
    megatron = tmp_path / "model.yaml"
    megatron.write_text("micro_batch_size: 1\ndeadpool:\n  deadpool: yes\n  lease: 2\n")
    arguments = ["--yaml-cfg", str(megatron), "--deadpool-snapshot-interval", "3"]
    assert from_script_arguments(arguments) == DeadpoolConfig(deadpool=True, lease=2.0, snapshot_interval=3)
    ours = yaml_file(tmp_path, "lease: 4\n")
    assert from_script_arguments([*arguments, "--deadpool-config", ours]).lease == 4.0
    megatron.write_text("micro_batch_size: 1\n")
    assert from_script_arguments(arguments) == DeadpoolConfig(snapshot_interval=3)
    megatron.write_text("deadpool:\n  leese: 2\n")
    assert refusal(*arguments) == (f"--yaml-cfg {megatron}: deadpool: unknown setting 'leese'; did you mean 'lease'?")


def test_settings_survive_a_namespace_that_replaces_the_parsed_one() -> None:
    namespace = argparse.Namespace(micro_batch_size=1, deadpool=argparse.Namespace(lease=2.0))
    config = DeadpoolConfig(deadpool=True, lease=2.0)
    carry_over(config, namespace)
    assert resolve(vars(namespace)) == config and namespace.micro_batch_size == 1


# The schema


def test_the_schema_knows_every_setting_with_type_default_and_choices() -> None:
    properties = schema()["properties"]
    assert list(properties) == [f.name for f in fields(DeadpoolConfig)]
    assert properties["lease"] == {"type": "number", "default": 5.0, "description": properties["lease"]["description"]}
    assert properties["transport"]["enum"] == ["auto", "tcp", "nixl"]
    assert schema()["additionalProperties"] is False


# Round trip

_seconds = st.floats(0.001, 1e6, allow_nan=False)


@st.composite
def configurations(draw: st.DrawFn) -> DeadpoolConfig:
    """Any configuration that is allowed."""
    lease, abort, build = sorted(draw(st.lists(_seconds, min_size=3, max_size=3, unique=True)))
    return DeadpoolConfig(
        deadpool=draw(st.booleans()),
        state_hash=draw(st.sampled_from(["", "hash.json", "/a b/hash.json"])),
        transport=draw(st.sampled_from(["auto", "tcp", "nixl"])),
        lease=lease,
        abort_deadline=abort,
        build_deadline=build,
        form_deadline=draw(_seconds),
        operation_timeout=draw(_seconds),
        snapshot_interval=draw(st.integers(1, 1000)),
        slice_bytes=draw(st.integers(4096, 1 << 40)),
        transient_retries=draw(st.integers(0, 9)),
    )


@settings(deadline=None)  # a busy machine is no failure
@given(configurations())
def test_a_configuration_written_as_flags_is_read_back_equal(config: DeadpoolConfig) -> None:
    assert from_script_arguments(["--num-layers", "4", *config.flags()]) == config


@settings(deadline=None)
@given(configurations())
def test_a_configuration_goes_to_other_processes_as_json(config: DeadpoolConfig) -> None:
    assert msgspec.json.decode(msgspec.json.encode(config), type=DeadpoolConfig) == config


def test_flags_hold_only_what_differs_from_the_defaults() -> None:
    assert DeadpoolConfig().flags() == []
    assert DeadpoolConfig(deadpool=True, lease=2.0).flags() == ["--deadpool", "--deadpool-lease", "2.0"]


# Refusals


def test_an_unknown_flag_names_the_nearest_right_one() -> None:
    assert refusal("--deadpool-leese", "3") == "unknown flag --deadpool-leese; did you mean --deadpool-lease?"
    assert "--deadpool-slice-bytes" in refusal("--deadpool-slice-byte=8192")


def test_a_flag_is_never_abbreviated() -> None:
    # What is short today may be ambiguous with the next setting.
    assert "--deadpool-snap" in refusal("--deadpool-snap", "2")


def test_an_unknown_variable_names_the_nearest_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADPOOL_LEESE", "3")
    assert refusal() == "unknown environment variable DEADPOOL_LEESE; did you mean DEADPOOL_LEASE?"


def test_every_variable_of_the_package_is_a_known_one() -> None:
    written: set[str] = set()
    for path in (Path(__file__).parents[2] / "deadpool_megatron").rglob("*.py"):
        written |= set(re.findall(r'"(DEADPOOL(?:_[A-Z]+)*)"', path.read_text()))
    known = {variable(f) for f in fields(DeadpoolConfig)} | set(OTHER_VARIABLES)
    assert written and written <= known, f"not in config.OTHER_VARIABLES: {sorted(written - known)}"


def test_an_unknown_key_in_the_file_names_the_file_and_the_nearest_right_one(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "snapshot_intervall: 2\n")
    assert (
        refusal("--deadpool-config", path)
        == f"--deadpool-config {path}: unknown setting 'snapshot_intervall'; did you mean 'snapshot_interval'?"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--deadpool-lease", "soon"], "--deadpool-lease"),
        (["--deadpool-snapshot-interval", "2.5"], "--deadpool-snapshot-interval"),
        (["--deadpool-transport", "mpi"], "tcp"),
        (["--deadpool-lease"], "--deadpool-lease"),
        (["--deadpool-lease", "0"], "more than 0 seconds"),
        (["--deadpool-lease", "-1"], "more than 0 seconds"),
        (["--deadpool-lease", "30"], "shorter than --deadpool-abort-deadline (30 s)"),
        (["--deadpool-abort-deadline", "700"], "--deadpool-build-deadline (600 s)"),
        (["--deadpool-snapshot-interval", "0"], "1 or more iterations"),
        (["--deadpool-slice-bytes", "1"], "4096 or more bytes"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(arguments: list[str], said: str) -> None:
    assert said in refusal(*arguments)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DEADPOOL", "maybe", "'maybe' is not yes or no"),
        ("DEADPOOL_LEASE", "soon", "expected a number"),
        ("DEADPOOL_SLICE_BYTES", "4M", "expected a whole number"),
        ("DEADPOOL_TRANSPORT", "mpi", "auto, tcp"),
    ],
)
def test_a_bad_variable_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = refusal()
    assert message.startswith(variable + ": ")
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lease: soon\n", "lease: expected a number, not 'soon'"),
        ("lease: null\n", "lease: expected a number"),
        ("durable_dir:\n", "durable_dir: expected text, not nothing (leave the line out for the default)"),
        ("export:\n", "export: expected text, not nothing"),
        ("durable_dir: [a, b]\n", "durable_dir: expected text, not ['a', 'b']"),
        ("run_dir: {a: b}\n", "run_dir: expected text, not {'a': 'b'}"),
        ("deadpool:\n", "deadpool: nothing (leave the line out for the default) is not yes or no"),
        ("slice_bytes: true\n", "slice_bytes: expected a whole number"),
        ("transport: mpi\n", "'mpi' is not one of auto"),
        ("- lease\n", "expected a mapping of settings"),
        ("", "expected a mapping of settings"),
        ("lease: [\n", "not YAML: line 2: expected the node content, but found '<stream end>'"),
        ("lease: 2\n\tlease: 3\n", "not YAML: line 2: found character '\\t' that cannot start any token"),
        ("lease: 2\nrun_dir: x\nlease: 3\n", "not YAML: line 3: 'lease' stands there for the second time"),
        ("lease: 2\nrun_dir: 2026-31-12\n", "not YAML: line 2: '2026-31-12' is no timestamp: month must be in 1..12"),
        ("lease: !!int ''\n", "not YAML: line 1: '' is no int"),
        ("17: 3\n", "unknown setting 17"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = yaml_file(tmp_path, text)
    message = refusal("--deadpool-config", path)
    assert message.startswith(f"--deadpool-config {path}: ")
    assert said in message


def test_a_key_of_a_mapping_that_is_merged_in_may_stand_there_again(tmp_path: Path) -> None:
    text = "one: &one {a: 1, b: 2}\ntwo: &two {<<: *one, b: 3}\nthree: {<<: *two, a: 4}\n"
    merged = {"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 3}, "three": {"a": 4, "b": 3}}
    assert read_yaml(yaml_file(tmp_path, text)) == merged


def test_a_file_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    assert refusal("--deadpool-config", path) == f"--deadpool-config {path}: No such file or directory"


def test_a_file_that_is_not_text_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\x80\x02\xff\x00")
    assert refusal("--deadpool-config", str(path)).startswith(f"--deadpool-config {path}: ")


def test_a_fraction_is_never_cut_to_a_whole_number(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "snapshot_interval: 1.5\n")
    assert "snapshot_interval: expected a whole number, not 1.5" in refusal("--deadpool-config", path)


def test_a_switch_is_not_a_number_of_seconds(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "lease: true\n")
    assert "lease: expected a number, not True" in refusal("--deadpool-config", path)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_deadline_that_never_comes_is_refused(value: str) -> None:
    assert "--deadpool-form-deadline" in refusal("--deadpool-form-deadline", value)


def test_a_configuration_cannot_be_changed_into_a_contradiction() -> None:
    with pytest.raises(ConfigError):
        replace(DeadpoolConfig(), abort_deadline=1.0)
