"""Log what runs, on which data, from which weights, for how long, and where its output goes."""
import datetime
import time
from pathlib import Path

import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmpretrain.models.selfsup.base import BaseSelfSupervisor

from nepa_mm.checkpoints.loading import unwrapped
from nepa_mm.utils.nested import iter_dicts

WARMUP, MEASURED = 5, 20    # iterations skipped, and the one after which the time is estimated


def log_summary(runner: Runner, stage: str) -> None:
    """Log five lines about a run that is built but not started.

    Args:
        runner (Runner): Returned by :func:`nepa_mm.apis.start_runner`.
        stage (str): 'train' or 'test'.
    """
    model = unwrapped(runner.model)
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    count = f'{sum(sizes) / 1e6:.2f} M parameters'
    if stage == 'train':
        count += f', {trained / 1e6:.2f} M of them trained'
    backbone = type(getattr(model, 'backbone', model)).__name__
    runner.logger.info(f'{_task(model, stage)}: {type(model).__name__} with {backbone}, {count}.')
    runner.logger.info(f'Data: {_data(runner, stage)}.')
    if stage == 'train':
        runner.logger.info(f'Weights: {_weights(runner)}.')
        runner.logger.info(f'Length: {_length(runner)}. Log lines show the time left as "eta".')
    else:
        runner.logger.info(f'Length: {len(runner.test_loop.dataloader)} batches.')
    runner.logger.info(f'Output: {runner.work_dir}; environment and config are in '
                       f'{Path(runner.log_dir, f"{runner.timestamp}.log")}.')


def _task(model, stage):
    if stage == 'test':
        return 'Test'
    if hasattr(model, 'decode_head'):
        return 'Segmentation training'
    if isinstance(model, BaseSelfSupervisor):
        return 'Pretraining'
    return 'Classification training'


def _images(loader):
    dataset = inner = loader.dataset
    while hasattr(inner, 'dataset'):    # a wrapper
        inner = inner.dataset
    name = type(inner).__name__
    return f'{len(dataset):,} images of {name}' if hasattr(dataset, '__len__') else name


def _data(runner, stage):
    loader = runner.train_dataloader if stage == 'train' else runner.test_loop.dataloader
    processes, device = dist.get_world_size(), get_device()
    text = _images(loader)
    if stage == 'train' and runner.val_loop is not None:
        text += f', validation on {_images(runner.val_loop.dataloader)}'
    size, factors = loader.batch_size, f'{processes} process{"es" * (processes > 1)} on {device}'
    if size is None:
        return f'{text}; {factors}'
    text += f'; {factors} x batches of {size}'
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1) if stage == 'train' else 1
    return text + f' x {counts} accumulated = {processes * size * counts} images per update' * (
        stage == 'train')


def _weights(runner):
    load_from, resume = runner._load_from, runner._resume
    if resume and load_from:
        return f'resumed from {load_from}'
    if resume and any(Path(runner.work_dir).glob('*.pth')):
        return f'resumed from the latest intact checkpoint in {runner.work_dir}'
    if load_from:
        return str(load_from)
    files = [node['checkpoint'] for node in iter_dicts(runner.cfg.get('model') or {})
             if node.get('type') == 'Pretrained' and node.get('checkpoint')]
    return ', '.join(files) + ' (init_cfg)' if files else 'random'


def _length(runner):
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        each = len(loop.dataloader)
        return f'{loop.max_epochs} epochs of {each:,} iterations = {loop.max_iters:,} iterations'
    return f'{loop.max_iters:,} iterations'


class TimeEstimateHook(Hook):
    """Log once, after a few iterations, how long the rest of the training will take."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.done, self.start = 0, None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Measure the iterations after the warmup."""
        self.done += 1
        if self.done == WARMUP:
            self.start = self._now()
        elif self.done == MEASURED and runner.max_iters > runner.iter + 1:
            seconds = (self._now() - self.start) / (MEASURED - WARMUP)
            left = datetime.timedelta(seconds=round(seconds * (runner.max_iters - runner.iter - 1)))
            runner.logger.info(f'About {left} left at {seconds:.3g} s per iteration, without '
                               'validations and checkpoints.')

    @staticmethod
    def _now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()    # the host runs ahead
        return time.perf_counter()
