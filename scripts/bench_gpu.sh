#!/usr/bin/env bash
# The overhead of snapshots on one GPU: GPT of 1.3B parameters through megatron.training, BF16 and FP32, in two steps.
#
#   scripts/bench_gpu.sh carry DIR        where PyPI is: put the wheels that a bare GPU machine lacks into DIR (30 MB)
#   scripts/bench_gpu.sh run DIR OUT      on the GPU machine (Python 3.12, torch with CUDA): tests, benchmark, pictures
#
# The GPU machine needs 128 GiB of memory, half of it in /dev/shm, and `ulimit -l unlimited`. BLOCKS, BLOCK and GBS
# change the length; the defaults take about ten minutes a precision on an H200.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-} dir=${2:-} out=${3:-runs/bench-gpu}

names="megatron-core pyzmq msgspec xxhash psutil rich markdown-it-py mdurl Pygments PyYAML packaging einops
       matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil tzdata pytest iniconfig pluggy
       hypothesis sortedcontainers zfec"

case $mode in
carry)
    [ -n "$dir" ] || { echo "bench_gpu.sh: name a directory for the wheels" >&2; exit 2; }
    wanted=()
    for name in $names; do
        line=$(grep -i "^$name==" requirements.lock || true)
        if [ -n "$line" ]; then wanted+=("$line"); fi
    done
    python3 -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --dest "$dir" "${wanted[@]}"
    du -sh "$dir"
    ;;
run)
    [ -d "$dir" ] || { echo "bench_gpu.sh: no wheels at '$dir': run 'bench_gpu.sh carry DIR' where PyPI is" >&2; exit 2; }
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install --quiet --no-deps --no-index --target "$site" "$dir"/*.whl
    export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" CUDA_DEVICE_MAX_CONNECTIONS=1
    mkdir -p "$out"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/machine.txt"
    python3 -m pytest -q -rP -m gpu tests/gpu | tee "$out/tests-gpu.txt"
    mapfile -t flags < <(tr -s ' ' '\n' <examples/gpt_1p3b.args)
    python3 -m deadpool_megatron.cli bench overhead --active-nodes 1 --nproc-per-node 1 --trace \
        --blocks "${BLOCKS:-12}" --block "${BLOCK:-3}" --warmup 3 --precisions "${PRECISIONS:-bf16,fp32}" \
        --out "$out" examples/pretrain_gpt.py "${flags[@]}" --global-batch-size "${GBS:-192}" | tee "$out/overhead.txt"
    ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
