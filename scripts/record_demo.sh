#!/usr/bin/env bash
# Record the demo for asciinema (`asciinema play docs/demo.cast`): scripts/record_demo.sh [options of demo.sh]
# CAST=FILE names another file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
deadpool_env || exit 1
deadpool_uv tool run --from asciinema==2.4.0 asciinema rec --overwrite --idle-time-limit 2 --cols 120 --rows 34 \
    --title "DeadPool for Megatron-LM: a node dies, and nothing is different" \
    --command "$(command -v python) -m deadpool_megatron.demo ${*@Q}" "${CAST:-docs/demo.cast}"
