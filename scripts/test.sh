#!/usr/bin/env bash
# Lint, types, tests: scripts/test.sh [pytest arguments]
#
# Everything is run even if something before it failed; the exit code is 0 only if nothing failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,4s/^# \{0,1\}//p' scripts/test.sh
    exit 0
fi
failed=()
stage() {
    local name="$1" start=$SECONDS
    shift
    echo "== $name"
    if "$@"; then
        echo "== $name: passed in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED after $((SECONDS - start)) s"
        failed+=("$name")
    fi
}

deadpool_env || exit 1
stage "ruff" ruff check .
stage "ruff format" ruff format --check --quiet .
stage "mypy" mypy
if (( $# )); then
    stage "pytest" python -m pytest "$@"
else
    # A file stays in one process, for its fixtures. More files with jobs at a time than processors: jobs wait, too.
    stage "unit tests" python -m pytest -n logical --maxprocesses 8 --dist loadfile tests/unit
    stage "other tests" python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/unit
fi

if (( ${#failed[@]} )); then
    echo "== failed: $(IFS=,; echo "${failed[*]}" | sed 's/,/, /g')"
    exit 1
fi
echo "== all passed in $SECONDS s"
