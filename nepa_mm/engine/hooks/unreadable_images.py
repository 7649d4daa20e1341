"""Images that cannot be read: counted, named, and replaced in a way that can be repeated."""
from math import ceil

import numpy as np
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from nepa_mm.datasets.classes import base_datasets
from nepa_mm.utils.errors import UnreadableImageError

ATTEMPTS = 100


class ReadableSamples:
    """``prepare_data`` of a data set, with other samples in place of unreadable ones.

    Which one is drawn from numpy's generator, which ExactResumeHook seeds for every sample. The
    files that could not be read stand in the ``unreadable`` entry of the data sample's metainfo.

    Args:
        dataset (mmengine.dataset.BaseDataset): Its pipeline raises UnreadableImageError.
        replace_labelled (bool): Whether samples with ``gt_label`` are replaced.
    """

    def __init__(self, dataset, replace_labelled):
        self.dataset, self.replace_labelled = dataset, replace_labelled

    def __call__(self, index):
        """The sample ``index``, or its replacement with the label of the replacement.

        Raises:
            UnreadableImageError: It has a label and must not be replaced, or a hundred
                replacements are unreadable, too.
        """
        chosen, errors = index, {}
        for _ in range(ATTEMPTS):
            try:
                sample = type(self.dataset).prepare_data(self.dataset, chosen)
            except UnreadableImageError as error:
                info = self.dataset.get_data_info(chosen)
                label = info.get('gt_label', info.get('seg_map_path'))
                if label is not None and not self.replace_labelled:
                    raise UnreadableImageError(
                        f'{error} Its label {label} is not replaced silently: mend or '
                        'remove the file, or set replace_labelled=True in UnreadableImageHook.'
                        ) from error
                errors[info['img_path']] = str(error)
                chosen = np.random.randint(len(self.dataset))
                continue
            if errors:
                sample['data_samples'].set_metainfo(dict(unreadable=errors))
            return sample
        raise UnreadableImageError(f'{ATTEMPTS} samples in a row cannot be read. The first: '
                                   f'{next(iter(errors.values()))}')


@HOOKS.register_module()
class UnreadableImageHook(Hook):
    """Replace training images that cannot be read by others of the same data set.

    Every such file is named once in the log, and an epoch ends with the number of samples that
    were replaced; in an iteration-based loop so does a pass over the data. With ExactResumeHook
    the replacement and its crop depend on (seed, pass over the data, index of the sample) only, so
    they are the same after a resume and for any number of workers.

    A sample with a label or a mask is an error by default, for a classifier that trains on fewer
    images of a class than it seems is wrong silently. Where no label is read, as in pretraining,
    or where it may be so, image and label both become those of the replacement.

    Works on data sets of mmengine, with pipelines that load by LoadImageWithPillow,
    LoadRandomResizedCrop or PackEncodedCrop and end with data samples. Validation and test data
    are left alone. Damage that PackEncodedCrop could not see, and the device finds, is an error.

    Args:
        replace_labelled (bool): Whether samples with ``gt_label`` are replaced, too. Defaults
            to False.
        max_share (float): More than this share of an epoch is an error. Defaults to 0.01.

    Raises:
        ValueError: ``max_share`` is not between 0 and 1.
        UnreadableImageError: See ``max_share`` and ``replace_labelled``.
    """

    def __init__(self, replace_labelled=False, max_share=0.01):
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_share must be between 0 and 1, got {max_share}.')
        self.replace_labelled, self.max_share = replace_labelled, max_share
        self.named = set()

    def before_train_epoch(self, runner):
        """Stand between the data set and its readers."""
        self.new, self.count = {}, 0
        for dataset in base_datasets(runner.train_loop.dataloader.dataset):
            if hasattr(dataset, 'prepare_data') and not isinstance(
                    dataset.prepare_data, ReadableSamples):
                dataset.prepare_data = ReadableSamples(dataset, self.replace_labelled)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count what was replaced; stop as soon as it is too much for an epoch."""
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        for sample in samples if isinstance(samples, list) else []:
            unreadable = getattr(sample, 'unreadable', None)    # metainfo would be a copy of all
            if unreadable:
                self.count += 1
                self.new.update(unreadable)
        if self.count and self.count > self.max_share * self._num(runner):      # for sure
            self._name(runner, self.new)
            self._refuse(runner, self.count)
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            samples = runner.train_loop.dataloader.batch_sampler.batch_size * dist.get_world_size()
            if self.every_n_train_iters(runner, ceil(self._num(runner) / samples)):
                self._report(runner, f'Iteration {runner.iter + 1}')

    def after_train_epoch(self, runner):
        """Report what all processes replaced."""
        # with the number of the epoch, for mmengine logs equal warnings once
        self._report(runner, f'Epoch {runner.epoch + 1}')

    def _report(self, runner, when):
        reports = dist.all_gather_object((self.new, self.count))
        count = sum(count for _, count in reports)
        for new, _ in reports:
            self._name(runner, new)
        self.new, self.count = {}, 0
        if not count:
            return
        num = self._num(runner)
        runner.logger.warning(f'{when}: {count} of {num} samples were replaced, because their '
                              'images cannot be read.')
        if count > self.max_share * num:
            self._refuse(runner, count)

    def _num(self, runner):
        """Samples of an epoch, or of a pass over the data."""
        loader = runner.train_loop.dataloader
        num = dist.get_world_size() * len(loader) * loader.batch_sampler.batch_size
        return min(num, len(loader.dataset))

    def _name(self, runner, new):
        for file in [file for file in new if file not in self.named]:
            runner.logger.warning(f'{new[file]} Other images take its place.')
        self.named.update(new)

    def _refuse(self, runner, count):
        raise UnreadableImageError(
            f'{count} of {self._num(runner)} samples of an epoch cannot be read, and max_share of '
            f'UnreadableImageHook allows {self.max_share:g} of them; the log names the files.')
