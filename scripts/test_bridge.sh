#!/usr/bin/env bash
# The tests of Megatron-Bridge, in an environment of their own (.venv-bridge): scripts/test_bridge.sh [main] [pytest arguments]
#
#   main   its repository's main on Megatron-LM's, the commits that tests/upstream.py names, from the clones in
#          DEADPOOL_BRIDGE_GIT and DEADPOOL_UPSTREAM_GIT; else the locked release of both
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
deadpool_env_bridge || exit 1
if [[ "${1:-}" == main ]]; then
    shift
    : "${DEADPOOL_BRIDGE_GIT:?names no clone of Megatron-Bridge}" "${DEADPOOL_UPSTREAM_GIT:?names no clone of Megatron-LM}"
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    # Before the installed ones on the path; compiled helpers are the installed one's.
    trees="$(PYTHONPATH=tests python - "$scratch" <<'PYTHON'
import sys
from pathlib import Path

from upstream import MAIN, bridge, checkout

print(bridge(Path(sys.argv[1])), checkout(MAIN, Path(sys.argv[1])), sep=":")
PYTHON
)"
    export PYTHONPATH="$trees${PYTHONPATH:+:$PYTHONPATH}"
fi
python -c 'from importlib.util import find_spec; print("==", find_spec("megatron.bridge").origin)'
# Nothing is fetched: the tiny models have no files.
HF_HUB_OFFLINE=1 python -m pytest -m bridge tests/integration/test_bridge.py "$@"
