"""JPEGs that workers pass on encoded; the device of the network decodes, crops and resizes them.

    file -> PackEncodedCrop: bytes, random crop and flip            (worker)
         -> encoded_collate: the bytes of a batch, concatenated     (worker)
         -> decode_crops: pixels, called by NEPADataPreprocessor    (GPU, or CPU without one)

A worker that does not decode is many times faster. The main process becomes slower: torchvision
waits for nvJPEG, and crops are resized one by one.
"""
import logging
from collections.abc import Sequence
from functools import cache

import mmcv
import torch
from mmengine.logging import print_log
from mmengine.registry import FUNCTIONS
from mmpretrain.structures import DataSample
from torchvision.transforms.v2 import functional as F

from nepa_mm.datasets.images import decode_image, decode_jpeg


@FUNCTIONS.register_module()
def encoded_collate(samples: Sequence[dict], _scope_: str | None = None) -> dict:
    """Collate samples of :class:`PackEncodedCrop`; see collate.py for ``_scope_``.

    Returns:
        dict: ``inputs``, the bytes of all images in one tensor (n,), uint8; ``data_samples``, a
        list, each with ``num_bytes``.
    """
    # one tensor, because each tensor that a worker sends keeps a file open
    parts = [one if isinstance(one, bytes) else one.numpy().tobytes()
             for one in (sample['inputs'] for sample in samples)]
    data_samples = [sample['data_samples'] for sample in samples]
    for sample, part in zip(data_samples, parts):
        sample.set_metainfo(dict(num_bytes=len(part)))
    inputs = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
    return dict(inputs=inputs, data_samples=data_samples)


def batch_shape(data_batch: dict) -> tuple[int, int, int]:
    """(images, height, width) of a batch at the network, encoded or not."""
    inputs = data_batch['inputs']
    if isinstance(inputs, torch.Tensor) and inputs.dim() == 1:
        samples = data_batch['data_samples']
        return len(samples), *samples[0].img_shape[:2]
    return len(inputs), *inputs[0].shape[-2:]


def decode_crops(inputs: torch.Tensor, data_samples: Sequence[DataSample],
                 device: torch.device | str) -> torch.Tensor:
    """Decode, crop, resize and flip a batch of :func:`encoded_collate`.

    Args:
        inputs (Tensor): Bytes of all images (n,), uint8, on the CPU.
        data_samples (Sequence[DataSample]): Their crops and flips.
        device (torch.device | str): Device of all steps. Decodes with nvJPEG on CUDA, with
            libjpeg elsewhere.

    Returns:
        Tensor: (B, 3, height, width), uint8, BGR.

    Raises:
        ValueError: ``inputs`` is not a tensor: another function collated the batch.
        UnreadableImageError: Neither the device nor Pillow can decode a file.
        RuntimeError: The device can decode none of the files.
    """
    if not isinstance(inputs, torch.Tensor):
        raise ValueError("Images must come as one tensor: set the data loader's collate_fn to "
                         "dict(type='default_collate'), or 'encoded_collate' for PackEncodedCrop.")
    device = torch.device(device)
    if device.type != 'cuda':
        return _decode_crops(inputs, data_samples, device)
    # nvJPEG does not wait for queued work (pytorch/vision#9606) and writes to memory that is free
    # on the current stream, so decode on a stream without pending work
    side, main = decode_stream(device), torch.cuda.current_stream(device)
    side.synchronize()
    with torch.cuda.stream(side):
        images = _decode_crops(inputs, data_samples, device)
    main.wait_stream(side)
    images.record_stream(main)
    return images


@cache
def decode_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream of a GPU reserved for decoding."""
    return torch.cuda.Stream(device)


def _decode_crops(inputs, data_samples, device):
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


def decode_jpegs(contents: Sequence[torch.Tensor], data_samples: Sequence[DataSample],
                 device: torch.device) -> list[torch.Tensor]:
    """Decode JPEGs; those that the device rejects are decoded by Pillow, with a warning.

    Returns:
        list[Tensor]: Pixels (3, height, width), uint8, RGB.

    Raises:
        UnreadableImageError, RuntimeError: See :func:`decode_crops`.
    """
    try:
        return decode_jpeg(list(contents), device=device)
    except RuntimeError:        # the error does not name the file
        pass
    images, reasons = [], {}
    for content, sample in zip(contents, data_samples):
        path = sample.img_path
        try:
            images.append(decode_jpeg(content, device=device))
        except RuntimeError as error:
            reasons[path] = str(error).split('\n')[0]
            bgr = decode_image(content.numpy().tobytes(), path)
            images.append(torch.from_numpy(mmcv.bgr2rgb(bgr)).permute(2, 0, 1))
    if len(reasons) == len(contents) > 1:   # the device is at fault, not the files
        raise RuntimeError(f'No JPEG of a batch can be decoded on {device}: {reasons[path]}')
    for path, reason in reasons.items():
        print_log(f'{path} is decoded by Pillow, because {device} refuses it: {reason}',
                  logger='current', level=logging.WARNING)
    return images
