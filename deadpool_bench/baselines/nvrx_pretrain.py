"""``nvrx_pretrain.py SCRIPT [ARGS]``: run SCRIPT with Megatron's ``--inprocess-restart``, as upstream's script does.

For `deadpool bench nvrx`: upstream's pretrain_gpt.py wraps ``pretrain`` before it calls it
(`megatron.training.inprocess_restart.maybe_wrap_for_inprocess_restart`); scripts that do not are wrapped here.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Wrap, then run the script as ``python SCRIPT`` would."""
    script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    import megatron.training as package
    from megatron.training import training
    from megatron.training.inprocess_restart import maybe_wrap_for_inprocess_restart

    original = training.pretrain
    wrapped, store = maybe_wrap_for_inprocess_restart(original)

    def pretrain(*args: Any, **kwargs: Any) -> Any:
        return wrapped(*args, store=store, **kwargs)

    package.pretrain = training.pretrain = pretrain
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
