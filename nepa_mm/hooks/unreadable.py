"""Images that cannot be read: counted, named, and replaced in a way that can be repeated."""
import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ..classes import leaves
from ..reading import UnreadableImageError
from .resume import derive_seed, run_seed

ATTEMPTS = 100


class ReadableSamples:
    """``prepare_data`` of a data set, with other samples in place of unreadable ones.

    Which one depends on (seed, epoch, index) and on nothing else: not on the worker, nor on
    what was read before. The files that could not be read stand in the ``unreadable`` entry of
    the data sample's metainfo.

    Args:
        dataset (mmengine.dataset.BaseDataset): Its pipeline raises UnreadableImageError.
        seed (int): Seed of the run.
        replace_labelled (bool): Whether samples with ``gt_label`` are replaced.
    """

    def __init__(self, dataset, seed, replace_labelled):
        self.dataset, self.seed, self.replace_labelled = dataset, seed, replace_labelled
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()     # workers read it

    def __call__(self, index):
        """The sample ``index``, or its replacement with the label of the replacement.

        Raises:
            UnreadableImageError: It has a label and must not be replaced, or a hundred
                replacements are unreadable, too.
        """
        chosen, errors = index, {}
        for attempt in range(ATTEMPTS):
            try:
                sample = type(self.dataset).prepare_data(self.dataset, chosen)
            except UnreadableImageError as error:
                info = self.dataset.get_data_info(chosen)
                if 'gt_label' in info and not self.replace_labelled:
                    raise UnreadableImageError(
                        f'{error} Its label {info["gt_label"]} is not replaced silently: mend or '
                        'remove the file, or set replace_labelled=True in UnreadableImageHook.'
                        ) from error
                errors[info['img_path']] = str(error)
                chosen = derive_seed(self.seed, int(self.epoch), index, attempt) % len(self.dataset)
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
    were replaced. The replacement depends on (seed, epoch, index of the sample) only, so it is
    the same after a resume and for any number of workers; with ExactResumeHook so is its crop.

    A sample with a label is an error by default, for a classifier that trains on fewer images
    of a class than it seems is wrong silently. Where no label is read, as in pretraining, or
    where it may be so, image and label both become those of the replacement.

    Works on data sets of mmengine, with pipelines that load by LoadWholeImage,
    LoadRandomResizedCrop or PackEncodedCrop and end with data samples. Validation and test data
    are left alone, and iteration-based loops, whose workers start before any hook: there it is
    an error. So it is where the device finds damage that PackEncodedCrop could not see.

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
        """Stand between the data set and its readers, and tell the workers the epoch."""
        self.new, self.count = {}, 0
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        for dataset in leaves(runner.train_loop.dataloader.dataset):
            if not hasattr(dataset, 'prepare_data'):
                continue
            if not isinstance(dataset.prepare_data, ReadableSamples):
                dataset.prepare_data = ReadableSamples(
                    dataset, run_seed(runner), self.replace_labelled)
            dataset.prepare_data.epoch.fill_(runner.epoch)

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

    def after_train_epoch(self, runner):
        """Report what all processes replaced."""
        reports = dist.all_gather_object((self.new, self.count))
        count = sum(count for _, count in reports)
        for new, _ in reports:
            self._name(runner, new)
        if not count:
            return
        num = self._num(runner)
        # with the number of the epoch, for mmengine logs equal warnings once
        runner.logger.warning(f'Epoch {runner.epoch + 1}: {count} of {num} samples were replaced, '
                              'because their images cannot be read.')
        if count > self.max_share * num:
            self._refuse(runner, count)

    def _num(self, runner):
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
