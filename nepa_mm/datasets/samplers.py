"""Samples that are the same after a resume, for any number of workers and processes."""
from itertools import islice

from nepa_mm.utils.random_state import derive_seed, fixed_seed


class SeededSamples:
    """``__getitems__`` of a data set, by which torch's DataLoader gets a batch.

    What a sample draws depends on (seed, pass over the data, index) and on nothing else. So it is
    the same for any number of workers and processes, after a resume, and within every wrapper.

    Args:
        dataset (Dataset): Any with ``__getitem__``.
        seed (int): Seed of the run.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __call__(self, pairs):
        """The samples of a list of (pass, index), as a :class:`ResumableSampler` yields them."""
        samples = []
        for number, index in pairs:
            with fixed_seed(derive_seed(self.seed, number, index)):
                samples.append(self.dataset[index])
        return samples


class ResumableSampler:
    """The indices of a sampler with the pass over the data to which each belongs.

    Args:
        sampler (Sampler): Finite, or mmengine's InfiniteSampler.
    """

    def __init__(self, sampler):
        self.sampler, self.epoch = sampler, 0
        self.skip = 0       # indices of this process to leave out at the next start
        self.bare = False   # whether to yield indices alone

    @property
    def endless(self):
        """Whether the sampler goes on for ever, in passes of ``size`` samples."""
        return hasattr(self.sampler, '_indices_of_rank')

    def set_epoch(self, epoch):
        """Begin another pass with the next start."""
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)

    def __iter__(self):
        skip, number, sampler = self.skip, self.epoch, self.sampler
        self.skip = 0
        if self.endless:    # from the beginning, whatever was taken before
            sampler.indices = sampler._indices_of_rank()
        for i, index in islice(enumerate(sampler), skip, None):
            if self.endless:
                number = (i * sampler.world_size + sampler.rank) // sampler.size
            yield index if self.bare else (number, index)

    def __len__(self):
        return len(self.sampler)


class BatchIterator:
    """What an IterBasedTrainLoop takes its batches from; mmengine's would go on elsewhere.

    Starts its workers when the first batch is asked for, so after every hook.

    Args:
        loader (DataLoader): Its sampler is a :class:`ResumableSampler`, which knows where to begin.
        passes (int): How many passes over the data are done.
        done (int): How many batches the loop is going to ask for, to get past what was seen.
    """

    def __init__(self, loader, passes, done):
        self.loader, self.passes, self.done, self.batches = loader, passes, done, ()

    def skip_iter(self, num_iters):
        """For mmengine from 0.10.8, which does not ask for them but says how many."""
        self.done = 0

    def __next__(self):
        if self.done:
            self.done -= 1
            return None
        batch = next(self.batches, None) if self.batches else None
        if batch is None:       # the first pass, or the next one of a sampler with an end
            self.loader.batch_sampler.sampler.set_epoch(self.passes)
            self.passes += 1
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch
