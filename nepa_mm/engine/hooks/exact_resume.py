"""A resumed run is the uninterrupted one: its samples, random numbers and learning rates."""
import random

import numpy as np
import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from nepa_mm.datasets.samplers import BatchIterator, ResumableSampler, SeededSamples
from nepa_mm.utils.random_state import derive_seed


def run_seed(runner):
    """The seed that all processes share; mmengine adds the rank for ``diff_rank_seed``."""
    return runner.seed - dist.get_rank() * bool(runner._randomness_cfg.get('diff_rank_seed'))


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """The samples, random numbers and schedule of an uninterrupted run, in both kinds of loop.

    What random generators would have to remember is derived instead, so checkpoints need
    not hold it and nothing depends on the number of workers:

    - A run counts samples. One that is resumed goes on with the next sample: none is lost or seen
      twice, also by another number of processes or another batch size; where what was seen makes
      no whole iterations of theirs, fewer samples than an iteration has are seen again.
    - The augmentations of a sample are drawn from (seed, pass over the data, sample), whatever
      wraps the data set.
    - Before an iteration every process seeds its generators from (seed, pass, place of its first
      sample); what the network draws (RoPE rescale, drop path, the order of a mask) comes from
      there.
    - Schedules are those of the config, at the place of the run: iterations of another size, a run
      of another length, and other learning rates count from the resume on. So do the other settings
      of the optimizer. Schedulers that follow a metric keep mmengine's rule: the checkpoint's
      state goes on.

    On the CPU a resumed run is thereby the uninterrupted one bit for bit, provided that it was
    saved after an update: gradients of an unfinished accumulation are lost. Another number of
    processes adds numbers in another order, and mmengine's own schedulers count micro-steps where
    gradients accumulate.

    ``checkpoint['meta']['run']`` records, as integers, ``seed``, ``num_samples`` of the data,
    ``batch_size``, ``num_processes``, ``accumulative_counts``, ``epoch_length`` in iterations, the
    ``passes`` over the data that are done, ``position`` in samples within the present one, and
    ``seen``, all samples so far.

    Raises:
        ValueError: An iteration-based run was longer than the config's when it was saved, counted
            in samples.
    """

    priority = 'VERY_HIGH'
    passes = position = 0   # whole passes over the data, samples of all processes since then
    settings = None         # of the optimizer's groups, where a resumed run follows the config

    @staticmethod
    def _samples(runner):
        """Samples of all processes in one iteration."""
        return runner.train_loop.dataloader.batch_sampler.batch_size * dist.get_world_size()

    @staticmethod
    def _sampler(runner):
        """The sampler, wrapped at first use."""
        batches = runner.train_loop.dataloader.batch_sampler
        if not isinstance(batches.sampler, ResumableSampler):
            batches.sampler = ResumableSampler(batches.sampler)
        return batches.sampler

    def _record(self, runner):
        loader = runner.train_loop.dataloader
        num = len(loader.dataset)
        return dict(
            seed=run_seed(runner), num_samples=num, batch_size=loader.batch_sampler.batch_size,
            num_processes=dist.get_world_size(),
            accumulative_counts=getattr(runner.optim_wrapper, '_accumulative_counts', 1),
            epoch_length=len(loader), passes=self.passes, position=self.position,
            seen=self.passes * num + (self.position if self._sampler(runner).endless
                                      else min(self.position, num)))

    def before_save_checkpoint(self, runner, checkpoint):
        """Note where the run is, for iterations may come to be of another size."""
        checkpoint['meta']['run'] = self._record(runner)

    # ------------------------------------------------------------------ resume

    def after_load_checkpoint(self, runner, checkpoint):
        """Take the place of a checkpoint to resume, and the schedule of the config."""
        loop = runner._train_loop
        if not (runner._resume and isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop))):
            return
        meta, length, samples = checkpoint['meta'], len(loop.dataloader), self._samples(runner)
        old = meta.get('run')
        if old:
            self.passes, self.position = old['passes'], old['position']
        else:       # of a run without this hook: by its iterations
            endless = self._sampler(runner).endless
            self.passes = 0 if endless else meta['iter'] // length
            self.position = (meta['iter'] - self.passes * length) * samples
        meta['iter'] = self.passes * length + self.position // samples
        for sentence in differences_of_runs(old or {}, self._record(runner), runner, meta['iter']):
            runner.logger.warning(sentence)
        schedulers = runner.param_schedulers or []
        if (isinstance(schedulers, list) and isinstance(runner.optim_wrapper, OptimWrapper)
                and not any(getattr(one, 'need_val_args', False) for one in schedulers)):
            self.settings = settings_of(runner)
            checkpoint.pop('param_schedulers', None)

    def before_train(self, runner):
        """Go to the place of the run, in data and schedule."""
        loop, sampler = runner.train_loop, self._sampler(runner)
        if hasattr(sampler.sampler, 'seed') and 'seed' not in (
                runner.cfg.get('train_dataloader', {}).get('sampler') or {}):
            sampler.sampler.seed = run_seed(runner)
        dataset = loop.dataloader.dataset
        sampler.bare = not hasattr(dataset, '__dict__')
        if sampler.bare:
            runner.logger.warning(f'A {type(dataset).__name__} as data set takes no attribute, so '
                                  'what its samples draw is not repeated after a resume.')
        else:
            dataset.__getitems__ = SeededSamples(dataset, run_seed(runner))
        if isinstance(loop, IterBasedTrainLoop):
            asks = not hasattr(loop.dataloader_iterator, 'skip_iter')   # mmengine before 0.10.8
            loop.dataloader._iterator = None    # and its workers start before all hooks
            loop.dataloader_iterator = BatchIterator(
                loop.dataloader, self.passes, loop.iter if asks else 0)
            self._go_to_place(runner)
        if self.settings:
            self._follow_config(runner)

    def _follow_config(self, runner):
        """Take settings and schedules from the config, up to the iteration at hand."""
        saved = settings_of(runner)
        for group, settings in zip(runner.optim_wrapper.param_groups, self.settings):
            group.update(settings)
        self.settings = None
        runner.optim_wrapper._global_step = runner.iter     # silences a warning about the order
        schedulers, length = runner.param_schedulers or [], len(runner.train_loop.dataloader)
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        for i in range(1, min(runner.iter, runner.max_iters) + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch or by_epoch and i % length == 0:
                    scheduler.step()
        now = settings_of(runner)
        changed = {key: (old[key], new[key]) for old, new in zip(saved, now) for key in new
                   if key in old and not key.startswith('initial_') and old[key] != new[key]}
        if changed:
            runner.logger.warning(
                f'The optimizer follows the config from iteration {runner.iter + 1} on, not the '
                'checkpoint: ' + ', '.join(f'{key} is {new} and was {old}'
                                           for key, (old, new) in changed.items()) + '.')

    def _go_to_place(self, runner):
        """Let the sampler begin where the run is."""
        batches, samples = runner.train_loop.dataloader.batch_sampler, self._samples(runner)
        done = min(self.position // samples, runner.max_iters)
        self.position = done * samples
        if done:
            runner.logger.info(f'Continuing epoch {self.passes + 1} after {done} iterations.')
        batches.sampler.skip = done * batches.batch_size

    # ------------------------------------------------------------------ training

    def before_train_epoch(self, runner):
        """Skip what this epoch has seen already."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._go_to_place(runner)
            self._sampler(runner).set_epoch(runner.epoch)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Seed the generators of this process."""
        seed = derive_seed(run_seed(runner), self.passes, self.position + dist.get_rank())
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
        self.position += self._samples(runner)
        whole = self.position // self._samples(runner) >= len(runner.train_loop.dataloader)
        if isinstance(runner.train_loop, IterBasedTrainLoop) and whole and not (
                self._sampler(runner).endless):
            self.passes, self.position = self.passes + 1, 0

    def after_train_epoch(self, runner):
        """The next epoch is a whole one."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self.passes, self.position = runner.epoch + 1, 0


def settings_of(runner):
    """Learning rate, weight decay and the like of each group of the optimizer."""
    return [{key: value for key, value in group.items() if key != 'params'}
            for group in runner.optim_wrapper.param_groups]


def differences_of_runs(old, new, runner, iteration):
    """Sentences about what differs between a run and the one that it goes on with.

    Args:
        old, new (dict): ``meta['run']`` of the checkpoint, and of this run; an empty ``old`` says
            nothing.
        runner (Runner): This run.
        iteration (int): How many of its iterations are done.

    Raises:
        ValueError: More is done than the run is long.
    """
    if not old:
        return
    if old['seed'] != new['seed']:
        yield (f'The seed {old["seed"]} of the checkpoint goes on, not the '
               f'{new["seed"]} of this run.')
    if old['num_samples'] != new['num_samples']:
        within = ', and within this epoch some are left out or seen twice' * bool(new['position'])
        yield (f'The training data has {new["num_samples"]} samples and had {old["num_samples"]}: '
               f'from here on they come in another order{within}.')
    parts = ('num_processes', 'batch_size', 'accumulative_counts')
    before, now = ([run[part] for part in parts] for run in (old, new))
    if before == now:
        return
    words = '{} processes x {} samples x {} accumulated'
    sentence = f'The run goes on with {words.format(*now)} (it had {words.format(*before)})'
    if isinstance(runner.train_loop, IterBasedTrainLoop) and before[0] * before[1] != (
            now[0] * now[1]):
        length = runner.max_iters * now[0] * now[1]
        if iteration >= runner.max_iters:
            raise ValueError(
                f'The checkpoint has seen {new["seen"]} samples, and train_cfg.max_iters='
                f'{runner.max_iters} ends this run after {length}, for an iteration has '
                f'{now[0] * now[1]} and had {before[0] * before[1]}; raise max_iters and the ends '
                'of param_scheduler.')
        sentence += (f'; its {runner.max_iters} iterations are {length} samples, of which '
                     f'{iteration} and {new["seen"]} are done')
    yield sentence + '.'
