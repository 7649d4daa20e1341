"""JPEGs that travel as files, and are decoded, cropped and resized where the network is.

    file -> PackEncodedCrop: bytes, and the draws of crop and flip      (worker)
         -> encoded_collate: the bytes of a batch, one behind the other (worker)
         -> decode_crops: pixels, called by NEPADataPreprocessor        (GPU, or CPU without one)

A worker that decodes nothing is many times as fast. What it saves costs the main process some
time: torchvision waits for nvJPEG, and every crop is resized by itself.
"""
import logging
from functools import cache

import mmcv
import torch
from mmengine.logging import print_log
from mmengine.registry import FUNCTIONS
from torchvision.transforms.v2 import functional as F

from nepa_mm.datasets.images import decode_image, decode_jpeg


@FUNCTIONS.register_module()
def encoded_collate(samples, _scope_=None):
    """A batch of :class:`PackEncodedCrop`; see collate.py for ``_scope_``.

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
        raise ValueError("Images must come as one tensor: set the data loader's collate_fn to "
                         "dict(type='default_collate'), or 'encoded_collate' for PackEncodedCrop.")
    device = torch.device(device)
    if device.type != 'cuda':
        return _decode_crops(inputs, data_samples, device)
    # nvJPEG writes at once, whatever is queued (pytorch/vision#9606), into memory that is free for
    # the current stream: let that be one on which nothing is pending
    side, main = decode_stream(device), torch.cuda.current_stream(device)
    side.synchronize()
    with torch.cuda.stream(side):
        images = _decode_crops(inputs, data_samples, device)
    main.wait_stream(side)
    images.record_stream(main)
    return images


@cache
def decode_stream(device):
    """The stream of a GPU on which images are decoded and nothing else is done."""
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


def decode_jpegs(contents, data_samples, device):
    """[(3, height, width)], uint8, RGB; one by one if there is one that the device refuses.

    Pillow decodes that one.
    """
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
            bgr = decode_image(content.numpy().tobytes(), path)
            images.append(torch.from_numpy(mmcv.bgr2rgb(bgr)).permute(2, 0, 1))
    if len(reasons) == len(contents) > 1:   # it is not the files
        raise RuntimeError(f'No JPEG of a batch can be decoded on {device}: {reasons[path]}')
    for path, reason in reasons.items():
        print_log(f'{path} is decoded by Pillow, because {device} refuses it: {reason}',
                  logger='current', level=logging.WARNING)
    return images
