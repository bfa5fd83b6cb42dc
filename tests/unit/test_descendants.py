"""What a command has started is found although nobody looked before its parent was gone."""

from __future__ import annotations

import os
import subprocess

from deadpool_bench.harness.jobs import describe
from deadpool_megatron.jobs.descendants import Descendants
from waiting import until


def _started(family: Descendants, script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", "-c", script], env=os.environ | family.environment, start_new_session=True)


def test_the_orphan_of_a_command_that_has_ended_is_found_and_killed() -> None:
    mine, other = Descendants(), Descendants()
    beside = _started(other, "exec sleep 600")
    try:
        assert _started(mine, "setsid sleep 601 & disown").wait() == 0
        (orphan,) = until(mine.living)
        # It has the environment before it has the command.
        until(lambda: describe(orphan) == f"{orphan.pid} sleep 601")
        assert mine.living() == [orphan], "it lives on"
        mine.kill(60)
        assert mine.living() == []
        assert [process.pid for process in other.living()] == [beside.pid], "another command's is left alone"
    finally:
        mine.kill(60)
        beside.kill()
    until(lambda: not other.living())  # a zombie has ended; that nobody waited for it yet is its parent's business
    beside.wait()


def test_what_one_member_of_a_family_started_is_told_from_what_another_did() -> None:
    family = Descendants()
    one, other = Descendants(family), Descendants(family)
    processes = [_started(each, "exec sleep 600") for each in (one, other)]
    try:
        until(lambda: len(family.living()) == 2)  # each has its environment from its exec on
        assert [p.pid for p in one.living()] == [processes[0].pid]
        assert {p.pid for p in family.living()} == {p.pid for p in processes}
    finally:
        family.kill(60)
        for process in processes:
            process.wait()
