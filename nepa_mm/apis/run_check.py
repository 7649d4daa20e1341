"""The check of a run before its first step: data, classes, schedule, averages, monitors, weights.

What cannot be right raises a ValueError of one sentence; what is odd is one warning.
"""
import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from nepa_mm.apis.resume_checks import check_state, differences_of_configs, in_words
from nepa_mm.apis.schedule_checks import (
    average_problems,
    check_batches,
    check_best,
    idle_averages,
    schedule_problems,
    silent_hooks,
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
    listed,
    match_classes,
    order_by_metainfo,
    skipped_images,
)


@HOOKS.register_module()
class RunCheckHook(Hook):
    """Check the whole run before its first step; tools/train.py and tools/test.py always do.

    - Classes: names of training, validation, test data and checkpoint are compared, and labels
      follow the names. ``model.head.num_classes`` is all that a config has to state: it goes to
      the data preprocessor and to Mixup, and ``topk`` of an Accuracy is cut to it.
    - Data: images of the folder that are no samples; evaluations that leave out images.
    - Schedule: it ends with the run.
    - EMA: it has time to leave its first weights. Monitors: their interval fits the run.
    - Weights: ``load_from`` fits the network; what is resumed fits network, average and optimizer,
      and what the config resumes by itself is the same experiment.

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
        source = runner._load_from or runner.work_dir
        meta = checkpoint.get('meta') or {}
        new = [name for name, tensor in own.items() if not name.startswith('backbone.')
               and (name not in loaded or loaded[name].shape != tensor.shape)]
        if runner._resume and training(runner):     # tests of OpenMMLab's tools resume, too
            self._check_experiment(runner, checkpoint, source)
        else:
            check_network(strip_prefix(own, 'backbone.'), strip_prefix(loaded, 'backbone.'), source)
            warn_if_function_differs(unwrapped(runner.model), meta, source)
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

    def _check_experiment(self, runner, checkpoint, source):
        """Compare a checkpoint with the run which is to go on from it."""
        found, other = differences_of_configs(checkpoint['meta'], runner.cfg)
        if other and self.other_experiment == 'error':
            raise ValueError(
                f'{runner.work_dir} holds a checkpoint of another experiment: {in_words(other)}. '
                'Give another --work-dir, or --no-resume to start anew, or --resume to go on all '
                'the same.')
        if found:
            self._warn(f'The config differs from that of {source}: {in_words(found)}.')
        for sentence in check_state(runner, checkpoint, source):
            self._warn(sentence)

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
        names = classes_of(base_datasets(train)[0])
        if self.classes and names and match_classes(
                names, self.classes, 'train_dataloader', self.source) \
                not in (None, list(range(len(names)))):
            raise ValueError(f'train_dataloader has its classes in another order than the head of '
                             f'{self.source}: set metainfo.classes of the data to '
                             f'{listed(self.classes)}.')
        if runner.val_loop is not None:
            for sentence in align_datasets(runner.val_dataloader.dataset, 'val_dataloader', train,
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
        order_by_metainfo(loader.dataset, whose)
        if self.classes:
            for sentence in align_to_classes(loader.dataset, whose, self.classes, self.source):
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
        order_by_metainfo(dataset, whose)
        for sentence in skipped_images(dataset, whose):
            self._warn(sentence)
        model = unwrapped(runner.model)
        num_classes = getattr(getattr(model, 'head', None), 'num_classes', None)
        if num_classes is None:
            return None
        for leaf in filter(has_labels, base_datasets(dataset)):
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
