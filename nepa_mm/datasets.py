"""Data beyond mmpretrain's: scikit-learn's digits, fast reading of JPEGs, smaller JPEGs."""
import io
import math
import os
import shutil
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.registry import DATASETS, TRANSFORMS
from mmpretrain.datasets.base_dataset import BaseDataset
from mmpretrain.datasets.transforms import PackInputs, RandomResizedCrop
from PIL import Image
from torchvision.transforms.v2 import functional as F

from .outputs import own_folder
from .reading import (
    check_color_type,
    decode_image,
    decode_jpeg,
    is_grey,
    jpeg_size,
    open_image,
    plain_jpeg_size,
    read_bytes,
)

SPLITS = ('train', 'test')
NUM_TRAIN = 1297


@DATASETS.register_module()
class Digits(BaseDataset):
    """1,797 handwritten digits of 8 x 8 pixels (UCI ML repository, shipped with scikit-learn).

    A fixed shuffle gives 1,297 images for training and 500 for testing.

    Args:
        split (str): 'train' or 'test'.
        num_labels (int, optional): Keep only this many images, the same number of
            every class. Defaults to None: all.
        seed (int): Which ones are kept. Defaults to 0.
        **kwargs: ``pipeline``, ``test_mode`` and others of mmpretrain's BaseDataset.

    Each sample starts as ``img`` (8, 8, 3), uint8, and ``gt_label``.

    Raises:
        ValueError: ``split`` is something else, or ``num_labels`` is no multiple of 10
            or more than there are.
        ImportError: scikit-learn is missing.
    """

    METAINFO = dict(classes=tuple('0123456789'))

    def __init__(self, split, num_labels=None, seed=0, **kwargs):
        if split not in SPLITS:
            raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
        self.split, self.num_labels, self.seed = split, num_labels, seed
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self):
        """All samples of the split, as mmengine's BaseDataset wants them."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError('The Digits data set is part of scikit-learn; '
                              'type: pip install scikit-learn') from None
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        order = order[:NUM_TRAIN] if self.split == 'train' else order[NUM_TRAIN:]
        if self.num_labels is not None:
            order = self._balanced(order, labels)
        images = (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8, 1)
        return [dict(img=images[i].repeat(3, axis=2), img_shape=(8, 8), ori_shape=(8, 8),
                     gt_label=int(labels[i])) for i in order]

    def _balanced(self, order, labels):
        classes = [order[labels[order] == label] for label in range(10)]
        most = 10 * min(map(len, classes))
        if self.num_labels % 10 or not 0 < self.num_labels <= most:
            raise ValueError(f'num_labels must be a multiple of 10 up to {most}, '
                             f'got {self.num_labels}.')
        rng = np.random.default_rng(self.seed)
        return np.concatenate([rng.permutation(members)[:self.num_labels // 10]
                               for members in classes])


SCENE = 32              # pixels of a scene, per side: two cells, with a digit in each of the four
DIGIT = (15, 16)        # pixels of a digit, per side, at least and at most
EDGE = (0.25, 0.4)      # share of ink: background below, digit above, unlabelled between


def digit_scene(rng, digits):
    """Four digits on a textured background, and what each pixel shows.

    Args:
        rng (numpy.random.Generator): All randomness.
        digits (list[dict]): Samples of :class:`Digits`.

    Returns:
        tuple[ndarray, ndarray]: Image (32, 32, 3) and labels (32, 32), both uint8. Labels are
        counted as in ADE20K: 0 unlabelled, 1 background, 2 to 11 the digits 0 to 9.
    """
    cells = rng.integers(4, 17)
    texture = Image.fromarray(rng.integers(0, 61, (cells, cells, 3), dtype=np.uint8))
    image = np.asarray(texture.resize((SCENE, SCENE), Image.Resampling.BICUBIC), np.float64)
    label = np.ones((SCENE, SCENE), np.uint8)
    half = SCENE // 2
    for corner in ((0, 0), (0, half), (half, 0), (half, half)):
        digit, side = digits[rng.integers(len(digits))], rng.integers(DIGIT[0], DIGIT[1] + 1)
        top, left = corner + rng.integers(0, half - side + 1, 2)
        place = np.s_[top:top + side, left:left + side]
        ink = Image.fromarray(digit['img'][..., 0]).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(ink, np.float64) / 255
        image[place] += ink[..., None] * (255 - image[place])
        label[place][ink >= EDGE[0]] = 0
        label[place][ink >= EDGE[1]] = 2 + digit['gt_label']
    return image.round().astype(np.uint8), label


def write_digit_scenes(folder, num_train=100, num_val=100, seed=0):
    """Write scenes in ADE20K's folder layout, a small data set for semantic segmentation.

    Args:
        folder (str | Path): Gets ``images/`` and ``annotations/``, each with ``training/`` and
            ``validation/``.
        num_train (int): Training scenes, of training digits. Defaults to 100.
        num_val (int): Validation scenes, of test digits. Defaults to 100.
        seed (int): A scene depends on it and on its own number only. Defaults to 0.

    Raises:
        FileExistsError: The folder holds anything else.
    """
    own_folder(Path(folder), '.nepa_mm_scenes')
    for split, part, num in (('train', 'training', num_train), ('test', 'validation', num_val)):
        images, labels = (Path(folder) / kind / part for kind in ('images', 'annotations'))
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        digits = Digits(split, pipeline=[]).load_data_list()
        for i in range(num):
            rng = np.random.default_rng((seed, SPLITS.index(split), i))
            image, label = digit_scene(rng, digits)
            Image.fromarray(image).save(images / f'{i:05d}.jpg', quality=95, subsampling=0)
            Image.fromarray(label).save(labels / f'{i:05d}.png')


@TRANSFORMS.register_module()
class LoadRandomResizedCrop(RandomResizedCrop):
    """LoadWholeImage and RandomResizedCrop in one, and faster.

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
        color_type (str): As LoadWholeImage. Only 'color' is faster, and 'unchanged' takes any
            number of channels. Defaults to 'color'.
        **kwargs: ``crop_ratio_range``, ``aspect_ratio_range`` and ``max_attempts`` of
            mmpretrain's RandomResizedCrop.

    Adds ``img`` (height, width, 3), uint8, BGR, ``img_shape`` and ``ori_shape``.

    Raises:
        ValueError: ``interpolation`` or ``color_type`` is something else.
        UnreadableImageError: As LoadWholeImage.
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
        UnreadableImageError: As LoadWholeImage.
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


