"""Reading an image file whole, or saying in one sentence that it cannot be read."""
import io

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine import fileio
from mmengine.registry import TRANSFORMS
from PIL import Image, ImageOps

ORIENTATION = 0x0112    # EXIF: 1 is upright
# what Pillow reads and people call images
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.tif', '.tiff', '.bmp',
                  '.gif', '.ppm', '.pgm', '.pbm', '.pnm', '.jp2', '.avif', '.tga')


class DataError(ValueError):
    """A file of the data set is at fault; the message, one sentence, names it.

    Tools end with that sentence alone whenever it is raised, also in a worker of a data loader.
    """


class UnreadableImageError(DataError):
    """An image file that is missing, corrupt or no image."""


def read_bytes(path):
    """The content of a file, from any of mmengine's backends.

    Raises:
        UnreadableImageError: There is no such file.
    """
    try:
        return fileio.get(path)
    except Exception as error:      # every backend raises its own
        raise _unreadable(path, error) from error


def open_image(content, path):
    """An image with its header read and its pixels not yet.

    Raises:
        UnreadableImageError: It is no image, or it claims more pixels than Pillow deems safe
            (179 million).
    """
    try:
        return Image.open(io.BytesIO(content))
    except Exception as error:      # so does every plugin
        raise _unreadable(path, error) from error


def jpeg_size(content):
    """(height, width) as a JPEG's header says; None for other files and odd headers."""
    at = 2 if content[:3] == b'\xff\xd8\xff' else len(content)
    while at + 9 <= len(content) and content[at] == 0xff:
        marker = content[at + 1]
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):     # start of frame
            return tuple(int.from_bytes(content[i:i + 2], 'big') for i in (at + 5, at + 7))
        at += 2 + int.from_bytes(content[at + 2:at + 4], 'big')
    return None


def decode_jpeg(content, **options):
    """torchvision's decoder, to RGB: (3, height, width), uint8, of one JPEG or of a list.

    Imported by those who call it alone: torchvision 0.29 announced that it will go some day.

    Args:
        content (Tensor | list[Tensor]): Bytes (n,), uint8, on the CPU.
        **options: ``device`` and ``apply_exif_orientation``.

    Raises:
        RuntimeError: It cannot be decoded.
    """
    from torchvision import io as torchvision_io
    return torchvision_io.decode_jpeg(content, mode=torchvision_io.ImageReadMode.RGB, **options)


def to_bgr(image, path):
    """The pixels of an opened image, upright: (height, width, 3), uint8, BGR.

    Raises:
        UnreadableImageError: The file ends too early, or its content is damaged in a way that
            the decoder notices.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PNG'):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return mmcv.rgb2bgr(np.asarray(image.convert('RGB')))     # numpy takes ten times as long
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    reason = (str(error).strip() or type(error).__name__).split('\n')[0].split(' <_io')[0]
    return UnreadableImageError(f'The image {path} cannot be read: {reason.rstrip(".")}.')


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
class LoadWholeImage(BaseTransform):
    """Load an image of any kind through Pillow, as the reference does, or not at all.

    For 8-bit RGB, grey, palette and 1-bit files the pixels are those of mmcv's
    LoadImageFromFile. Against it, and against ``convert('RGB')`` in the reference:

    ======================  =====================================================================
    truncated, damaged      an error always; OpenCV before 5.0 fills the rest with grey
    CMYK                    as the reference; OpenCV differs by at most 1 of 255
    transparency            dropped, as in both
    16-bit grey             the high byte, as OpenCV; the reference clips, nearly all is white
    animated GIF and WebP   the first frame, as in both
    turned by EXIF          turned upright, as mmcv; ``convert('RGB')`` alone does not
    1 x 1                   an image like any other
    ======================  =====================================================================

    Adds ``img`` (height, width, 3), uint8, BGR, ``img_shape`` and ``ori_shape``.

    Raises:
        UnreadableImageError: ``results['img_path']`` cannot be read. The UnreadableImageHook
            replaces such samples.
    """

    def transform(self, results):
        """Load ``results['img_path']``."""
        path = results['img_path']
        results['img'] = to_bgr(open_image(read_bytes(path), path), path)
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results
