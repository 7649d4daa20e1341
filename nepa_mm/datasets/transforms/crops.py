"""Random resized crops, read as fast as torchvision can."""
import math

import mmcv
import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from mmpretrain.datasets.transforms import PackInputs, RandomResizedCrop
from PIL import Image
from torchvision.transforms.v2 import functional as F

from nepa_mm.datasets.images import (
    check_color_type,
    decode_image,
    decode_jpeg,
    jpeg_size,
    plain_jpeg_size,
    read_bytes,
)


@TRANSFORMS.register_module()
class LoadRandomResizedCrop(RandomResizedCrop):
    """LoadImageWithPillow and RandomResizedCrop in one, and faster.

    torchvision decodes and resizes, with antialiasing, without a copy in between. The same
    random draws give the same crops as ``RandomResizedCrop(backend='pillow')``, and pixels
    that differ by rounding. What is no JPEG goes through the two transforms themselves.
    Needs torchvision 0.17 or later.

    Example::

        train_pipeline = [
            dict(type='LoadRandomResizedCrop', scale=224, interpolation='bilinear'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ]

    Args:
        scale (int | Sequence[int]): Side, or height and width, of the result.
        interpolation (str): 'bilinear' or 'bicubic'. Defaults to 'bilinear'.
        color_type (str): As LoadImageWithPillow. Only 'color' is faster, and 'unchanged' takes any
            number of channels. Defaults to 'color'.
        **kwargs: ``crop_ratio_range``, ``aspect_ratio_range`` and ``max_attempts`` of
            mmpretrain's RandomResizedCrop.

    Adds ``img`` (height, width, 3), uint8, BGR, ``img_shape`` and ``ori_shape``.

    Raises:
        ValueError: ``interpolation`` or ``color_type`` is something else.
        UnreadableImageError: As LoadImageWithPillow.
    """

    def __init__(self, scale, interpolation='bilinear', color_type='color', **kwargs):
        if interpolation not in ('bilinear', 'bicubic'):
            raise ValueError("interpolation must be 'bilinear' or 'bicubic', "
                             f'got {interpolation!r}.')
        super().__init__(scale, interpolation=interpolation, backend='pillow', **kwargs)
        self.color_type, self.channels = check_color_type(color_type), None

    def transform(self, results):
        """Load, crop and resize ``results['img_path']``."""
        path = results['img_path']
        content = read_bytes(path)
        image = self._decode(content) if self.color_type == 'color' else None
        reverse = image is not None     # torchvision's pixels are RGB
        if image is None:
            results['img'] = decode_image(content, path, self.color_type, self.channels)
            results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
            if self.color_type != 'unchanged':
                return super().transform(results)
            image = torch.from_numpy(np.atleast_3d(results['img']).copy()).permute(2, 0, 1)
        results['ori_shape'] = tuple(image.shape[1:])
        top, left, height, width = self.rand_crop_params(image.permute(1, 2, 0))
        # packed pixels, three bytes each, are resized and handed on without a copy per channel
        crop = image.permute(1, 2, 0)[top:top + height, left:left + width].contiguous()
        image = F.resize(crop.permute(2, 0, 1), list(self.scale),
                         F.InterpolationMode(self.interpolation), antialias=True)
        img = image.permute(1, 2, 0).numpy()
        results['img'] = img[..., ::-1] if reverse else img     # a view: a copy takes longer
        results['img_shape'] = results['img'].shape[:2]
        return results

    @staticmethod
    def _decode(content):
        """The pixels of a JPEG (3, height, width), None if Pillow had better see it."""
        size = jpeg_size(content)
        if size is None or math.prod(size) > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8),
                               apply_exif_orientation=True)
        except RuntimeError:
            return None


@TRANSFORMS.register_module()
class PackEncodedCrop(LoadRandomResizedCrop):
    """LoadRandomResizedCrop, RandomFlip and PackInputs in one, that leaves JPEGs encoded.

    Draws crop and flip as these do, from the size in the file's header, and packs the bytes.
    What is no plain JPEG (PNG, CMYK, turned by EXIF, torn) is decoded, cropped and flipped here,
    so that a torn file is replaced by the UnreadableImageHook as ever. Needs
    ``collate_fn=dict(type='encoded_collate')``, the NEPADataPreprocessor and torchvision 0.19.

    Args:
        scale (int | Sequence[int]): Side, or height and width, of the result.
        flip_prob (float): Probability of a horizontal flip. Defaults to 0.5.
        **kwargs: ``interpolation``, ``crop_ratio_range`` and others of LoadRandomResizedCrop;
            ``color_type`` is 'color'.

    Returns ``inputs``, the file as bytes or pixels (3, height, width), uint8, BGR; and
    ``data_samples`` with ``img_shape``, ``flip``, and for a file ``crop`` (top, left, height,
    width) and ``interpolation``.

    Raises:
        ValueError: ``flip_prob`` is not between 0 and 1, or ``color_type`` not 'color'.
        UnreadableImageError: As LoadImageWithPillow.
    """

    def __init__(self, scale, flip_prob=0.5, **kwargs):
        super().__init__(scale, **kwargs)
        if not 0 <= flip_prob <= 1:
            raise ValueError(f'flip_prob must be between 0 and 1, got {flip_prob}.')
        if self.color_type != 'color':
            raise ValueError("PackEncodedCrop reads images of color_type='color' only, got "
                             f'{self.color_type!r}; use LoadRandomResizedCrop.')
        self.flip_prob = flip_prob
        self.pack = PackInputs(
            meta_keys=(*PackInputs.DEFAULT_META_KEYS, 'crop', 'interpolation'))

    def transform(self, results):
        """Read ``results['img_path']`` and pack it."""
        path = results['img_path']
        content = read_bytes(path)
        encoded = plain_jpeg_size(content)
        if encoded:
            results['ori_shape'] = encoded
            results['crop'] = self.rand_crop_params(np.broadcast_to(0, results['ori_shape']))
            results['img_shape'], results['interpolation'] = tuple(self.scale), self.interpolation
        else:
            results = super().transform(results)
        results['flip'] = bool(np.random.random_sample() < self.flip_prob)     # as RandomFlip
        if encoded:
            return dict(self.pack(results), inputs=content)
        if results['flip']:
            results['img'] = mmcv.imflip(results['img'])
        return self.pack(results)
