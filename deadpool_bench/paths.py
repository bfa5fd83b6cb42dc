"""Where the repository is, and how processes that a bench starts find its packages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]


def importing(environment: Mapping[str, str]) -> dict[str, str]:
    """This environment for ``python -m deadpool_bench...``, in whatever directory that is started.

    An installation of the package, also an editable one, does not have the benches on Python's path.
    """
    others = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]
    return {**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *others])}
