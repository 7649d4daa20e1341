"""Reading image files: complete pixels, or an error of one sentence that names the file."""
import glob
import io
import os
from collections.abc import Iterable

import mmcv
import numpy as np
from mmengine import fileio
from PIL import Image, ImageOps, ImageSequence

from nepa_mm.utils.errors import DataError, UnreadableImageError, first_line

ORIENTATION = 0x0112    # EXIF: 1 is upright
SAMPLES_PER_PIXEL = 277     # TIFF
COLOR_TYPES = dict(color='RGB', grayscale='L', unchanged=None)     # OpenMMLab's names, Pillow's
# common image formats that Pillow reads
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.tif', '.tiff', '.bmp',
                  '.gif', '.ppm', '.pgm', '.pbm', '.pnm', '.jp2', '.avif', '.tga')


def find_images(folder: str | os.PathLike) -> list[str]:
    """Return the sorted paths of all image files in a folder and its subfolders.

    Links are followed. Files whose name begins with a dot are left out.
    """
    return sorted(os.path.normpath(os.path.join(where, file))
                  for where, _, files in os.walk(folder, followlinks=True) for file in files
                  if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith('.'))


def expand_images(paths: Iterable[str]) -> list[str]:
    """Return the image files that files, folders and patterns name, each once and in that order.

    Args:
        paths (list[str]): A folder stands for all images below it, see :func:`find_images`. A path
            that does not exist may be a pattern with ``*``, ``?``, ``[...]`` or ``**``.

    Raises:
        FileNotFoundError: A path does not exist, or names no image.
    """
    files = []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            kind = 'image that matches' if glob.has_magic(path) else 'image'
            raise FileNotFoundError(f'There is no {kind} {path}.')
        for match in matches:
            found = find_images(match) if os.path.isdir(match) else [match]
            if not found:
                raise FileNotFoundError(f'{match} holds no image.')
            files += found
    return list(dict.fromkeys(files))


def read_bytes(path: str) -> bytes:
    """Read a file through mmengine's file backends.

    Raises:
        UnreadableImageError: The file cannot be read.
    """
    try:
        return fileio.get(path)
    except Exception as error:      # every backend raises its own
        raise _unreadable(path, error) from error


def open_image(content: bytes, path: str) -> Image.Image:
    """Open an image with Pillow: parse the header, but do not decode pixels.

    Raises:
        UnreadableImageError: The content is not an image, or its header claims more pixels than
            Pillow considers safe (179 million).
    """
    try:
        return Image.open(io.BytesIO(content))
    except Exception as error:      # every plugin raises its own
        raise _unreadable(path, error) from error


