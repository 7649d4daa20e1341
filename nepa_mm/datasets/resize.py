"""JPEGs made smaller, of which training reads the same."""
import io
import os
import shutil

import mmcv
from PIL import Image

from nepa_mm.datasets.images import (
    decode_image,
    is_grey,
    open_image,
    read_bytes,
)


def resize_image(source, target, short_side, quality=95):
    """Save an image at a smaller size: turned upright, antialiased, never enlarged.

    An image that is small enough is copied. Others are written as LoadImageWithPillow reads them: 8
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
