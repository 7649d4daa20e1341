"""Samples that are the same after a resume, for any number of workers and processes."""
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from nepa_mm.utils.random_state import derive_seed, fixed_seed


class SeededSamples:
    """``__getitems__`` of a dataset, which torch's DataLoader calls for a batch.

    The random numbers of a sample depend only on (seed, pass over the data, index). A sample is
    therefore the same for any number of workers and processes, after a resume, and in any wrapper.

    Args:
        dataset (Dataset): Any dataset with ``__getitem__``.
        seed (int): Seed of the run.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __call__(self, pairs: Iterable[tuple[int, int]]) -> list:
        """Return the samples of (pass, index) pairs, as :class:`ResumableSampler` yields them."""
        samples = []
        for number, index in pairs:
            with fixed_seed(derive_seed(self.seed, number, index)):
                samples.append(self.dataset[index])
        return samples


class ResumableSampler:
    """Yield each index of a sampler with the number of its pass over the data.

    Args:
        sampler (Sampler): Finite, or mmengine's InfiniteSampler.
    """

    def __init__(self, sampler: Sampler):
        self.sampler, self.epoch = sampler, 0
        self.skip = 0       # indices of this process to skip at the next start
        self.bare = False   # whether to yield indices alone

    @property
    def endless(self) -> bool:
        """Whether the sampler never ends, as InfiniteSampler. A pass has ``size`` samples."""
        return hasattr(self.sampler, '_indices_of_rank')

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that the next iterator begins with."""
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator:
        skip, number, sampler = self.skip, self.epoch, self.sampler
        self.skip = 0
        if self.endless:    # restart, whatever was drawn before
            sampler.indices = sampler._indices_of_rank()
        for i, index in islice(enumerate(sampler), skip, None):
            if self.endless:
                number = (i * sampler.world_size + sampler.rank) // sampler.size
            yield index if self.bare else (number, index)

    def __len__(self) -> int:
        return len(self.sampler)


class BatchIterator:
    """Batches for an IterBasedTrainLoop; mmengine's iterator would resume at the wrong sample.

    Workers start with the first request for a batch, after all hooks ran.

    Args:
        loader (DataLoader): Its sampler is a :class:`ResumableSampler` set to the first sample.
        passes (int): Completed passes over the data.
        done (int): Number of batches that the loop will request to skip what was seen. Each such
            request returns None.
    """

    def __init__(self, loader: DataLoader, passes: int, done: int):
        self.loader, self.passes, self.done, self.batches = loader, passes, done, ()

    def skip_iter(self, num_iters: int) -> None:
        """Called by mmengine >= 0.10.8 instead of requesting the batches to skip."""
        self.done = 0

    def __next__(self) -> Any:
        if self.done:
            self.done -= 1
            return None
        batch = next(self.batches, None) if self.batches else None
        if batch is None:       # the first pass, or the next one of a finite sampler
            self.loader.batch_sampler.sampler.set_epoch(self.passes)
            self.passes += 1
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch
