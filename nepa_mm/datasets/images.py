"""The one reader of image files: all of an image, or one sentence that says why not."""
import io

import mmcv
import numpy as np
from mmengine import fileio
from PIL import Image, ImageOps, ImageSequence

from nepa_mm.utils.errors import DataError, UnreadableImageError

ORIENTATION = 0x0112    # EXIF: 1 is upright
SAMPLES_PER_PIXEL = 277     # TIFF
COLOR_TYPES = dict(color='RGB', grayscale='L', unchanged=None)     # OpenMMLab's names, Pillow's
# what Pillow reads and people call images
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.tif', '.tiff', '.bmp',
                  '.gif', '.ppm', '.pgm', '.pbm', '.pnm', '.jp2', '.avif', '.tga')


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


def is_grey(image):
    """Whether an opened image has one channel, or one and transparency; a palette is colour."""
    return image.mode[0] in 'L1IF' and image.mode != 'LAB'


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


def read_image(path, color_type='color', channels=None):
    """The pixels of a file, for networks and for people; see :func:`decode_image`."""
    return decode_image(read_bytes(path), path, color_type, channels)


def decode_image(content, path, color_type='color', channels=None):
    """The pixels of a file's content, turned upright, as OpenMMLab keeps them.

    ======================  =====================================================================
    transparency            dropped, but for 'unchanged'
    16-bit grey             the high byte, as OpenCV; the reference clips, nearly all is white
    float, 32-bit grey      as they are, if they are numbers from 0 to 255; else an error
    animated GIF and WebP   the first frame
    TIFF of several pages   the first page; 'unchanged': a channel for each page of one channel
    .npy                    (height, width) or (height, width, C); 3 channels are RGB
    ======================  =====================================================================

    Args:
        content (bytes): The file.
        path (str): What error messages call it.
        color_type (str): 'color', (height, width, 3), uint8, BGR; 'grayscale', (height, width),
            uint8; 'unchanged', the channels and values of the file, (height, width) or (height,
            width, C), uint8 or else fp32. Of 'unchanged', 3 channels are BGR, and others have
            the order of the file: RGBA, say. Defaults to 'color'.
        channels (int, optional): How many 'unchanged' pixels have to have, if not one. Defaults to
            None: any number.

    Returns:
        ndarray: The pixels.

    Raises:
        UnreadableImageError: It is no image, ends too early, or is damaged in a way that the
            decoder notices.
        DataError: Its channels or values are none that ``color_type`` can show.
    """
    try:
        if content.startswith(b'\x93NUMPY'):
            pixels = _load_npy(content)
        else:
            image = open_image(content, path)
            pixels = _pixels(image, path, color_type)
            if isinstance(pixels, Image.Image):
                return _to_array(pixels.convert(COLOR_TYPES[color_type]))
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return convert_pixels(pixels, path, color_type, channels)


def _load_npy(content):
    pixels = np.load(io.BytesIO(content), allow_pickle=False)
    if pixels.ndim not in (2, 3) or not pixels.size or pixels.dtype.kind not in 'buif':
        raise ValueError(f'an array of {pixels.dtype} and shape {pixels.shape} is no image '
                         '(height, width, channels)')
    return pixels * np.uint8(255) if pixels.dtype.kind == 'b' else pixels


def _pixels(image, path, color_type):
    """An opened image upright: as it is if Pillow converts it to 8 bits rightly, else an array."""
    kind = image.format
    if color_type == 'unchanged' and kind == 'TIFF':
        channels = len(image.getbands())
        stored = image.tag_v2.get(SAMPLES_PER_PIXEL, 1)
        if stored > channels and image.mode not in ('P', 'PA'):
            raise DataError(f'{path} has {stored} channels, of which Pillow reads {channels}; '
                            'store its pixels as .npy.')
        if channels == 1 and getattr(image, 'n_frames', 1) > 1:
            return np.dstack([np.asarray(ImageOps.exif_transpose(page))
                              for page in ImageSequence.Iterator(image)])
    image = ImageOps.exif_transpose(image)
    # Pillow opens 16-bit PGMs as 32-bit, and before its version 11.3 such PNGs, too
    if image.mode.startswith('I;16') or (image.mode == 'I' and kind in ('PNG', 'PPM')):
        return np.asarray(image).astype(np.uint16)
    if color_type != 'unchanged':
        return np.asarray(image) if image.mode in ('I', 'F') else image
    if image.mode in ('P', 'PA'):       # a palette is no channel
        image = image.convert('RGBA' if 'transparency' in image.info or image.mode == 'PA'
                              else 'RGB')
    return np.asarray(image.convert('L') if image.mode == '1' else image)


