"""torch.compile for the blocks and the loss."""
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache

import torch
from mmengine.logging import print_log
from torch.utils._triton import has_triton


@cache
def compiled(function: Callable) -> Callable:
    """Compile a function at its first call: one graph per shape of its tensors.

    Turns off DDPOptimizer in this process. It would cut each graph at the gradient buckets, so
    that a block could start to reduce its gradients before it ends. Sets the number of compile
    workers, unless ``TORCHINDUCTOR_COMPILE_THREADS`` does.

    Args:
        function (callable): A module-level function, so that all blocks share its graphs.
    """
    torch._dynamo.config.optimize_ddp = False
    if 'TORCHINDUCTOR_COMPILE_THREADS' not in os.environ:
        from torch._inductor import config  # slow; before anything that starts the workers
        config.compile_threads = share_of_workers(config.decide_compile_threads())
    # dynamic shapes would give full batches the slower graph of the first short batch
    return torch.compile(function, dynamic=False)


def share_of_workers(workers: int) -> int:
    """Share the compile workers of a machine among its processes.

    Args:
        workers (int): torch's number for one process, at most 32: the cores that it may use.

    Returns:
        int: The share of this process, at least 1, and no more than the cores of a Slurm task.
    """
    processes = os.environ.get('LOCAL_WORLD_SIZE') or (     # set by torchrun
        os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') or 1)
    cores = os.environ.get('SLURM_CPUS_PER_TASK') or workers
    return max(1, min(workers // int(processes), int(cores)))


@cache
def can_compile() -> bool:
    """Whether torch.compile can build kernels for the GPU; logs what is missing."""
    compiler = os.environ.get('CC') or shutil.which('cc') or shutil.which('gcc')
    if has_triton() and compiler:
        return True
    print_log('The network runs without torch.compile, at about half the speed. Compiling needs a '
              'GPU that Triton supports, and a C compiler (cc, gcc or $CC). '
              'compile_blocks=False hides this warning.', logger='current', level=logging.WARNING)
    return False
