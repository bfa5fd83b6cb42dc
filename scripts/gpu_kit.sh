#!/usr/bin/env bash
# What one GPU can prove of DeadPool, on a machine that is at hand for minutes and has no network.
#
#   scripts/gpu_kit.sh prepare            where PyPI is: all that such a machine lacks, into .gpu-kit (below 32 MB)
#   scripts/gpu_kit.sh run 1|2|...|6      on the GPU machine, with .gpu-kit: one step, at most 9 minutes
#   scripts/gpu_kit.sh report             docs/measurements/gpu-CARD-DATE.md, and the GPU column of docs/evaluation.md
#
#   1 the machine, tests/gpu, copies; several NCCL ranks on the device: replaced, aborted in a first message and in a
#     kernel; small all-reduces over a blocking and a nonblocking communicator
#   2 hot swaps over NCCL, PP2 x DP2 and TP2 x PP2 x DP2: is everything equal?
#   3 the overhead of snapshots with 1.3B parameters, BF16 and FP32
#   4 a node lost while a CUDA graph of a whole iteration is replayed
#   5 the vault at speed: 16 GB a generation between two agents
#   6 kill after kill for what is left of the time, every other job with experts
#
# Each step adds what it sees to step-N.jsonl at once, ends with a line PASS or FAIL, and keeps its output in step-N.log;
# all of them, and the report, take --out DIR (default: runs/gpu-kit) and --dry (no GPU: Gloo and the emulation).
# The GPU machine needs Python 3.12, torch 2.11 or newer with CUDA, pytest, 16 cores, 128 GiB of memory.
#
#   scripts/gpu_kit.sh replica            an environment like that machine's, .venv-gpu-kit: torch 2.11, nothing carried
#   scripts/gpu_kit.sh rehearse 1|2|...   prepare, replica, then run --dry in it, without a network
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh

kit="$PWD/.gpu-kit" replica="$PWD/.venv-gpu-kit"
limit_s=540
# Not on the GPU machine; the kit brings them.
carried="megatron-core pyzmq msgspec"
# Locked, but neither there nor brought: what only development needs.
not_there="emerging-optimizers nixl nixl-cu13 pyeclib ruff mypy mypy_extensions librt ast_serialize types-psutil
    types-PyYAML jsonschema jsonschema-specifications referencing rpds-py"
nccl="nvidia-nccl-cu13==2.30.7"

fail() {
    echo "gpu_kit.sh: $*" >&2
    exit 2
}

usage() {
    sed -n '2,25s/^# \{0,1\}//p' scripts/gpu_kit.sh
}

# locked NAMES... : their lines of the lock; others NAMES... : all the others.
locked() { grep -i -E "^($(tr ' ' '|' <<<"$*"))==" requirements.lock; }
others() { grep -i -v -E "^($(tr ' ' '|' <<<"$*"))==" requirements.lock | grep -v '^ *#'; }

# Everything that .gpu-kit is made of; another lock makes it anew.
stamp() { { locked $carried; echo "$nccl"; cat deadpool_bench/gpu_kit/nccl.py; } | sha256sum; }

wheels() {
    local python
    python="$(_deadpool_python)" || exit 1
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 \
        --dest "$1" "${@:2}" || fail "$* could not be downloaded"
}