def convert_pixels(pixels, path, color_type, wanted=None):
    """Grey or RGB pixels as an image of ``color_type``; see :func:`decode_image`.

    Args:
        pixels (ndarray): (height, width) or (height, width, C), of any real type.
        path (str): What error messages call them.
        color_type (str): 'color', 'grayscale' or 'unchanged'.
        wanted (int, optional): ``channels`` of :func:`decode_image`. Defaults to None.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels[..., 0]
    if color_type == 'unchanged':
        if wanted and channels not in (1, wanted):
            raise DataError(f'{path} has {channels} channels, but the network '
                            f'in_channels={wanted}.')
        if pixels.dtype.kind == 'f' and not np.isfinite(pixels).all():
            raise DataError(f'{path} has pixels that are no numbers (nan or infinite).')
        pixels = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)
        return np.ascontiguousarray(pixels[..., ::-1]) if channels == 3 else pixels
    if channels not in (1, 3):
        raise DataError(f'{path} has {channels} channels, but color_type={color_type!r} reads 1 '
                        "or 3; color_type='unchanged' reads all.")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        if not 0 <= low <= high <= 255 or (0 < high <= 1 and pixels.dtype.kind == 'f'):
            raise DataError(f'{path} has {pixels.dtype} values from {low:g} to {high:g}, but '
                            f'color_type={color_type!r} needs 0 to 255; rescale them, or set '
                            "color_type='unchanged' and mean and std of that range.")
        pixels = np.rint(pixels).astype(np.uint8)
    return _to_array(Image.fromarray(np.ascontiguousarray(pixels)).convert(COLOR_TYPES[color_type]))


def _to_array(image):
    pixels = np.asarray(image)
    return mmcv.rgb2bgr(pixels) if image.mode == 'RGB' else pixels  # numpy takes ten times as long


def to_picture(pixels):
    """What a person is shown of an image of OpenMMLab: (height, width, 3), uint8, RGB.

    One channel is grey, and so is the first of two. Of more than three, the first three are red,
    green and blue. What is not uint8 is stretched from its smallest to its largest value.
    """
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        pixels = np.dstack([pixels if pixels.ndim == 2 else pixels[..., 0]] * 3)
    else:
        pixels = pixels[..., ::-1] if pixels.shape[2] == 3 else pixels[..., :3]
    if pixels.dtype != np.uint8:
        low, high = np.nanmin(pixels), np.nanmax(pixels)
        pixels = (np.nan_to_num(pixels - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _unreadable(path, error):
    reason = (str(error).strip() or type(error).__name__).split('\n')[0].split(' <_io')[0]
    return UnreadableImageError(f'The image {path} cannot be read: {reason.rstrip(".")}.')


def plain_jpeg_size(content):
    """(height, width) of a JPEG of which every decoder makes the same, None of other files.

    Such a one has the usual colours, stands upright and is not torn.
    """
    try:
        image = Image.open(io.BytesIO(content))
        plain = (image.format == 'JPEG' and image.mode in ('RGB', 'L')
                 and image.info.get('adobe_transform') != 0      # stored as RGB, not YCbCr
                 and image.getexif().get(ORIENTATION, 1) == 1
                 and b'\xff\xd9' in content[-64:])               # the mark of the end
    except Exception:       # no image, or damaged EXIF
        return None
    return image.size[::-1] if plain else None


def check_color_type(color_type):
    if color_type not in COLOR_TYPES:
        raise ValueError(f'color_type must be one of {tuple(COLOR_TYPES)}, got {color_type!r}.')
    return color_type
