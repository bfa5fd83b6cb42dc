#!/usr/bin/env bash
# The tests of Megatron-Bridge, in an environment of their own (.venv-bridge): scripts/test_bridge.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
deadpool_env_bridge || exit 1
# Nothing is fetched: the tiny models have no files.
HF_HUB_OFFLINE=1 exec python -m pytest -m bridge tests/integration/test_bridge.py "$@"
