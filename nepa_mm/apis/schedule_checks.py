"""Find batches, lengths, schedules, EMA and monitors that do not fit a run."""
import math

from mmengine import dist
from mmengine.hooks import EMAHook
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from nepa_mm.checkpoints.loading import unwrapped
from nepa_mm.datasets.transforms.timm_augment import TimmBatchAugment

# Schedulers that keep the last learning rate, usually a small one, if they end before the run.
DECAYING = ('LayerDecayCosineLR', 'CosineAnnealingLR', 'CosineRestartLR', 'PolyLR', 'OneCycleLR')


def check_batches(runner: Runner, loader: DataLoader) -> None:
    """Reject batches that the training data cannot fill, and odd batch sizes with Mixup.

    Raises:
        ValueError: There is no batch, or Mixup would get an odd number of images.
    """
    num, batches = len(loader.dataset), loader.batch_sampler
    size, drop_last = (getattr(batches, name, None) for name in ('batch_size', 'drop_last'))
    if not num:
        raise ValueError('train_dataloader has no image.')
    own = math.ceil(num / dist.get_world_size())    # images of this process
    if not len(loader):
        processes = f' for each of {dist.get_world_size()} processes' * (own < num)
        raise ValueError(f'train_dataloader.batch_size is {size}, but the data set has {own} '
                         f'images{processes} and drop_last is on: there is no full batch.')
    preprocessor = getattr(unwrapped(runner.model), 'data_preprocessor', None)
    augments = getattr(getattr(preprocessor, 'batch_augments', None), 'augments', [])
    if size and any(isinstance(augment, TimmBatchAugment) for augment in augments):
        last = 0 if drop_last else own % size
        if size % 2 or last % 2:
            raise ValueError(
                'Mixup pairs the images of a batch, so its size must be even: '
                f'train_dataloader.batch_size is {size}'
                + (f' and the last batch has {last} images; set train_dataloader.drop_last=True.'
                   if last % 2 else '.'))


def check_length(loop: BaseLoop) -> None:
    """Reject runs without a step, and a validation interval below 1.

    Raises:
        ValueError: The message names the key of ``train_cfg``.
    """
    length = 'max_epochs' if isinstance(loop, EpochBasedTrainLoop) else 'max_iters'
    for name in (length, 'val_interval'):
        value = getattr(loop, name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} must be an integer from 1, got {value!r}.')


def check_best(runner: Runner) -> None:
    """Reject a ``save_best`` that the metrics do not return; unknown metrics are not checked.

    Raises:
        ValueError: The message lists what the metrics return.
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
                                 f'evaluation returns {", ".join(sorted(known))}.')


def schedule_problems(runner: Runner) -> list[str]:
    """Return messages about schedulers that do not end with the run."""
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = [one for group in schedulers.values() for one in group]
    messages = []
    for by_epoch in (True, False):
        length = runner.max_epochs if by_epoch else runner.max_iters
        ends = [(end_of(one), type(one).__name__) for one in schedulers
                if one.by_epoch == by_epoch and end_of(one) < INF]
        for end, name in sorted(ends)[-1:]:
            if end > length or end < length and name in DECAYING:
                unit, step = ('epoch', 1) if by_epoch else ('iteration', 1)
                iterations = len(runner.train_dataloader)
                if not by_epoch and not end % iterations and length == (
                        runner.max_epochs * iterations):    # a config that counts epochs
                    unit, step = 'epoch', iterations
                messages.append(
                    f'param_scheduler: {name} ends after {unit} {end // step}, but the run after '
                    f'{length // step}; set param_scheduler.end={length // step} (or T_max, '
                    'milestones ...), or train_cfg to the length of the schedule.')
    return messages


def end_of(scheduler: _ParamScheduler) -> int:
    """Return the step after which a scheduler changes nothing, ``INF`` if it has none.

    The length of the shape (``T_max`` ...) takes precedence: mmengine sets ``end`` to the length of
    the run.
    """
    for name in ('T_max', 'total_steps', 'step_size', 'milestones', 'cumulative_periods'):
        length = getattr(scheduler, name, None)
        if length:
            return scheduler.begin + (length if isinstance(length, int) else max(length))
    return getattr(scheduler, 'end', INF)


def slow_ema(runner: Runner, above: float, up_to: float) -> list[str]:
    """Return messages about EMA weights that keep too much of the initial weights.

    Args:
        runner (Runner): About to train.
        above, up_to (float): Range of the fraction of the initial weights at the end of the run.
    """
    counts, messages = getattr(runner.optim_wrapper, '_accumulative_counts', 1), []
    for hook in runner.hooks:
        momentum = getattr(getattr(hook, 'ema_model', None), 'momentum', None)
        if isinstance(hook, EMAHook) and momentum:
            updates = math.ceil(runner.max_iters / counts) // hook.ema_model.interval
            fraction = (1 - momentum) ** max(updates - 1, 0)
            if above < fraction <= up_to:
                messages.append(
                    f'{type(hook).__name__}: with momentum {momentum:g} and {updates} updates, '
                    f'the EMA weights keep {math.floor(100 * fraction)} % of the initial weights; '
                    f'a momentum of {min(10 / max(updates, 1), 0.5):.1g} would suit this run.')
    return messages


def silent_hooks(runner: Runner) -> list[str]:
    """Return messages about monitors whose interval exceeds the run."""
    return [f'{type(hook).__name__} logs every {hook.interval} iterations, but the run has '
            f'{runner.max_iters}: it never logs; set its interval.'
            for hook in runner.hooks
            if type(hook).__name__ in ('NEPAMonitorHook', 'ThroughputHook')
            and hook.interval > runner.max_iters]
