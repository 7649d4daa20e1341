"""Random states that are set for a while and put back."""
import random
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state():
    """Put the random states of Python, NumPy and PyTorch back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def derive_seed(*numbers):
    """One seed of 32 bits for several numbers, e.g. (seed, epoch, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed):
    """Draw from ``seed`` inside, on the CPU, and go on as before after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
