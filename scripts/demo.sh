#!/usr/bin/env bash
# Set up, train a tiny GPT twice, kill a node the second time, show that both runs are equal: scripts/demo.sh [options]
# Options: scripts/demo.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
deadpool_env || exit 1
exec python -m deadpool_megatron.demo "$@"