def is_grey(image: Image.Image) -> bool:
    """Whether an image has one channel, not counting transparency. Palettes count as colour."""
    return image.mode[0] in 'L1IF' and image.mode != 'LAB'


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) in the header of a JPEG; None for other files and irregular headers."""
    at = 2 if content[:3] == b'\xff\xd8\xff' else len(content)
    while at + 9 <= len(content) and content[at] == 0xff:
        marker = content[at + 1]
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):     # start of frame
            return tuple(int.from_bytes(content[i:i + 2], 'big') for i in (at + 5, at + 7))
        at += 2 + int.from_bytes(content[at + 2:at + 4], 'big')
    return None


def read_image(path: str, color_type: str = 'color', channels: int | None = None) -> np.ndarray:
    """Read and decode an image file, see :func:`decode_image`."""
    return decode_image(read_bytes(path), path, color_type, channels)


def decode_image(content: bytes, path: str, color_type: str = 'color',
                 channels: int | None = None) -> np.ndarray:
    """Decode an image to upright pixels in OpenMMLab's layout.

    ======================  =====================================================================
    transparency            dropped, except for 'unchanged'
    16-bit grey             the high byte, as OpenCV; the reference clips, almost all is white
    float, 32-bit grey      rounded, if within 0 to 255; else an error
    animated GIF and WebP   the first frame
    TIFF of several pages   the first page; 'unchanged': one channel per page if pages are grey
    .npy                    (height, width) or (height, width, C); 3 channels are RGB
    ======================  =====================================================================

    Args:
        content (bytes): Content of the file.
        path (str): Path for error messages.
        color_type (str): 'color': (height, width, 3), uint8, BGR. 'grayscale': (height, width),
            uint8. 'unchanged': channels and values of the file, (height, width) or (height,
            width, C), uint8 if the file is, else fp32; 3 channels are BGR, any other number keeps
            the order of the file, e.g. RGBA. Defaults to 'color'.
        channels (int, optional): Required number of channels of 'unchanged' images that are not
            grey. Defaults to None: any.

    Returns:
        ndarray: The pixels.

    Raises:
        UnreadableImageError: The content is truncated, not an image, or detectably corrupt.
        DataError: ``color_type`` cannot represent the channels or values.
    """
    try:
        if content.startswith(b'\x93NUMPY'):
            pixels = _load_npy(content)
        else:
            return pixels_of(open_image(content, path), color_type, channels, path)
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return convert_pixels(pixels, path, color_type, channels)


def pixels_of(image: Image.Image, color_type: str = 'color', channels: int | None = None,
              path: str | None = None) -> np.ndarray:
    """Upright pixels of an open Pillow image, as :func:`decode_image` gives them for its file.

    Args:
        image (Image): Opened from a file, or made in memory. It is not changed.
        color_type (str), channels (int, optional): See :func:`decode_image`.
        path (str, optional): Path for error messages. Defaults to None: the image's file name.

    Raises:
        UnreadableImageError, DataError: See :func:`decode_image`.
    """
    path = path or getattr(image, 'filename', None) or f'of mode {image.mode}'
    try:
        pixels = _pixels(image, path, color_type)
        if isinstance(pixels, Image.Image):
            return _to_array(pixels.convert(COLOR_TYPES[color_type]))
    except DataError:
        raise
    except Exception as error:      # decoding is lazy, and every plugin raises its own
        raise _unreadable(path, error) from error
    return convert_pixels(pixels, path, color_type, channels)


def _load_npy(content):
    pixels = np.load(io.BytesIO(content), allow_pickle=False)
    if pixels.ndim not in (2, 3) or not pixels.size or pixels.dtype.kind not in 'buif':
        raise ValueError(f'an array of {pixels.dtype} and shape {pixels.shape} is not an image '
                         '(height, width, channels)')
    return pixels * np.uint8(255) if pixels.dtype.kind == 'b' else pixels


def _pixels(image, path, color_type):
    """Turn an image upright; as an array if Pillow would convert it to 8 bits incorrectly."""
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
    # Pillow opens 16-bit PGMs, and before version 11.3 also 16-bit PNGs, as 32-bit
    if image.mode.startswith('I;16') or (image.mode == 'I' and kind in ('PNG', 'PPM')):
        return np.asarray(image).astype(np.uint16)
    if color_type != 'unchanged':
        return np.asarray(image) if image.mode in ('I', 'F') else image
    if image.mode in ('P', 'PA'):       # a palette index is not a channel
        image = image.convert('RGBA' if 'transparency' in image.info or image.mode == 'PA'
                              else 'RGB')
    return np.asarray(image.convert('L') if image.mode == '1' else image)


def convert_pixels(pixels: np.ndarray, path: str, color_type: str,
                   wanted: int | None = None) -> np.ndarray:
    """Convert pixels in grey, RGB or other channels to ``color_type``, see :func:`decode_image`.

    Args:
        pixels (ndarray): (height, width) or (height, width, C), of any real dtype.
        path (str): Path for error messages.
        color_type (str): 'color', 'grayscale' or 'unchanged'.
        wanted (int, optional): ``channels`` of :func:`decode_image`. Defaults to None.

    Raises:
        DataError: See :func:`decode_image`.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels[..., 0]
    if color_type == 'unchanged':
        if wanted and channels not in (1, wanted):
            raise DataError(f'{path} has {channels} channels, but the network '
                            f'in_channels={wanted}.')
        if pixels.dtype.kind == 'f' and not np.isfinite(pixels).all():
            raise DataError(f'{path} has pixels that are not finite (nan or infinite).')
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
    return mmcv.rgb2bgr(pixels) if image.mode == 'RGB' else pixels  # numpy is ten times slower


def to_display_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert an image in OpenMMLab's layout for display: (height, width, 3), uint8, RGB.

    One or two channels: the first as grey. Three: BGR. More: the first three as RGB. Other dtypes
    than uint8 are scaled from minimum..maximum to 0..255.
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
    return UnreadableImageError(f'The image {path} cannot be read: {first_line(error)}.')


def check_color_type(color_type: str) -> str:
    """Return a valid ``color_type``; raise ValueError for another."""
    if color_type not in COLOR_TYPES:
        raise ValueError(f'color_type must be one of {tuple(COLOR_TYPES)}, got {color_type!r}.')
    return color_type
