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
    that a block could start to reduce its gradients before it ends.

    Args:
        function (callable): A module-level function, so that all blocks share its graphs.
    """
    torch._dynamo.config.optimize_ddp = False
    # dynamic shapes would give full batches the slower graph of the first short batch
    return torch.compile(function, dynamic=False)


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
