"""Replaces unreadable images reproducibly; counts and names them."""
import logging
from math import ceil

import numpy as np
from mmengine import dist
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from nepa_mm.datasets.classes import base_datasets
from nepa_mm.utils.errors import UnreadableImageError

ATTEMPTS = 100


class ReadableSamples:
    """``prepare_data`` of a data set that replaces unreadable samples by other ones.

    Draws the replacement from numpy's generator, which ExactResumeHook seeds per sample. The
    ``unreadable`` entry of the data sample's metainfo lists the unreadable files.

    Args:
        dataset (mmengine.dataset.BaseDataset): Its pipeline raises UnreadableImageError.
        replace_labelled (bool): Whether to replace samples with ``gt_label``.
    """

    def __init__(self, dataset: BaseDataset, replace_labelled: bool):
        self.dataset, self.replace_labelled = dataset, replace_labelled

    def __call__(self, index):
        """The sample ``index``, or a replacement with its own label.

        Raises:
            UnreadableImageError: The sample has a label and ``replace_labelled`` is False, or
                100 samples in a row are unreadable.
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
                        f'{error} Its label {label} is not replaced by default: repair or '
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
    """Replace unreadable training images by other images of the data set.

    Logs each unreadable file once, and the number of replaced samples after every epoch (or
    pass over the data, in an iteration-based loop): a warning if there are new files. With
    ExactResumeHook, the replacement and its crop depend only on (seed, pass, sample index): they
    are the same after a resume and for any number of workers.

    An unreadable image with a label or mask is an error by default: replacing it would change
    the classes silently. With ``replace_labelled``, image and label are both replaced.

    Supports mmengine's data sets with pipelines that load by LoadImageWithPillow or
    LoadRandomResizedCrop and end with data samples. Does not touch validation and test data.

    Args:
        replace_labelled (bool): Whether to replace samples with ``gt_label``. Defaults to
            False.
        max_share (float): Maximum fraction of replaced samples per epoch. Defaults to 0.01.

    Raises:
        ValueError: ``max_share`` is not between 0 and 1.
        UnreadableImageError: See ``max_share`` and ``replace_labelled``.
    """

    def __init__(self, replace_labelled: bool = False, max_share: float = 0.01):
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_share must be between 0 and 1, got {max_share}.')
        self.replace_labelled, self.max_share = replace_labelled, max_share
        self.named = set()

    def before_train_epoch(self, runner):
        """Wrap ``prepare_data`` of the data sets."""
        self.new, self.count = {}, 0
        for dataset in base_datasets(runner.train_loop.dataloader.dataset):
            if hasattr(dataset, 'prepare_data') and not isinstance(
                    dataset.prepare_data, ReadableSamples):
                dataset.prepare_data = ReadableSamples(dataset, self.replace_labelled)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count replaced samples; stop as soon as they exceed ``max_share`` of an epoch."""
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        for sample in samples if isinstance(samples, list) else []:
            unreadable = getattr(sample, 'unreadable', None)    # metainfo copies everything
            if unreadable:
                self.count += 1
                self.new.update(unreadable)
        if self.count and self.count > self.max_share * self._num(runner):
            self._log_files(runner, self.new)
            self._refuse(runner, self.count)
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            samples = runner.train_loop.dataloader.batch_sampler.batch_size * dist.get_world_size()
            if self.every_n_train_iters(runner, ceil(self._num(runner) / samples)):
                self._report(runner, f'Iteration {runner.iter + 1}')

    def after_train_epoch(self, runner):
        """Report what all processes replaced."""
        # the epoch makes the warning unique: mmengine logs equal warnings once
        self._report(runner, f'Epoch {runner.epoch + 1}')

    def _report(self, runner, when):
        reports = dist.all_gather_object((self.new, self.count))
        count = sum(count for _, count in reports)
        known = set(self.named)
        for new, _ in reports:
            self._log_files(runner, new)
        self.new, self.count = {}, 0
        if not count:
            return
        num = self._num(runner)
        runner.logger.log(logging.INFO if self.named == known else logging.WARNING,
                          f'{when}: {count} of {num} samples were replaced, because their '
                          'images cannot be read.')
        if count > self.max_share * num:
            self._refuse(runner, count)

    def _num(self, runner):
        """Samples of an epoch, or of a pass over the data."""
        loader = runner.train_loop.dataloader
        num = dist.get_world_size() * len(loader) * loader.batch_sampler.batch_size
        return min(num, len(loader.dataset))

    def _log_files(self, runner, new):
        for file in [file for file in new if file not in self.named]:
            runner.logger.warning(f'{new[file]} Other images take its place.')
        self.named.update(new)

    def _refuse(self, runner, count):
        raise UnreadableImageError(
            f'{count} of {self._num(runner)} samples of an epoch cannot be read, and max_share of '
            f'UnreadableImageHook allows {self.max_share:g} of them; the log names the files.')
