"""Exact resume: samples, random numbers and learning rates of the uninterrupted run."""
import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from nepa_mm.datasets.samplers import BatchIterator, ResumableSampler, SeededSamples
from nepa_mm.utils.random_state import derive_seed


def run_seed(runner: Runner) -> int:
    """The seed shared by all processes, without the rank that ``diff_rank_seed`` adds."""
    return runner.seed - dist.get_rank() * bool(runner._randomness_cfg.get('diff_rank_seed'))


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Resume exactly, in epoch-based and iteration-based loops.

    Random states are derived, not saved, so nothing depends on the number of workers:

    - The run counts samples. A resumed run continues with the next sample. No sample is lost or
      repeated, also with another number of processes or another batch size. If the samples
      seen are not a multiple of the new global batch, less than one iteration is repeated.
    - Augmentations of a sample are seeded by (seed, pass over the data, sample index), below
      any wrapper of the data set.
    - Before each iteration every process seeds its generators by (seed, pass, position of its
      first sample). The network's draws (RoPE rescale, drop path, masks) come from there.
    - Schedules and optimizer settings follow the config, at the progress of the run. Another
      iteration size, length or learning rate counts from the resume on. Schedulers that
      follow a metric continue the checkpoint's state, as in mmengine.

    On the CPU, a run saved after an update resumes bit for bit; gradients of an unfinished
    accumulation are lost. Another number of processes adds numbers in another order. mmengine's
    own schedulers count micro-steps where gradients accumulate.

    ``checkpoint['meta']['run']`` records integers: ``seed``, ``num_samples`` of the data set,
    ``batch_size``, ``num_processes``, ``accumulative_counts``, ``epoch_length`` in iterations,
    ``passes`` over the data completed, ``position`` in samples within the current pass, and
    ``seen``, the total of samples.

    Raises:
        ValueError: The checkpoint of an iteration-based run has seen more samples than the
            config's run has.
    """

    priority = 'VERY_HIGH'
    passes = position = 0   # completed passes, and samples of all processes in the current one
    settings = None         # of the optimizer's groups, if a resumed run follows the config

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
        """Record the progress in samples; the size of an iteration may change."""
        checkpoint['meta']['run'] = self._record(runner)

    # ------------------------------------------------------------------ resume

    def after_load_checkpoint(self, runner, checkpoint):
        """Take the progress from the checkpoint, and the schedule from the config."""
        loop = runner._train_loop
        if not (runner._resume and isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop))):
            return
        meta, length, samples = checkpoint['meta'], len(loop.dataloader), self._samples(runner)
        old = meta.get('run')
        if old:
            self.passes, self.position = old['passes'], old['position']
        else:       # saved without this hook: count iterations
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
        """Move data and schedule to the progress of the run."""
        loop, sampler = runner.train_loop, self._sampler(runner)
        if hasattr(sampler.sampler, 'seed') and 'seed' not in (
                runner.cfg.get('train_dataloader', {}).get('sampler') or {}):
            sampler.sampler.seed = run_seed(runner)
        dataset = loop.dataloader.dataset
        sampler.bare = not hasattr(dataset, '__dict__')
        if sampler.bare:
            runner.logger.warning(f'A {type(dataset).__name__} has no attributes, so the draws '
                                  'of its samples are not repeated after a resume.')
        else:
            dataset.__getitems__ = SeededSamples(dataset, run_seed(runner))
        if isinstance(loop, IterBasedTrainLoop):
            asks = not hasattr(loop.dataloader_iterator, 'skip_iter')   # mmengine before 0.10.8
            loop.dataloader._iterator = None    # its workers started before all hooks
            loop.dataloader_iterator = BatchIterator(
                loop.dataloader, self.passes, loop.iter if asks else 0)
            self._skip_seen(runner)
        if self.settings:
            self._follow_config(runner)

    def _follow_config(self, runner):
        """Replay the config's settings and schedules up to the current iteration."""
        saved = settings_of(runner)
        for group, settings in zip(runner.optim_wrapper.param_groups, self.settings):
            group.update(settings)
        self.settings = None
        runner.optim_wrapper._global_step = runner.iter     # avoids torch's warning
        schedulers, length = runner.param_schedulers or [], len(runner.train_loop.dataloader)
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        for i in range(1, min(runner.iter, runner.max_iters) + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch or by_epoch and i % length == 0:
                    scheduler.step()
        now = settings_of(runner)
        changed = {key: (old[key], new[key]) for old, new in zip(saved, now) for key in new
                   if key in old and old[key] != new[key]
                   and not key.startswith(('initial_', 'name'))}
        if changed:
            runner.logger.warning(
                f'The optimizer follows the config from iteration {runner.iter + 1} on, not the '
                'checkpoint: ' + ', '.join(f'{key} is {new} and was {old}'
                                           for key, (old, new) in changed.items()) + '.')

    def _skip_seen(self, runner):
        """Let the sampler skip what this pass has seen."""
        batches, samples = runner.train_loop.dataloader.batch_sampler, self._samples(runner)
        done = min(self.position // samples, runner.max_iters)
        self.position = done * samples
        if done:
            runner.logger.info(f'Continuing epoch {self.passes + 1} after {done} iterations.')
        batches.sampler.skip = done * batches.batch_size

    # ------------------------------------------------------------------ training

    def before_train_epoch(self, runner):
        """Skip what this epoch has seen."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._skip_seen(runner)
            self._sampler(runner).set_epoch(runner.epoch)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Seed the generators of this process."""
        seed = derive_seed(run_seed(runner), self.passes, self.position + dist.get_rank())
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed is slow: it records a traceback for every absent kind of device
        torch.default_generator.manual_seed(seed)
        if get_device() == 'cuda':
            torch.cuda.manual_seed(seed)
        elif get_device() != 'cpu':
            torch.manual_seed(seed)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count the samples of all processes."""
        self.position += self._samples(runner)
        complete = self.position // self._samples(runner) >= len(runner.train_loop.dataloader)
        if isinstance(runner.train_loop, IterBasedTrainLoop) and complete and not (
                self._sampler(runner).endless):
            self.passes, self.position = self.passes + 1, 0

    def after_train_epoch(self, runner):
        """Start a new pass."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self.passes, self.position = runner.epoch + 1, 0


def settings_of(runner: Runner) -> list[dict]:
    """The settings of each parameter group: learning rate, weight decay and so on."""
    return [{key: value for key, value in group.items() if key != 'params'}
            for group in runner.optim_wrapper.param_groups]


def differences_of_runs(old: dict, new: dict, runner: Runner, iteration: int) -> Iterator[str]:
    """Yield one sentence for each difference between the resumed run and the checkpoint's.

    Args:
        old, new (dict): ``meta['run']`` of the checkpoint, empty if it has none, and of this run.
        runner (Runner): This run.
        iteration (int): Completed iterations of this run.

    Raises:
        ValueError: The checkpoint is further than the end of this run.
    """
    if not old:
        return
    if old['seed'] != new['seed']:
        yield (f'The seed {old["seed"]} of the checkpoint is used, not the '
               f'{new["seed"]} of this run.')
    if old['num_samples'] != new['num_samples']:
        within = ', and within this epoch some are skipped or repeated' * bool(new['position'])
        yield (f'The training data has {new["num_samples"]} samples and had {old["num_samples"]}: '
               f'from here on they come in another order{within}.')
    parts = ('num_processes', 'batch_size', 'accumulative_counts')
    before, now = ([run[part] for part in parts] for run in (old, new))
    if before == now:
        return
    words = '{} processes x {} samples x {} accumulated'
    sentence = f'The run continues with {words.format(*now)} (it had {words.format(*before)})'
    if isinstance(runner.train_loop, IterBasedTrainLoop) and before[0] * before[1] != (
            now[0] * now[1]):
        length = runner.max_iters * now[0] * now[1]
        if iteration >= runner.max_iters:
            raise ValueError(
                f'The checkpoint has seen {new["seen"]} samples, and train_cfg.max_iters='
                f'{runner.max_iters} ends this run after {length} (an iteration has '
                f'{now[0] * now[1]} samples and had {before[0] * before[1]}); raise max_iters and '
                'the ends of param_scheduler.')
        sentence += (f'; {iteration} of {runner.max_iters} iterations ({new["seen"]} of {length} '
                     'samples) are done')
    yield sentence + '.'
