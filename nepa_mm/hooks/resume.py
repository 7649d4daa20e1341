"""A resumed run draws the random numbers, and sees the samples, of an uninterrupted one."""
import random
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop


def derive_seed(*numbers):
    """One seed of 32 bits for several numbers, e.g. (seed, epoch, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def run_seed(runner):
    """The seed that all processes share; mmengine adds the rank for ``diff_rank_seed``."""
    return runner.seed - dist.get_rank() * bool(runner._randomness_cfg.get('diff_rank_seed'))


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


class SeededPipeline(Compose):
    """A pipeline whose draws depend on (seed, epoch, sample) and on nothing else.

    So they are the same for any number of workers and processes, and after a resume.

    Args:
        transforms (list): Those of the data set.
        seed (int): Seed of the run.
    """

    def __init__(self, transforms, seed):
        super().__init__(transforms)
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()     # workers read it

    def __call__(self, data):
        """Transform a sample, a dict with ``sample_idx``."""
        with seeded(derive_seed(self.seed, int(self.epoch), data['sample_idx'])):
            return super().__call__(data)


class Remaining:
    """A sampler without its first ``num`` indices, of unchanged length."""

    def __init__(self, sampler, num):
        self.sampler, self.num = sampler, num

    def __iter__(self):
        return islice(iter(self.sampler), self.num, None)

    def __len__(self):
        return len(self.sampler)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Random numbers from (seed, rank, iteration) and (seed, epoch, sample); no sample twice.

    What random generators would have to remember is derived instead, so checkpoints need
    not hold it and nothing depends on the number of workers:

    - Before an iteration every process seeds its generators from (seed, rank, iteration);
      what the network draws (RoPE rescale, drop path, the order of a mask) comes from there.
    - In an epoch-based loop the augmentations of a sample are drawn from (seed, epoch,
      sample), and a run resumed in the middle of an epoch goes on with the next sample:
      none is lost or seen twice, also by another number of processes or another batch size,
      provided that what was seen makes whole iterations of theirs.

    On the CPU a resumed run is thereby the uninterrupted one bit for bit, provided that it was
    saved after an update: gradients of an unfinished accumulation are lost.

    Iteration-based loops keep mmengine's rule for data: the sampler continues where it was, and
    augmentations start from the seeds of the workers again, so they are not the same draws.
    """

    priority = 'VERY_HIGH'
    position = 0    # samples of this epoch that all processes have seen

    @staticmethod
    def _samples(runner, iterations=1):
        """Samples of all processes in so many iterations."""
        batches = runner.train_loop.dataloader.batch_sampler
        return iterations * batches.batch_size * dist.get_world_size()

    def before_save_checkpoint(self, runner, checkpoint):
        """Note the position, for iterations may come to be of another size."""
        checkpoint['meta']['position'] = self.position

    def after_load_checkpoint(self, runner, checkpoint):
        """Take the position of a checkpoint to resume; an older one gives it in iterations."""
        if runner._resume and isinstance(runner._train_loop, EpochBasedTrainLoop):
            meta, length = checkpoint['meta'], len(runner.train_loop.dataloader)
            self.position = meta.get('position', self._samples(
                runner, meta['iter'] - meta['epoch'] * length))

    def before_train_epoch(self, runner):
        """Tell the workers the epoch, and skip what it has seen already."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        loader = runner.train_loop.dataloader
        dataset = loader.dataset
        if hasattr(dataset, 'pipeline'):
            if not isinstance(dataset.pipeline, SeededPipeline):
                dataset.pipeline = SeededPipeline(dataset.pipeline.transforms, run_seed(runner))
            dataset.pipeline.epoch.fill_(runner.epoch)
        done = self.position // self._samples(runner)
        if done:
            runner.logger.info(f'Continuing epoch {runner.epoch + 1} after {done} iterations.')
            batches = loader.batch_sampler
            batches.sampler = Remaining(batches.sampler, done * batches.batch_size)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Seed the generators of this process."""
        seed = derive_seed(run_seed(runner), dist.get_rank(), runner.iter)
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed takes a traceback for every kind of device that is not there
        torch.default_generator.manual_seed(seed)
        if get_device() == 'cuda':
            torch.cuda.manual_seed(seed)
        elif get_device() != 'cpu':
            torch.manual_seed(seed)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self.position += self._samples(runner)

    def after_train_epoch(self, runner):
        """The next epoch is a whole one."""
        self.position = 0
        batches = runner.train_loop.dataloader.batch_sampler
        if isinstance(getattr(batches, 'sampler', None), Remaining):
            batches.sampler = batches.sampler.sampler
