"""The check of a run before its first step: data, classes, schedule, averages, monitors, weights.

What cannot be right raises a ValueError of one sentence; what is odd is one warning.
"""
import logging
import math

from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from .augment import TimmBatchAugment
from .checkpoint import below, check_network, unwrapped, warn_of_other_function
from .classes import (
    align,
    check_labels,
    classes_of,
    follow,
    follow_folders,
    has_labels,
    leaves,
    left_out,
    listed,
    match,
)
from .convert_config import recorded_values

# Options that change how a model computes, not what, and those that tools fill in.
SAME_FUNCTION = ('init_cfg', 'with_cp', 'compile_blocks', 'bf16_residual', 'extensions',
                 'with_label')
# Parts of two configs that are compared before one goes on from the other's checkpoint.
COMPARED = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg',
            'custom_hooks')
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


@HOOKS.register_module()
class RunCheckHook(Hook):
    """Check the whole run before its first step; tools/train.py and tools/test.py always do.

    - Classes: names of training, validation, test data and checkpoint are compared, and labels
      follow the names. ``model.head.num_classes`` is all that a config has to state: it goes to
      the data preprocessor and to Mixup, and ``topk`` of an Accuracy is cut to it.
    - Data: images of the folder that are no samples; evaluations that leave out images.
    - Schedule: it ends with the run.
    - EMA: it has time to leave its first weights. Monitors: their interval fits the run.
    - Weights: ``load_from`` fits the network; what the config resumes by itself is the same
      experiment.

    Args:
        odd (str): What becomes of a schedule of another length than the run and of an average
            that stays where it began: 'error' or 'warn', for trials on purpose. Defaults to
            'error'.
        other_experiment (str): What becomes of a checkpoint to resume whose model or training
            data are not the config's: 'error' or 'warn', which --resume sets. Defaults to 'error'.

    Raises:
        ValueError: Something cannot be right; the sentence says what, and what to do.
    """

    priority = 'HIGHEST'    # before other hooks begin anything

    def __init__(self, odd='error', other_experiment='error'):
        for name, value in dict(odd=odd, other_experiment=other_experiment).items():
            if value not in ('error', 'warn'):
                raise ValueError(f"{name} must be 'error' or 'warn', got {value!r}.")
        self.odd, self.other_experiment = odd, other_experiment
        self.training_data = None
        self.classes, self.source = None, None      # of the head that was loaded

    # ------------------------------------------------------------------ weights

    def after_load_checkpoint(self, runner, checkpoint):
        """Compare weights with the network, and a checkpoint to resume with the config."""
        own, loaded = unwrapped(runner.model).state_dict(), checkpoint.get('state_dict', {})
        source = runner._load_from
        meta = checkpoint.get('meta') or {}
        new = [name for name, tensor in own.items() if not name.startswith('backbone.')
               and (name not in loaded or loaded[name].shape != tensor.shape)]
        if runner._resume and training(runner):     # tests of OpenMMLab's tools resume, too
            self._check_experiment(runner, meta, source)
        else:
            check_network(below(own, 'backbone.'), below(loaded, 'backbone.'), source)
            warn_of_other_function(unwrapped(runner.model), meta, source)
            if new:
                self._warn(f'{source} has no {listed(new)} of that shape: they keep their initial '
                           'value.')
        heads = ('head.', 'decode_head.')
        if (any(name.startswith(heads) for name in loaded)
                and not any(name.startswith(heads) for name in new)):
            self.note_classes(meta, source)

    def note_classes(self, meta, source):
        """Take the names of the outputs of a head that was loaded from the ``meta`` beside it."""
        self.classes, self.source = (meta.get('dataset_meta') or {}).get('classes'), source

    def _check_experiment(self, runner, meta, source):
        """Compare the config that a checkpoint records with that of the run which resumes it."""
        old, new = (recorded_values(text) for text in (
            str(meta.get('config_text', '')), runner.cfg.pretty_text))
        found = {}
        for key in COMPARED if old else ():
            found |= differences(old.get(key), new.get(key), key)
        found = {path: pair for path, pair in found.items()
                 if not set(SAME_FUNCTION) & set(path.split('.'))}
        other = {path: pair for path, pair in found.items()
                 if path.startswith(('model.', 'train_dataloader.dataset.'))}
        if other and self.other_experiment == 'error':
            raise ValueError(
                f'{runner.work_dir} holds a checkpoint of another experiment: {in_words(other)}. '
                'Give another --work-dir, or --no-resume to start anew, or --resume to go on all '
                'the same.')
        if found:
            self._warn(f'The config differs from that of {source}: {in_words(found)}.')

    # ------------------------------------------------------------------ stages

    def check_training_data(self, runner, dataset):
        """Check the training data, once; tools do so before the workers of a loop exist."""
        if self.training_data is not dataset:
            self.training_data = dataset
            self._check_dataset(runner, dataset, 'train_dataloader')

    def before_train(self, runner):
        """Check a training run."""
        check_batches(runner, runner.train_dataloader)
        if (isinstance(runner.train_loop, EpochBasedTrainLoop)
                and 'Infinite' in type(runner.train_dataloader.sampler).__name__):
            raise ValueError('train_dataloader.sampler has no end, and so has no epoch; take '
                             'DefaultSampler, or train_cfg.by_epoch=False with max_iters.')
        train = runner.train_dataloader.dataset
        self.check_training_data(runner, train)
        names = classes_of(leaves(train)[0])
        if self.classes and names and match(names, self.classes, 'train_dataloader', self.source) \
                not in (None, list(range(len(names)))):
            raise ValueError(f'train_dataloader has its classes in another order than the head of '
                             f'{self.source}: set metainfo.classes of the data to '
                             f'{listed(self.classes)}.')
        if runner.val_loop is not None:
            for sentence in align(runner.val_dataloader.dataset, 'val_dataloader', train,
                                  'train_dataloader'):
                self._warn(sentence)
            self._check_evaluation(runner, runner.val_loop, 'val_dataloader')
            check_best(runner)
        for sentence in schedule_problems(runner) + average_problems(runner):
            self._odd(sentence)
        for sentence in idle_averages(runner) + silent_hooks(runner):
            self._warn(sentence)

    def before_val(self, runner):
        """Check a validation that is no part of a training."""
        if not training(runner):
            self._check_evaluation(runner, runner.val_loop, 'val_dataloader')

    def before_test(self, runner):
        """Check a test."""
        self._check_evaluation(runner, runner.test_loop, 'test_dataloader')

    # ------------------------------------------------------------------ parts

    def _check_evaluation(self, runner, loop, whose):
        loader = loop.dataloader
        rest = len(loader.dataset) % (loader.batch_size or 1)
        if loader.drop_last and rest:
            raise ValueError(f'{whose}.drop_last leaves out {rest} of {len(loader.dataset)} images '
                             'of the evaluation; set it to False.')
        follow_folders(loader.dataset, whose)
        if self.classes:
            for sentence in follow(loader.dataset, whose, self.classes, self.source):
                self._warn(sentence)
        head = getattr(unwrapped(runner.model), 'head', None)
        outputs = getattr(head, 'num_classes', None)
        if self.classes and outputs and len(self.classes) != outputs:
            raise ValueError(f'{self.source} names {len(self.classes)} classes '
                             f'({listed(self.classes)}), but model.head.num_classes is {outputs}.')
        num_classes = self._check_dataset(runner, loader.dataset, whose)
        for metric in loop.evaluator.metrics if num_classes else ():
            self._cut_topk(metric, num_classes, f'{whose}: ')

    def _cut_topk(self, owner, num_classes, where=''):
        """Leave out the k of an Accuracy, or of a head that logs one, that are too large."""
        topk = getattr(owner, 'topk', None) or ()
        topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if topk and max(topk) > num_classes:
            owner.topk = tuple(k for k in topk if k <= num_classes) or (1,)
            self._warn(f'{where}{type(owner).__name__} has topk={topk}, and the number of classes '
                       f'is {num_classes}: topk={owner.topk}.')

    def _check_dataset(self, runner, dataset, whose):
        """Labels against folders and outputs; return the number of outputs, None without labels."""
        follow_folders(dataset, whose)
        for sentence in left_out(dataset, whose):
            self._warn(sentence)
        model = unwrapped(runner.model)
        num_classes = getattr(getattr(model, 'head', None), 'num_classes', None)
        if num_classes is None:
            return None
        for leaf in filter(has_labels, leaves(dataset)):
            check_labels(leaf, whose, num_classes)
        if hasattr(model.data_preprocessor, 'num_classes'):
            model.data_preprocessor.num_classes = num_classes   # of its one-hot labels, so Mixup's
        if getattr(model.head, 'cal_acc', False):
            self._cut_topk(model.head, num_classes)
        return num_classes

    def _odd(self, sentence):
        if self.odd == 'error':
            raise ValueError(sentence)
        self._warn(sentence)

    def _warn(self, sentence):
        print_log(sentence, logger='current', level=logging.WARNING)


def training(runner):
    """Whether a run trains; otherwise its loop is not built."""
    return runner._train_loop is not None and not isinstance(runner._train_loop, dict)


# ---------------------------------------------------------------------- time


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


# ---------------------------------------------------------------------- experiments


def differences(old, new, path=''):
    """Where two nested configs differ: {dotted path: (old value, new value)}."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in {**old, **new}:
            found |= differences(old.get(key), new.get(key), f'{path}.{key}'.lstrip('.'))
        return found
    if (isinstance(old, (list, tuple)) and isinstance(new, (list, tuple))
            and len(old) == len(new)):
        found = {}
        for i, pair in enumerate(zip(old, new)):
            found |= differences(*pair, f'{path}.{i}')
        return found
    same = old == new or {str(old), str(new)} <= {'BN', 'SyncBN'}
    return {} if same else {path: (old, new)}


def in_words(found):
    """The first few of :func:`differences`."""
    return '; '.join(f'{path} is {str(new)[:60]} and was {str(old)[:60]}'
                     for path, (old, new) in list(found.items())[:4])
