#!/usr/bin/env bash
# Train on several GPUs, or in several CPU processes without a GPU:
#     tools/dist_train.sh CONFIG GPUS [flags of train.py]
# On several machines, run it on each with the same NNODES, MASTER_ADDR and PORT (29500), and
# with NODE_RANK counting from 0. On one machine a free port is used unless PORT is set.
set -eu

if ! [[ $# -ge 2 && $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG GPUS [flags of train.py], GPUS a number from 1" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"
exec python "$TOOLS/launch.py" "$2" "$TOOLS/train.py" "$1" --launcher pytorch "${@:3}"
