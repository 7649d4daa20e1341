"""Moves images to the device and normalises them there."""
from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from mmpretrain.models.utils.data_preprocessor import ClsDataPreprocessor, SelfSupDataPreprocessor
from mmpretrain.structures import DataSample
from torch import Tensor


@MODELS.register_module()
class NEPADataPreprocessor(SelfSupDataPreprocessor):
    """mmpretrain's SelfSupDataPreprocessor, bit for bit, without a host sync.

    Copies uint8 from pinned memory without blocking, and normalises in place on the device.
    Labels stay on the host: pretraining reads none.

    Images may have any number of channels. Grey images normalised by three values become
    three channels, as in the parent class.

    Args:
        mean, std (Sequence[float], optional): One value, or one per channel. Default to
            None: no normalisation.
        to_rgb (bool): Whether to reverse the channels of three-channel images. Defaults to
            False.
        **kwargs: Other arguments of the parent class.

    Raises:
        ValueError: ``mean`` and ``std`` have different numbers of values, or do not match
            the channels of the images; a batch is not one tensor.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 **kwargs):
        super().__init__(non_blocking=True, **kwargs)
        if len(() if mean is None else mean) != len(() if std is None else std):
            raise ValueError('mean and std need one value each, or one for each channel, got '
                             f'{mean} and {std}.')
        if mean is not None:    # the parent class accepts 1 or 3 values only
            self._enable_normalize = True
            for name, values in dict(mean=mean, std=std).items():
                self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), False)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise ``data['inputs']``: uint8 (B, C, height, width) -> fp32, same shape.

        A list of such tensors (mmpretrain's MultiView) gives a list.
        """
        images = data['inputs']
        if isinstance(images, Tensor):
            images = self._normalise(images)
        elif all(isinstance(view, Tensor) and view.dim() == 4 for view in images):
            images = [self._normalise(view) for view in images]
        else:
            raise ValueError("Images must come as one tensor: set the data loader's collate_fn "
                             "to dict(type='default_collate').")
        return dict(inputs=images, data_samples=data.get('data_samples'))

    def _normalise(self, images: Tensor) -> Tensor:
        images = self.cast_data(images)
        if self._channel_conversion and images.shape[1] == 3:
            images = images.flip(1)         # indexing by a list would sync
        images = images.to(torch.float32, copy=True)
        if not self._enable_normalize:
            return images
        if len(self.mean) not in (1, images.shape[1]):
            if images.shape[1] != 1:
                raise ValueError(f'mean and std of the data_preprocessor have {len(self.mean)} '
                                 f'values, but the images {images.shape[1]} channels.')
            images = images.repeat(1, len(self.mean), 1, 1)
        return images.sub_(self.mean).div_(self.std)


@MODELS.register_module()
class NEPAClsDataPreprocessor(ClsDataPreprocessor):
    """mmpretrain's ClsDataPreprocessor, bit for bit, without a host sync.

    Copies images from pinned memory without blocking. The labels of a batch, and its scores,
    are joined on the host and copied once.

    Args:
        **kwargs: Arguments of the parent class.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._non_blocking = True       # no argument of the parent class

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise ``data['inputs']``, uint8 (B, C, height, width) -> fp32; move the labels.

        ``batch_augments`` change both if ``training``.
        """
        samples = data.get('data_samples') or [None]
        if isinstance(samples[0], DataSample):
            for name in ('gt_label', 'gt_score'):
                if name in samples[0]:
                    self._move(samples, name)
        return super().forward(data, training)

    def _move(self, samples: list[DataSample], name: str) -> None:
        values = [getattr(sample, name) for sample in samples]
        joined = torch.cat(values)
        if self.device.type == 'cuda' and not joined.is_cuda:
            joined = joined.pin_memory()
        joined = joined.to(self.device, non_blocking=True)
        for sample, value in zip(samples, joined.split([len(value) for value in values])):
            sample.set_field(value, name)
