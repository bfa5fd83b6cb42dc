"""The commands of docs/megatron.md are run as they stand there, by bash."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deadpool_megatron.observe import read_events
from docs_commands import ROOT, blocks
from jobs import environment
from machines import free_port


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_agents_on_one_machine_lose_one_as_the_page_says(tmp_path: Path) -> None:
    (block,) = [b for b in blocks(ROOT / "docs" / "megatron.md") if "for rank in" in b]
    for name in ("examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    deadpool = tmp_path / "bin" / "deadpool"
    deadpool.parent.mkdir()
    deadpool.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m deadpool_megatron.cli "$@"\n')
    deadpool.chmod(deadpool.stat().st_mode | stat.S_IXUSR)
    env = environment()
    env["PATH"] = f"{deadpool.parent}:{env['PATH']}"
    script = re.sub(r"127.0.0.1:\d+", f"127.0.0.1:{free_port()}", block)
    script = script.replace("\nwait\n", "\nwait -n; echo first $?\nwait -n; echo next $?\nwait -n; echo last $?\n")
    assert "echo last" in script
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        out, _ = process.communicate()
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
    assert process.returncode == 0, out
    ends = re.findall(r"^(first|next|last) (\d+)$", out, re.MULTILINE)
    assert ends == [("first", "137"), ("next", "0"), ("last", "0")], out
    assert "its agent was ended by signal 9" in out
    (declared,) = [e for e in read_events(tmp_path / "runs" / "try") if e["event"] == "declared"]
    assert declared["lost"] == [1] and declared["nodes"] == [0, 2]
    assert json.loads((tmp_path / "runs" / "try" / "status.json").read_text())["iteration"] == 199
