"""Random resized crops with torchvision's fast decoder."""
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from mmpretrain.datasets.transforms import RandomResizedCrop
from PIL import Image
from torchvision.transforms.v2 import functional as F

from nepa_mm.datasets.images import (
    check_color_type,
    decode_image,
    jpeg_size,
    read_bytes,
)


@TRANSFORMS.register_module()
class LoadRandomResizedCrop(RandomResizedCrop):
    """Faster equivalent of LoadImageWithPillow followed by RandomResizedCrop.

    torchvision decodes and resizes, with antialiasing and without a copy in between. The same
    random draws yield the same crops as ``RandomResizedCrop(backend='pillow')``; pixels differ by
    rounding. Files other than JPEGs go through the two transforms. Requires torchvision >= 0.17.

    Example::

        train_pipeline = [
            dict(type='LoadRandomResizedCrop', scale=224, interpolation='bilinear'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ]

    Args:
        scale (int | Sequence[int]): Side, or height and width, of the output in pixels.
        interpolation (str): 'bilinear' or 'bicubic'. Defaults to 'bilinear'.
        color_type (str): See LoadImageWithPillow. Only 'color' is faster. 'unchanged' accepts any
            number of channels. Defaults to 'color'.
        **kwargs: ``crop_ratio_range``, ``aspect_ratio_range`` and ``max_attempts`` of
            mmpretrain's RandomResizedCrop.

    Adds ``img`` (height, width, 3), uint8, BGR, ``img_shape`` and ``ori_shape``.

    Raises:
        ValueError: ``interpolation`` or ``color_type`` is unknown.
        UnreadableImageError: See LoadImageWithPillow.
    """

    def __init__(self, scale: int | Sequence[int], interpolation: str = 'bilinear',
                 color_type: str = 'color', **kwargs: Any):
        if interpolation not in ('bilinear', 'bicubic'):
            raise ValueError("interpolation must be 'bilinear' or 'bicubic', "
                             f'got {interpolation!r}.')
        super().__init__(scale, interpolation=interpolation, backend='pillow', **kwargs)
        self.color_type, self.channels = check_color_type(color_type), None

    def transform(self, results: dict) -> dict:
        """Load, crop and resize ``results['img_path']``."""
        path = results['img_path']
        content = read_bytes(path)
        image = self._decode(content) if self.color_type == 'color' else None
        reverse = image is not None     # torchvision decodes to RGB
        if image is None:
            results['img'] = decode_image(content, path, self.color_type, self.channels)
            results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
            if self.color_type != 'unchanged':
                return super().transform(results)
            image = torch.from_numpy(np.atleast_3d(results['img']).copy()).permute(2, 0, 1)
        results['ori_shape'] = tuple(image.shape[1:])
        top, left, height, width = self.rand_crop_params(image.permute(1, 2, 0))
        # channels-last memory: resizing needs no copy per channel
        crop = image.permute(1, 2, 0)[top:top + height, left:left + width].contiguous()
        image = F.resize(crop.permute(2, 0, 1), list(self.scale),
                         F.InterpolationMode(self.interpolation), antialias=True)
        img = image.permute(1, 2, 0).numpy()
        results['img'] = img[..., ::-1] if reverse else img     # a view: a copy takes longer
        results['img_shape'] = results['img'].shape[:2]
        return results

    @staticmethod
    def _decode(content):
        """Pixels (3, height, width) of a JPEG, RGB; None if Pillow must decode the file."""
        size = jpeg_size(content)
        if size is None or math.prod(size) > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        # a late import: torchvision 0.29 announced the removal of its decoder
        from torchvision.io import ImageReadMode, decode_jpeg
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8),
                               ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            return None