# prepare [--without-nccl]: a rehearsal has no use for NCCL.
prepare() {
    if [[ -f "$kit/.stamp" && "$(<"$kit/.stamp")" == "$(stamp)" ]]; then
        [[ "${1:-}" == --without-nccl || -f "$kit/libnccl.so.2.xz" ]] && return
    else
        rm -rf "$kit"
    fi
    mkdir -p "$kit"
    mapfile -t lines < <(locked $carried)
    wheels "$kit" "${lines[@]}"
    if [[ "${1:-}" != --without-nccl ]]; then
        deadpool_env || exit 1
        local scratch
        scratch="$(mktemp -d)"
        trap "rm -rf '$scratch'" EXIT
        wheels "$scratch" "$nccl"
        python -m zipfile -e "$scratch"/*.whl "$scratch"
        python -m deadpool_bench.gpu_kit prune "$scratch/nvidia/nccl/lib/libnccl.so.2" "$scratch/pruned"
        xz -T0 -6 --stdout "$scratch/pruned" >"$kit/libnccl.so.2.xz"
    fi
    local bytes
    bytes="$(du -sb "$kit" | cut -f1)"
    (( bytes < 32000000 )) || fail "$kit is $bytes bytes, more than 32 MB: it could not be carried"
    stamp >"$kit/.stamp"
    echo "$kit: $((bytes / 1000000)) MB; take it to the GPU machine with the repository"
}

# What was carried is unpacked once, outside of the repository: a machine may give the repository anew with each command.
unpack() {
    local site="${TMPDIR:-/tmp}/deadpool-gpu-kit"
    [[ -f "$kit/.stamp" ]] || fail "there is no .gpu-kit here: run 'scripts/gpu_kit.sh prepare' where PyPI is, and bring it"
    if [[ ! -f "$site/.stamp" || "$(<"$site/.stamp")" != "$(<"$kit/.stamp")" ]]; then
        rm -rf "$site"
        mkdir -p "$site/packages"
        for wheel in "$kit"/*.whl; do
            python3 -m zipfile -e "$wheel" "$site/packages" || fail "$wheel is broken: prepare the kit again"
        done
        cp "$kit/.stamp" "$site/.stamp"
    fi
    if [[ -f "$kit/libnccl.so.2.xz" && ! -f "$site/libnccl.so.2" ]]; then
        xz -dc "$kit/libnccl.so.2.xz" >"$site/libnccl.so.2.new" && mv "$site/libnccl.so.2.new" "$site/libnccl.so.2"
    fi
    export GPU_KIT_NCCL="$site/libnccl.so.2" PYTHONPATH="$PWD:$site/packages${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONUNBUFFERED=1
}

run() {
    local begun=$SECONDS
    unpack
    if [[ " $* " != *" --dry "* ]]; then
        ulimit -l unlimited 2>/dev/null || true
        # Vaults of gigabytes: shared memory is half of the memory unless somebody says otherwise.
        mount -o remount,size=80% /dev/shm 2>/dev/null || true
    fi
    # The step keeps its time itself; this is for one that hangs where Python cannot end it.
    exec timeout -k 5 $((limit_s - SECONDS + begun)) python3 -m deadpool_bench.gpu_kit run \
        --limit $((limit_s - 5 - SECONDS + begun)) "$@"
}

make_replica() {
    local mark
    mark="$({ others $carried $not_there; sed -n '/^make_replica/,/^}/p' scripts/gpu_kit.sh; } | sha256sum)"
    [[ -f "$replica/.stamp" && "$(<"$replica/.stamp")" == "$mark" ]] && return
    local python install=(pip install --quiet --python "$replica/bin/python")
    python="$(_deadpool_python)" || exit 1
    deadpool_uv venv --quiet --clear --no-python-downloads --python "$python" "$replica"
    deadpool_uv "${install[@]}" --no-deps -r <(others $carried $not_there)
    deadpool_uv "${install[@]}" "torch==2.11.0"
    echo "$mark" >"$replica/.stamp"
}

rehearse() {
    prepare --without-nccl
    make_replica
    export VIRTUAL_ENV="$replica" PATH="$replica/bin:$PATH"
    unset PYTHONPATH
    # A network of its own with nothing in it; as another user than root, root of a user namespace of its own.
    local alone=(unshare --net)
    [[ "$(id -u)" == 0 ]] || alone+=(--map-root-user)
    exec "${alone[@]}" bash -c 'ip link set lo up && exec scripts/gpu_kit.sh run --dry "$@"' bash "$@"
}

case "${1:-}" in
    prepare) prepare ;;
    run) run "${@:2}" ;;
    report)
        deadpool_env || exit 1
        python -m deadpool_bench.gpu_kit "$@"
        ;;
    replica) make_replica ;;
    rehearse) rehearse "${@:2}" ;;
    *)
        usage >&2
        exit 2
        ;;
esac