def resize_image(source, target, short_side, quality=95):
    """Save an image at a smaller size: turned upright, antialiased, never enlarged.

    An image that is small enough is copied. Others are written as LoadWholeImage reads them: 8
    bits, in colour, or grey where the file is. The file appears whole or not at all.

    Args:
        source, target (Path): Files; the format of the source is kept.
        short_side (int): Largest length of the shorter side in pixels.
        quality (int): Of JPEGs, 1 to 95. Defaults to 95.

    Raises:
        DataError: The source is unreadable; so are images cut short and files that are none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'.{target.name}.part')
    content = read_bytes(source)
    image = open_image(content, source)
    pixels = decode_image(content, source, 'grayscale' if is_grey(image) else 'color')
    factor = short_side / min(image.size)
    if factor >= 1:
        shutil.copyfile(source, part)
    else:
        size = [max(round(side * factor), short_side) for side in pixels.shape[1::-1]]
        upright = Image.fromarray(pixels if pixels.ndim == 2 else mmcv.bgr2rgb(pixels))
        small, resized = upright.resize(size, Image.Resampling.BICUBIC), io.BytesIO()
        options = dict(quality=quality) if image.format == 'JPEG' else {}
        small.save(resized, image.format, **options)
        part.write_bytes(resized.getvalue())
    os.replace(part, target)
