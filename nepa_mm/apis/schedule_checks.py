"""Batches, lengths, schedules and averages that do not fit a run."""
import math

from mmengine import dist
from mmengine.hooks import EMAHook
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.runner import EpochBasedTrainLoop

from nepa_mm.checkpoints.loading import unwrapped
from nepa_mm.datasets.transforms.timm_augment import TimmBatchAugment

# Schedulers that leave the learning rate at its last value, small as a rule, when they end early.
FALLING = ('LayerDecayCosineLR', 'CosineAnnealingLR', 'CosineRestartLR', 'PolyLR', 'OneCycleLR')


def check_batches(runner, loader):
    """Refuse batches that the training data cannot fill, and odd ones where Mixup needs pairs.

    Raises:
        ValueError: There is no batch; Mixup would get an odd number of images.
    """
    num, batches = len(loader.dataset), loader.batch_sampler
    size, drop_last = (getattr(batches, name, None) for name in ('batch_size', 'drop_last'))
    if not num:
        raise ValueError('train_dataloader has no image.')
    share = math.ceil(num / dist.get_world_size())
    if not len(loader):
        processes = f' for each of {dist.get_world_size()} processes' * (share < num)
        raise ValueError(f'train_dataloader.batch_size is {size}, but the data set has {share} '
                         f'images{processes} and drop_last is on: there is no whole batch.')
    preprocessor = getattr(unwrapped(runner.model), 'data_preprocessor', None)
    augments = getattr(getattr(preprocessor, 'batch_augments', None), 'augments', [])
    if size and any(isinstance(augment, TimmBatchAugment) for augment in augments):
        last = 0 if drop_last else share % size
        if size % 2 or last % 2:
            raise ValueError(
                'Mixup pairs the images of a batch, so its size must be even: '
                f'train_dataloader.batch_size is {size}'
                + (f' and the last batch has {last} images; set train_dataloader.drop_last=True.'
                   if last % 2 else '.'))


def check_length(loop):
    """Refuse runs of no step, and intervals of 0.

    Raises:
        ValueError: The sentence names the key of train_cfg.
    """
    length = 'max_epochs' if isinstance(loop, EpochBasedTrainLoop) else 'max_iters'
    for name in (length, 'val_interval'):
        value = getattr(loop, name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} must be an integer from 1, got {value!r}.')


def check_best(runner):
    """Refuse a ``save_best`` that the metrics, where they are known ones, do not give.

    Raises:
        ValueError: The sentence says what they give.
    """
    known = set()
    for metric in runner.val_loop.evaluator.metrics:
        if type(metric).__name__ == 'Accuracy' and tuple(metric.thrs or ()) == (0.,):
            topk = (metric.topk,) if isinstance(metric.topk, int) else metric.topk
            known |= {f'{metric.prefix}/top{k}' for k in topk}
        elif 'IoUMetric' in type(metric).__name__ and not metric.prefix:
            known |= {'aAcc', 'mIoU', 'mAcc', 'mDice', 'mFscore', 'mPrecision', 'mRecall'}
        else:
            return
    for hook in runner.hooks if known else ():
        best = getattr(hook, 'save_best', None) or ()
        for name in [best] if isinstance(best, str) else best:
            if name not in known | {'auto'} and name.removesuffix('_raw') not in known:
                raise ValueError(f'default_hooks.checkpoint.save_best is {name}, but the '
                                 f'evaluation gives {", ".join(sorted(known))}.')


def schedule_problems(runner):
    """Sentences about schedulers that end with another step than the run."""
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = [one for group in schedulers.values() for one in group]
    sentences = []
    for by_epoch in (True, False):
        length = runner.max_epochs if by_epoch else runner.max_iters
        ends = [(end_of(one), type(one).__name__) for one in schedulers
                if one.by_epoch == by_epoch and end_of(one) < INF]
        for end, name in sorted(ends)[-1:]:
            if end > length or end < length and name in FALLING:
                unit, step = ('epoch', 1) if by_epoch else ('iteration', 1)
                iterations = len(runner.train_dataloader)
                if not by_epoch and not end % iterations and length == (
                        runner.max_epochs * iterations):    # a config that counts epochs
                    unit, step = 'epoch', iterations
                sentences.append(
                    f'param_scheduler: {name} ends after {unit} {end // step}, but the run after '
                    f'{length // step}; set param_scheduler.end={length // step} (or T_max, '
                    'milestones ...), or train_cfg to the length of the schedule.')
    return sentences


def end_of(scheduler):
    """The step at which a scheduler has done all that it does, ``INF`` if it does not say.

    mmengine fills in ``end`` with the length of the run, so the shape's own length counts first.
    """
    for name in ('T_max', 'total_steps', 'step_size', 'milestones', 'cumulative_periods'):
        length = getattr(scheduler, name, None)
        if length:
            return scheduler.begin + (length if isinstance(length, int) else max(length))
    return getattr(scheduler, 'end', INF)


def averages(runner):
    """(hook, momentum, share of the first weights at the end of the run, updates) of each EMA."""
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    for hook in runner.hooks:
        momentum = getattr(getattr(hook, 'ema_model', None), 'momentum', None)
        if isinstance(hook, EMAHook) and momentum:
            updates = math.ceil(runner.max_iters / counts) // hook.ema_model.interval
            yield hook, momentum, (1 - momentum) ** max(updates - 1, 0), updates


def _average_sentence(hook, momentum, share, updates):
    return (f'{type(hook).__name__}: with momentum {momentum:g} and {updates} updates the average '
            f'stays {math.floor(100 * share)} % the first weights; a momentum of '
            f'{min(10 / max(updates, 1), 0.5):.1g} would suit this run.')


def average_problems(runner):
    """Sentences about averages that are their first weights for the most part."""
    return [_average_sentence(*one) for one in averages(runner) if one[2] > 0.5]


def idle_averages(runner):
    """Sentences about averages in which the first weights still count."""
    return [_average_sentence(*one) for one in averages(runner) if 0.05 < one[2] <= 0.5]


def silent_hooks(runner):
    """Sentences about monitors whose interval is longer than the run."""
    return [f'{type(hook).__name__} speaks every {hook.interval} iterations, and the run has '
            f'{runner.max_iters}: it never does; set its interval.'
            for hook in runner.hooks
            if type(hook).__name__ in ('NEPAMonitorHook', 'ThroughputHook')
            and hook.interval > runner.max_iters]
