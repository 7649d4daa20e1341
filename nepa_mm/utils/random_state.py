"""Seeds, and context managers that restore random states."""
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """Hash several numbers, e.g. (seed, epoch, rank), into one 32-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def preserve_rng_state(devices: Sequence[int] | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch on exit.

    Args:
        devices (Sequence[int], optional): CUDA devices to restore besides the CPU. Defaults to
            None: the current device, if there is one.
    """
    python, numpy = random.getstate(), np.random.get_state()
    if devices is None:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch on the CPU; restore their states on exit."""
    with preserve_rng_state(devices=()):    # data loader workers must not touch CUDA
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
