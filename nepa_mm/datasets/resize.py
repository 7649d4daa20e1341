"""Images reduced on disk, so that training decodes fewer pixels."""
import io
import os
import shutil
from pathlib import Path

import mmcv
from PIL import Image

from nepa_mm.datasets.images import decode_image, is_grey, open_image, read_bytes


def resize_image(source: Path, target: Path, short_side: int, quality: int = 95) -> None:
    """Save an image at a smaller size, upright and antialiased. Never enlarges.

    An image that is small enough is copied. Other images are written as LoadImageWithPillow reads
    them: 8 bits per channel, grey if the file is grey, colour otherwise. The write is atomic.

    Args:
        source, target (Path): Files. The target has the format of the source.
        short_side (int): Maximum length of the shorter side in pixels.
        quality (int): JPEG quality, 1 to 95. Defaults to 95.

    Raises:
        DataError: The source is truncated, corrupt or not an image.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # not atomic_write, which flushes the disk and lists the folder for every file
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
