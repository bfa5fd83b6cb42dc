"""The promise: direct reads are chosen where they can work, and what was asked for and is not there is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from deadpool_megatron.config import ConfigError, resolve
from deadpool_megatron.vault import VaultError, choose_transport
from deadpool_megatron.vault.transport import rdma_devices

HAVE = "msgspec"  # a library that is there, and one that is not
LACK = "there_is_no_such_library"


def _device(root: Path, name: str, *states: str) -> None:
    for port, state in enumerate(states, 1):
        where = root / name / "ports" / str(port)
        where.mkdir(parents=True)
        (where / "state").write_text(f"{state}\n")


def test_only_devices_with_an_active_port_count(tmp_path: Path) -> None:
    assert rdma_devices(tmp_path / "none") == []
    _device(tmp_path, "mlx5_1", "1: DOWN", "4: ACTIVE")
    _device(tmp_path, "mlx5_0", "4: ACTIVE")
    _device(tmp_path, "irdma0", "1: DOWN")
    assert rdma_devices(tmp_path) == ["mlx5_0", "mlx5_1"]


def test_auto_reads_directly_only_where_device_and_library_are_there_and_says_why(tmp_path: Path) -> None:
    chosen = choose_transport("auto", tmp_path, {"UCX_TLS": "tcp"}, HAVE)
    assert chosen.name == "tcp" and "no RDMA device" in chosen.why
    _device(tmp_path, "mlx5_0", "4: ACTIVE")
    chosen = choose_transport("auto", tmp_path, {}, LACK)
    assert chosen.name == "tcp" and "pip install" in chosen.why
    chosen = choose_transport("auto", tmp_path, {}, HAVE)
    assert chosen.name == "nixl" and "mlx5_0" in chosen.why
    assert choose_transport("tcp", tmp_path, {}, HAVE).name == "tcp"


def test_nixl_without_library_or_device_is_refused_in_one_line_unless_ucx_is_told_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(VaultError, match=r"--deadpool-transport nixl: no RDMA device .* UCX_TLS") as refused:
        choose_transport("nixl", tmp_path, {}, HAVE)
    assert "\n" not in str(refused.value)
    with pytest.raises(VaultError, match=r"nixl cannot be imported .*pip install nixl"):
        choose_transport("nixl", tmp_path, {"UCX_TLS": "tcp"}, LACK)
    assert choose_transport("nixl", tmp_path, {"UCX_TLS": "tcp"}, HAVE).why == "UCX_TLS=tcp"


def test_a_transport_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="'rdma' is not one of auto, tcp, nixl"):
        resolve({"deadpool_transport": "rdma"}, {})


def test_a_launch_that_asks_for_nixl_where_it_cannot_be_ends_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deadpool_megatron.cli import main

    monkeypatch.delenv("UCX_TLS", raising=False)
    if rdma_devices() and importlib.util.find_spec("nixl"):
        pytest.skip("nixl can be had here")
    script = tmp_path / "train.py"
    script.write_text("")
    flags = ["--deadpool", "--deadpool-transport", "nixl"]
    assert main(["launch", "--local-nodes", "3", "--spare-nodes", "1", "--emulate-cpu", str(script), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("deadpool: --deadpool-transport nixl: ") and said.count("\n") == 1
