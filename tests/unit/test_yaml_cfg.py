"""Settings survive Megatron's own ``--yaml-cfg``, which puts a namespace of its own in the place of the parsed one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deadpool_megatron.config import DeadpoolConfig, from_script_arguments, resolve


def test_upstreams_parser_gives_our_settings_with_a_yaml_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import arguments, yaml_arguments

    from deadpool_megatron.megatron.lm import MegatronLM

    file = tmp_path / "model.yaml"
    file.write_text("disable_msc_deprecated: no\nenable_msc: no\nnum_layers: 2\ndeadpool: {lease: 2, transport: tcp}\n")
    flags = ["--yaml-cfg", str(file), "--deadpool", "--deadpool-lease", "3"]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
    config = from_script_arguments(flags)
    assert config == DeadpoolConfig(deadpool=True, lease=3.0, transport="tcp")
    for module, name in ((arguments, "add_megatron_arguments"), (yaml_arguments, "load_yaml")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    MegatronLM().take_settings(config)
    args = arguments.parse_args()
    assert args.num_layers == 2, "the file's namespace"
    assert resolve(vars(args)) == config
