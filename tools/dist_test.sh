#!/usr/bin/env bash
# Test on several GPUs, or in several CPU processes without a GPU:
#     tools/dist_test.sh CONFIG CHECKPOINT GPUS [flags of test.py]
# On several machines, run it on each with the same NNODES, MASTER_ADDR and PORT (29500), and
# with NODE_RANK counting from 0. On one machine a free port is used unless PORT is set.
set -eu

if ! [[ $# -ge 3 && $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [flags of test.py], GPUS a number from 1" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"
exec python "$TOOLS/launch.py" "$3" "$TOOLS/test.py" "$1" "$2" --launcher pytorch "${@:4}"
