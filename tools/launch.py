"""Run torchrun for dist_train.sh and dist_test.sh, with its address and number of threads set.

    python tools/launch.py GPUS SCRIPT [arguments of the script]
"""
import argparse

from nepa_mm_cli import tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('gpus', type=int, metavar='GPUS', help='processes on this machine')
    parser.add_argument('command', nargs=argparse.REMAINDER, metavar='SCRIPT',
                        help='tools/train.py or tools/test.py, and its arguments')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import logging
import os
import signal
import socket
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

TERMINATED = 128 + signal.SIGTERM       # status of a process that saved and exited
raise_signal = api._terminate_process_handler


def raise_once(signum, frame):
    """Call torchrun's handler once; with a third SIGTERM torchrun would abandon its processes."""
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_IGN)
    raise_signal(signum, frame)


def free_port():
    """Return an unused TCP port of this machine."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def exit_after_signal(status=TERMINATED):
    """Exit with the status of a signal, 128 + its number."""
    print(f'{signal.Signals(status - 128).name}: the processes have ended.', file=sys.stderr)
    sys.exit(status)


def main(gpus, *command):
    """Run a command in ``gpus`` processes on each machine."""
    env = os.environ
    nodes = env.get('NNODES', '1')
    # the failed process or the last line below reports the cause more clearly
    for name in list(logging.root.manager.loggerDict):
        if name.startswith('torch.distributed.elastic'):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    threads = max(1, len(os.sched_getaffinity(0)) // int(gpus))
    env.setdefault('OMP_NUM_THREADS', str(threads))
    env.setdefault('MKL_NUM_THREADS', env['OMP_NUM_THREADS'])
    # seconds for saving after SIGTERM; older torch uses 30
    env.setdefault('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', '600')
    api._terminate_process_handler = raise_once
    try:
        run.main([
            f'--nnodes={nodes}',
            f'--node-rank={env.get("NODE_RANK", "0")}',
            f'--nproc-per-node={gpus}',
            f'--master-addr={env.get("MASTER_ADDR", "127.0.0.1")}',
            f'--master-port={env.get("PORT") or (free_port() if nodes == "1" else 29500)}',
            *command])
    except SignalException as stop:
        exit_after_signal(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:       # bad input, which the process has reported
            sys.exit(2)
        if failure.exitcode in (TERMINATED, -signal.SIGTERM):
            exit_after_signal()
        how = (f'was killed by {failure.signal_name()}' if failure.exitcode < 0
               else f'ended with status {failure.exitcode}')
        sys.exit(f'error: the process of rank {rank} {how}; torchrun has ended all others.')


if __name__ == '__main__':
    args = parse_args()
    main(args.gpus, *args.command)
