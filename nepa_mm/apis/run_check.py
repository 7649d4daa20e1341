"""Check a run before its first step: data, classes, schedule, EMA, monitors and weights.

An error is a ValueError with a message of one sentence; anything suspicious is logged as a warning.
"""
import logging
from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import Dataset

from nepa_mm.apis.resume_checks import check_state, compare_configs, describe_differences
from nepa_mm.apis.schedule_checks import (
    check_batches,
    check_best,
    schedule_problems,
    silent_hooks,
    slow_ema,
)
from nepa_mm.checkpoints.loading import (
    check_network,
    strip_prefix,
    unwrapped,
    warn_if_function_differs,
)
from nepa_mm.datasets.classes import (
    align_datasets,
    align_to_classes,
    base_datasets,
    check_labels,
    classes_of,
    has_labels,
    match_classes,
    order_by_metainfo,
    skipped_images,
)
from nepa_mm.utils.text import listed


@HOOKS.register_module()
class RunCheckHook(Hook):
    """Check a run before its first step; tools/train.py and tools/test.py always use it.

    - Classes: the names in training, validation and test data and in the checkpoint are compared,
      and labels follow the names. A config has to set ``model.head.num_classes`` only: the data
      preprocessor and Mixup get the same number, and ``topk`` of an Accuracy is limited to it.
    - Data: images of a folder that are not samples; evaluations that skip images.
    - Schedule: it must end with the run.
    - EMA: the momentum must fit the length of the run. Monitors: so must the interval.
    - Weights: ``load_from`` must fit the network. A checkpoint to resume must fit the network, the
      EMA weights and the optimizer; without ``--resume`` it must be the same experiment.

    Args:
        odd (str): 'error' or 'warn': how to treat a schedule that does not end with the run, and
            EMA weights that stay near the initial weights. Use 'warn' for short trials. Defaults to
            'error'.
        other_experiment (str): 'error' or 'warn': how to treat a checkpoint to resume whose model
            or training data differ from the config. ``--resume`` sets 'warn'. Defaults to 'error'.

    Raises:
        ValueError: The run cannot work; the message says why and what to do.
    """

    priority = 'HIGHEST'    # before any other hook acts

    def __init__(self, odd: str = 'error', other_experiment: str = 'error') -> None:
        for name, value in dict(odd=odd, other_experiment=other_experiment).items():
            if value not in ('error', 'warn'):
                raise ValueError(f"{name} must be 'error' or 'warn', got {value!r}.")
        self.odd, self.other_experiment = odd, other_experiment
        self.training_data = None
        self.classes, self.source = None, None      # of the loaded head

    # ------------------------------------------------------------------ weights

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check weights against the network, and a checkpoint to resume against the config."""
        own, loaded = unwrapped(runner.model).state_dict(), checkpoint.get('state_dict', {})
        source = runner._load_from or runner.work_dir
        meta = checkpoint.get('meta') or {}
        new = [name for name, tensor in own.items() if not name.startswith('backbone.')
               and (name not in loaded or loaded[name].shape != tensor.shape)]
        if runner._resume and is_training(runner):      # OpenMMLab's test tools may resume, too
            self._check_experiment(runner, checkpoint, source)
        else:
            check_network(strip_prefix(own, 'backbone.'), strip_prefix(loaded, 'backbone.'), source)
            warn_if_function_differs(unwrapped(runner.model), meta, source)
            if new:
                self._warn(f'{source} has no {listed(new)} of that shape: they keep their initial '
                           'values.')
        heads = ('head.', 'decode_head.')
        if (any(name.startswith(heads) for name in loaded)
                and not any(name.startswith(heads) for name in new)):
            self.note_classes(meta, source)

    def note_classes(self, meta: Mapping, source: str) -> None:
        """Store the class names of a loaded head from the ``meta`` of its checkpoint."""
        self.classes, self.source = (meta.get('dataset_meta') or {}).get('classes'), source

    def _check_experiment(self, runner, checkpoint, source):
        """Compare a checkpoint with the run that resumes from it."""
        found, other = compare_configs(checkpoint['meta'], runner.cfg)
        if other and self.other_experiment == 'error':
            raise ValueError(
                f'{runner.work_dir} holds a checkpoint of another experiment: '
                f'{describe_differences(other)}. Give another --work-dir, or --no-resume to start '
                'anew, or --resume to resume anyway.')
        if found:
            self._warn(f'The config differs from that of {source}: {describe_differences(found)}.')
        for message in check_state(runner, checkpoint, source):
            self._warn(message)

    # ------------------------------------------------------------------ stages

    def check_training_data(self, runner: Runner, dataset: Dataset) -> None:
        """Check the training data once; tools do it before the workers of a loop start."""
        if self.training_data is not dataset:
            self.training_data = dataset
            self._check_dataset(runner, dataset, 'train_dataloader')

    def before_train(self, runner: Runner) -> None:
        """Check a training run."""
        check_batches(runner, runner.train_dataloader)
        if (isinstance(runner.train_loop, EpochBasedTrainLoop)
                and 'Infinite' in type(runner.train_dataloader.sampler).__name__):
            raise ValueError('train_dataloader.sampler is infinite, so there is no epoch; use '
                             'DefaultSampler, or train_cfg.by_epoch=False with max_iters.')
        train = runner.train_dataloader.dataset
        self.check_training_data(runner, train)
        names = classes_of(base_datasets(train)[0])
        if self.classes and names and match_classes(
                names, self.classes, 'train_dataloader', self.source) \
                not in (None, list(range(len(names)))):
            raise ValueError(f'The classes of train_dataloader are in a different order than those '
                             f'of the head of {self.source}: set metainfo.classes of the data to '
                             f'{listed(self.classes)}.')
        if runner.val_loop is not None:
            for message in align_datasets(runner.val_dataloader.dataset, 'val_dataloader', train,
                                          'train_dataloader'):
                self._warn(message)
            self._check_evaluation(runner, runner.val_loop, 'val_dataloader')
            check_best(runner)
        for message in schedule_problems(runner) + slow_ema(runner, 0.5, 1):
            if self.odd == 'error':
                raise ValueError(message)
            self._warn(message)
        for message in slow_ema(runner, 0.05, 0.5) + silent_hooks(runner):
            self._warn(message)

    def before_val(self, runner: Runner) -> None:
        """Check a validation outside of training."""
        if not is_training(runner):
            self._check_evaluation(runner, runner.val_loop, 'val_dataloader')

    def before_test(self, runner: Runner) -> None:
        """Check a test."""
        self._check_evaluation(runner, runner.test_loop, 'test_dataloader')

    # ------------------------------------------------------------------ parts

    def _check_evaluation(self, runner, loop, name):
        loader = loop.dataloader
        rest = len(loader.dataset) % (loader.batch_size or 1)
        if loader.drop_last and rest:
            raise ValueError(f'{name}.drop_last skips {rest} of {len(loader.dataset)} images of '
                             'the evaluation; set it to False.')
        order_by_metainfo(loader.dataset, name)
        if self.classes:
            for message in align_to_classes(loader.dataset, name, self.classes, self.source):
                self._warn(message)
        head = getattr(unwrapped(runner.model), 'head', None)
        outputs = getattr(head, 'num_classes', None)
        if self.classes and outputs and len(self.classes) != outputs:
            raise ValueError(f'{self.source} names {len(self.classes)} classes '
                             f'({listed(self.classes)}), but model.head.num_classes is {outputs}.')
        num_classes = self._check_dataset(runner, loader.dataset, name)
        for metric in loop.evaluator.metrics if num_classes else ():
            self._limit_topk(metric, num_classes, f'{name}: ')

    def _limit_topk(self, owner, num_classes, where=''):
        """Remove every k above ``num_classes`` from an Accuracy or from a head that logs one."""
        topk = getattr(owner, 'topk', None) or ()
        topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if topk and max(topk) > num_classes:
            owner.topk = tuple(k for k in topk if k <= num_classes) or (1,)
            self._warn(f'{where}{type(owner).__name__} has topk={topk}, but there are '
                       f'{num_classes} classes: topk={owner.topk} is used.')

    def _check_dataset(self, runner, dataset, name):
        """Check labels against folders and outputs; return the number of outputs, if any."""
        order_by_metainfo(dataset, name)
        for message in skipped_images(dataset, name):
            self._warn(message)
        model = unwrapped(runner.model)
        num_classes = getattr(getattr(model, 'head', None), 'num_classes', None)
        if num_classes is None:
            return None
        for base in filter(has_labels, base_datasets(dataset)):
            check_labels(base, name, num_classes)
        if hasattr(model.data_preprocessor, 'num_classes'):
            model.data_preprocessor.num_classes = num_classes   # one-hot labels, also for Mixup
        if getattr(model.head, 'cal_acc', False):
            self._limit_topk(model.head, num_classes)
        return num_classes

    def _warn(self, message):
        print_log(message, logger='current', level=logging.WARNING)


def is_training(runner: Runner) -> bool:
    """Return whether a run trains; otherwise its training loop is not built."""
    return runner._train_loop is not None and not isinstance(runner._train_loop, dict)
