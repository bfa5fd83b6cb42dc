"""What is printed on a full disk, or to a reader that is gone, is lost, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PRINTS = """
import sys
from deadpool_megatron.output import never_fails
never_fails()
for _ in range(300):
    print("x" * 100)
    print("y" * 100, file=sys.stderr)
sys.stdout.flush()
sys.exit(7)
"""


@pytest.mark.parametrize("where", ["full", "gone"])
def test_printing_never_raises(where: str) -> None:
    if where == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    done = subprocess.run([sys.executable, "-c", _PRINTS], stdout=out, stderr=out, check=False)
    os.close(out)
    assert done.returncode == 7


def test_what_can_be_written_is_written_in_order() -> None:
    done = subprocess.run([sys.executable, "-c", _PRINTS], capture_output=True, text=True, check=False)
    assert done.stdout == ("x" * 100 + "\n") * 300 and done.stderr == ("y" * 100 + "\n") * 300


def test_who_prints_does_not_stand_still_with_who_reads() -> None:
    """A terminal that is held (Ctrl-S), a pipe to a process that hangs: the loop of a coordinator goes on."""
    program = """
import sys, time
from deadpool_megatron import output
output._PATIENCE_S, output._LAST_S = 0.05, 60.0
output.never_fails(stands_still=False)
aside = sys.stderr.buffer.raw._aside
print("z" * (1 << 20), file=sys.stderr)  # more than a pipe takes
while not aside.held_up_s:
    time.sleep(0.01)
for number in range(5000):
    print(number, "y" * 100, file=sys.stderr)
print("went on", flush=True)
sys.stdin.readline()
print("last", file=sys.stderr)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "went on\n"
        assert process.stderr.readline() == "z" * (1 << 20) + "\n"
        shown = [process.stderr.readline() for _ in range(900)]  # of those that wait
        process.stdin.write("\n")
        process.stdin.flush()
        shown += process.stderr.readlines()
    numbers = [int(line.split()[0]) for line in shown if line != "last\n"]
    assert numbers == list(range(len(numbers))) and 990 < len(numbers) <= 1000, "in order, and the rest is dropped"
    assert shown[-1] == "last\n" and process.returncode == 0
