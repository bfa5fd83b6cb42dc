#!/usr/bin/env bash
# One DeadPool job in a Slurm allocation of N + S nodes. Called by a batch script (see pretrain_65b.sbatch):
#
#     run.sh SPARES GPUS SCRIPT [Megatron flags] --deadpool [...]
#
#   SPARES   S: the last S nodes of the allocation are warm spares
#   GPUS     workers a node
#
# Environment, all optional:
#   RUN_ROOT     directory on a file system that all nodes share (default: runs, where sbatch was called)
#   HEAD_ADDR    address of the batch host on the training network (default: its host name)
#   AGENT_FLAGS  more options for `deadpool agent`, as --emulate-cpu
#   MAX_REQUEUES how often the job may be put back into the queue (default: 0). Only for a job whose next start goes on
#                from what is on disk (--load, --deadpool-resume auto): any other would begin from nothing.
#
# The coordinator runs here, on the first node of the allocation, and one agent on every node, under one srun. A node
# that Slurm marks down takes its own task along and nothing else; a spare takes over. The exit code is the job's.
set -euo pipefail

spares=$1 gpus=$2
shift 2
command -v deadpool >/dev/null || { echo "run.sh: no \`deadpool\` on PATH: activate its environment first" >&2; exit 2; }
restart=${SLURM_RESTART_COUNT:-0}
run_dir=${RUN_ROOT:-$SLURM_SUBMIT_DIR/runs}/$SLURM_JOB_ID.$restart
mkdir -p "$run_dir"

# shellcheck disable=SC2206 # options are words
options=(
    --nnodes "$SLURM_JOB_NUM_NODES" --spare-nodes "$spares" --nproc-per-node "$gpus"
    --rdzv-endpoint "${HEAD_ADDR:-$(hostname)}:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id "$SLURM_JOB_ID.$restart"
    --run-dir "$run_dir" --tee none ${AGENT_FLAGS:-}
)
echo "deadpool: job $SLURM_JOB_ID, start $restart: $SLURM_JOB_NUM_NODES nodes, $spares of them spares; logs in $run_dir"

deadpool coordinator "${options[@]}" "$@" &
coordinator=$!

requeue=no trapped=no
# Sent by Slurm ahead of the time limit (#SBATCH --signal=B:USR1@600): end in good order, and go on in the next start.
trap 'trapped=yes requeue=time; kill -TERM "$coordinator" 2>/dev/null' USR1
# scancel, or Slurm's own preemption: end in good order, and leave it to Slurm whether to start again.
trap 'trapped=yes requeue=never; kill -TERM "$coordinator" 2>/dev/null' TERM INT

# --no-kill            the step survives the failure of a node (as #SBATCH --no-kill lets the allocation do)
# --kill-on-bad-exit=0 a task that ends badly does not take the others along, whatever slurm.conf says
# --wait=0             nor does one that ends first
# --cpus-per-task      the workers of an agent use all of its node; not inherited from sbatch since 22.05
srun --no-kill --kill-on-bad-exit=0 --wait=0 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --mpi=none --unbuffered \
    deadpool agent "${options[@]}" --no-coordinator "$@" &
agents=$!

# A trap ends `wait` early; then wait again.
while :; do
    trapped=no
    wait "$coordinator" && code=0 || code=$?
    [[ $trapped == yes ]] || break
done
# The agents leave by themselves; srun may wait for one on a node that is gone.
for _ in {1..30}; do
    kill -0 "$agents" 2>/dev/null || break
    sleep 1
done
kill -TERM "$agents" 2>/dev/null || true
wait "$agents" || true

# 74: left in good order, state drained; 75: no spare left, checkpoint saved; 76: not saved; 77: more nodes lost than the
# redundancy covers; 78: network, etcd. The next start gets a whole allocation again and goes on from what is on disk.
case $requeue:$code in
    never:*) ;;
    time:0) ;;
    time:* | no:74 | no:75 | no:76 | no:77 | no:78)
        if (( restart < ${MAX_REQUEUES:-0} )); then
            echo "deadpool: exit code $code; job $SLURM_JOB_ID goes back into the queue"
            exec scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$code"
