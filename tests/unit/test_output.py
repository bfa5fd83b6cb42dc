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
