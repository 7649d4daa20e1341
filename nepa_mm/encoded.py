"""JPEGs that travel as files, and are decoded, cropped and resized where the network is.

    file -> PackEncodedCrop: bytes, and the draws of crop and flip      (worker)
         -> encoded_collate: the bytes of a batch, one behind the other (worker)
         -> decode_crops: pixels, called by NEPADataPreprocessor        (GPU, or CPU without one)

A worker that decodes nothing feeds a GPU several times as fast.
"""
import logging

import mmcv
import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.registry import FUNCTIONS, TRANSFORMS
from mmpretrain.datasets.transforms import PackInputs
from torchvision.transforms.v2 import functional as F

from .datasets import LoadRandomResizedCrop
from .reading import decode_jpeg, open_image, read_bytes, to_bgr

ORIENTATION = 0x0112    # EXIF: 1 is upright


def is_plain_jpeg(image, content):
    """Whether every decoder makes the same of a file: colours, upright, not torn.

    Args:
        image (PIL.Image.Image): Opened, its pixels not read.
        content (bytes): The file.
    """
    try:
        return (image.format == 'JPEG' and image.mode in ('RGB', 'L')
                and image.info.get('adobe_transform') != 0      # stored as RGB, not YCbCr
                and image.getexif().get(ORIENTATION, 1) == 1
                and b'\xff\xd9' in content[-64:])               # the mark of the end
    except Exception:       # damaged EXIF
        return False


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
        **kwargs: ``interpolation``, ``crop_ratio_range`` and others of LoadRandomResizedCrop.

    Returns ``inputs``, the file as bytes or pixels (3, height, width), uint8, BGR; and
    ``data_samples`` with ``img_shape``, ``flip``, and for a file ``crop`` (top, left, height,
    width) and ``interpolation``.

    Raises:
        ValueError: ``flip_prob`` is not between 0 and 1.
        UnreadableImageError: As LoadWholeImage.
    """

    def __init__(self, scale, flip_prob=0.5, **kwargs):
        super().__init__(scale, **kwargs)
        if not 0 <= flip_prob <= 1:
            raise ValueError(f'flip_prob must be between 0 and 1, got {flip_prob}.')
        self.flip_prob = flip_prob
        self.pack = PackInputs(
            meta_keys=(*PackInputs.DEFAULT_META_KEYS, 'crop', 'interpolation'))

    def transform(self, results):
        """Read ``results['img_path']`` and pack it."""
        path = results['img_path']
        content = read_bytes(path)
        opened = open_image(content, path)
        encoded = is_plain_jpeg(opened, content)
        if encoded:
            results['ori_shape'] = opened.size[::-1]
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


@FUNCTIONS.register_module()
def encoded_collate(samples):
    """A batch of :class:`PackEncodedCrop`.

    Returns:
        dict: ``inputs``, all bytes in one tensor (n,), uint8, for each tensor that a worker
        sends is an open file; ``data_samples``, a list, with ``num_bytes``.
    """
    parts = [one if isinstance(one, bytes) else one.numpy().tobytes()
             for one in (sample['inputs'] for sample in samples)]
    data_samples = [sample['data_samples'] for sample in samples]
    for sample, part in zip(data_samples, parts):
        sample.set_metainfo(dict(num_bytes=len(part)))
    inputs = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
    return dict(inputs=inputs, data_samples=data_samples)


def batch_shape(data_batch):
    """(images, height, width) that the network will see of a batch, encoded or not."""
    inputs = data_batch['inputs']
    if isinstance(inputs, torch.Tensor) and inputs.dim() == 1:
        samples = data_batch['data_samples']
        return len(samples), *samples[0].img_shape[:2]
    return len(inputs), *inputs[0].shape[-2:]


def decode_crops(inputs, data_samples, device):
    """The pixels of a batch of :func:`encoded_collate`.

    Args:
        inputs (Tensor): All bytes (n,), uint8, on the CPU.
        data_samples (list[DataSample]): What belongs to them.
        device (torch.device | str): Where to decode, crop, resize and flip: nvJPEG on CUDA,
            libjpeg elsewhere.

    Returns:
        Tensor: (B, 3, height, width), uint8, BGR.

    Raises:
        ValueError: It is a batch of another function.
        UnreadableImageError: A file can be decoded neither there nor by Pillow.
        RuntimeError: None of them can be decoded there.
    """
    if not isinstance(inputs, torch.Tensor):
        raise ValueError("PackEncodedCrop needs collate_fn=dict(type='encoded_collate') in its "
                         'data loader.')
    parts = inputs.split([sample.num_bytes for sample in data_samples])
    jpegs = [(part, sample) for part, sample in zip(parts, data_samples) if 'crop' in sample]
    decoded = iter(decode_jpegs(*zip(*jpegs), device) if jpegs else ())
    images = []
    for part, sample in zip(parts, data_samples):
        if 'crop' in sample:
            image = F.resized_crop(
                next(decoded).to(device), *sample.crop, list(sample.img_shape),
                F.InterpolationMode(sample.interpolation), antialias=True)
            images.append(image.flip((0, 2) if sample.flip else (0,)))      # RGB to BGR
        else:
            images.append(part.view(3, *sample.img_shape[:2]).to(device, non_blocking=True))
    return torch.stack(images)


def decode_jpegs(contents, data_samples, device):
    """[(3, height, width)], uint8, RGB, of files that the device refuses by Pillow."""
    try:
        return decode_jpeg(list(contents), device=device)
    except RuntimeError:        # does not say of which file
        pass
    images, reasons = [], {}
    for content, sample in zip(contents, data_samples):
        path = sample.img_path
        try:
            images.append(decode_jpeg(content, device=device))
        except RuntimeError as error:
            reasons[path] = str(error).split('\n')[0]
            bgr = to_bgr(open_image(content.numpy().tobytes(), path), path)
            images.append(torch.from_numpy(mmcv.bgr2rgb(bgr)).permute(2, 0, 1))
    if len(reasons) == len(contents) > 1:   # it is not the files
        raise RuntimeError(f'No JPEG of a batch can be decoded on {device}: {reasons[path]}')
    for path, reason in reasons.items():
        print_log(f'{path} is decoded by Pillow, because {device} refuses it: {reason}',
                  logger='current', level=logging.WARNING)
    return images
