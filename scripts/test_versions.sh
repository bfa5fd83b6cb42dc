#!/usr/bin/env bash
# The tests marked `versions` on other versions than the locked ones, each in an environment of its own:
# scripts/test_versions.sh [NAME...] [-- pytest arguments]
#
#   torch-2.11      the oldest torch that setup.py allows
#   torch-newest    the newest torch on the index; scripts/test.sh has the locked one
#   megatron-0.18   the oldest line of megatron-core
#   megatron-main   upstream's main, the commit that tests/upstream.py names, from the clone in DEADPOOL_UPSTREAM_GIT
#
# Without a name: all of them. Environments are .venv-NAME, made anew each time (packages come from uv's cache); remove
# them as you like. Everything is run even if something before it failed; the exit code is 0 only if nothing failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,11s/^# \{0,1\}//p' scripts/test_versions.sh
    exit 0
fi
names=()
while (( $# )) && [[ "$1" != -- ]]; do
    case "$1" in
        torch-2.11 | torch-newest | megatron-0.18 | megatron-main) names+=("$1") ;;
        *)
            echo "scripts/test_versions.sh: unknown name $1: torch-2.11, torch-newest, megatron-0.18 or megatron-main" >&2
            exit 2
            ;;
    esac
    shift
done
[[ "${1:-}" != -- ]] || shift
(( ${#names[@]} )) || names=(torch-2.11 torch-newest megatron-0.18 megatron-main)

# An environment of the locked versions, then what is different in this one: environment NAME uv's arguments. Activated.
environment() {
    local venv="$PWD/.venv-$1"
    shift
    deadpool_uv venv --clear --no-python-downloads --python "$(command -v python)" "$venv"
    local install=(pip install --python "$venv/bin/python")
    deadpool_uv "${install[@]}" --no-deps -r requirements.lock
    deadpool_uv "${install[@]}" --no-deps --no-build-isolation -e .
    deadpool_uv "${install[@]}" "$@"
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}

# Upstream's files come before the installed megatron-core on the path; its compiled helpers are the installed one's.
checkout() {
    PYTHONPATH=tests python - "$1" <<'PYTHON'
import sys
from pathlib import Path

from upstream import MAIN, checkout

checkout(MAIN, Path(sys.argv[1])).rename(Path(sys.argv[1], "main"))
PYTHON
    export PYTHONPATH="$1/main${PYTHONPATH:+:$PYTHONPATH}"
}

# pytest ARGUMENTS, in a subshell: the environment is this stage's alone.
run() (
    set -e
    name="$1" differs="${1%%-*}"
    shift
    case "$name" in
        torch-2.11) environment "$name" "torch==2.11.*" ;;
        torch-newest) environment "$name" --upgrade-package torch torch ;;
        megatron-0.18)
            environment "$name" --no-deps "megatron-core==0.18.*"
            export DEADPOOL_TEST_MEGATRON=0.18.
            ;;
        megatron-main)
            checkout "$scratch"
            export DEADPOOL_TEST_MEGATRON=0.20.
            ;;
    esac
    python -c 'import megatron.core, torch; print(f"== torch {torch.__version__}, megatron-core {megatron.core.__version__}")'
    exec python -m pytest -m "versions($differs=True) and (not slow or versions(census=True))" "$@"
)

deadpool_env || exit 1
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
failed=()
for name in "${names[@]}"; do
    if [[ "$name" == megatron-main && -z "${DEADPOOL_UPSTREAM_GIT:-}" ]]; then
        echo "== $name: skipped, DEADPOOL_UPSTREAM_GIT does not name a clone of Megatron-LM"
        continue
    fi
    echo "== $name"
    start=$SECONDS code=0
    # Not after || or in a condition: bash would go on after an error inside.
    set +e
    run "$name" "$@"
    code=$?
    set -e
    if (( code == 0 )); then
        echo "== $name: passed in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED after $((SECONDS - start)) s"
        failed+=("$name")
    fi
done

if (( ${#failed[@]} )); then
    echo "== failed: ${failed[*]}"
    exit 1
fi
echo "== all passed in $SECONDS s"
