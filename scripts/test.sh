#!/usr/bin/env bash
# Lint, types, tests: scripts/test.sh [--all-torch] [pytest arguments]
#
#   --all-torch   also the tests of what differs between versions: torch 2.14 in a second environment, and
#                 megatron-core 0.18 over the first
#
# Everything is run even if something before it failed; the exit code is 0 only if nothing failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh

all_torch=no
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' scripts/test.sh
    exit 0
fi
if [[ "${1:-}" == --all-torch ]]; then
    all_torch=yes
    shift
fi

shopt -s nullglob
# Re-forming groups in place reaches into torch, and the emulation patches it. There, groups that changed are re-formed by
# torch's own reconfigure where it can help (--deadpool-comm auto); on the first environment's torch by the swap.
# (How long a receive waits and how processes are started are the first environment's business.)
torch214_tests=(tests/unit/test_comm_*.py tests/integration/test_comm_*.py tests/unit/test_emulation_*.py
    -k "not test_comm_oneway and not test_emulation_entry")
# The part of the whole sequence that is run there too: pytest arguments.
torch214_hot_swap=(tests/integration/test_hot_swap.py -k 1f1b)

# The adapter, and one swap under another launcher, on the older line of megatron-core.
megatron018_tests=(tests/unit/test_adapters.py tests/integration/test_in_tree.py -k "adapter or seams or node_of_rank_0")

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
stage "ruff format" ruff format --check --quiet .
stage "mypy" mypy
stage "pytest" python -m pytest "$@"

if [[ $all_torch == yes ]]; then
    megatron018() { # in a subshell: the path is changed for this stage alone
        (deadpool_env_megatron018 && DEADPOOL_TEST_MEGATRON=0.18. python -m pytest "${megatron018_tests[@]}")
    }
    stage "hot swap on megatron-core 0.18" megatron018
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
