"""What a command has started is found although nobody looked before its parent was gone."""

from __future__ import annotations

import os
import subprocess

from deadpool_megatron.evaluate.descendants import Descendants, describe
from waiting import until


def _started(family: Descendants, script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", "-c", script], env=os.environ | family.environment, start_new_session=True)


def test_the_orphan_of_a_command_that_has_ended_is_found_and_killed() -> None:
    mine, other = Descendants(), Descendants()
    beside = _started(other, "exec sleep 600")
    try:
        assert _started(mine, "setsid sleep 601 & disown").wait() == 0
        (orphan,) = mine.living()
        until(lambda: describe(orphan) == f"{orphan.pid} sleep 601")  # it has the environment before the command
        assert mine.until_gone(0.1) == [orphan], "it lives on"
        mine.kill(60)
        assert mine.living() == []
        assert [process.pid for process in other.living()] == [beside.pid], "another command's is left alone"
    finally:
        mine.kill(10)
        beside.kill()
    assert other.until_gone(60) == [], "a zombie has ended; that nobody waited for it yet is its parent's business"
    beside.wait()
