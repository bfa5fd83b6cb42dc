#!/usr/bin/env bash
# Lint, types, tests: scripts/test.sh [--all-torch] [pytest arguments]
#
#   --all-torch   also the tests of what differs between torch versions, in a second environment with torch 2.14
#
# Everything is run even if something before it failed; the exit code is 0 only if nothing failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh

all_torch=no
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,6s/^# \{0,1\}//p' scripts/test.sh
    exit 0
fi
if [[ "${1:-}" == --all-torch ]]; then
    all_torch=yes
    shift
fi

shopt -s nullglob
# Re-forming groups in place reaches into torch, and the emulation patches it.
torch214_tests=(tests/unit/test_comm_*.py tests/integration/test_comm_*.py tests/unit/test_emulation_*.py)
# The part of the whole sequence that is run there too: pytest arguments.
torch214_hot_swap=(tests/integration/test_hot_swap.py -k 1f1b)

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

# 5: no test was selected, which is what -k does to one of two files.
pytest_some() {
    local code=0
    python -m pytest "$@" || code=$?
    [[ $code == 0 || $code == 5 ]]
}

deadpool_env || exit 1
stage "ruff" ruff check .
stage "mypy" mypy
stage "pytest" python -m pytest "$@"

if [[ $all_torch == yes ]]; then
    if deadpool_env_torch214; then
        stage "pytest on torch 2.14" pytest_some "${torch214_tests[@]}"
        if [[ -f "${torch214_hot_swap[0]}" ]]; then
            stage "hot swap on torch 2.14" pytest_some "${torch214_hot_swap[@]}"
        fi
    else
        failed+=(".venv-torch214")
    fi
fi

if (( ${#failed[@]} )); then
    echo "== failed: $(IFS=,; echo "${failed[*]}" | sed 's/,/, /g')"
    exit 1
fi
echo "== all passed in $SECONDS s"
