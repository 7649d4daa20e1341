#!/usr/bin/env bash
# Train under Slurm:
#     GPUS=16 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [flags of train.py]
# GPUS (8) is the total over all machines. GPUS_PER_NODE (8), CPUS_PER_TASK (12) and SRUN_ARGS (split
# at blanks) are passed to srun. PORT is the port of the process group (default: a random one).
set -eu

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [flags of train.py]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
export MASTER_PORT=${PORT:-$((20000 + RANDOM % 10000))}
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"

exec srun \
    --partition="$1" \
    --job-name="$2" \
    --gres="gpu:${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-12}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$TOOLS/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
