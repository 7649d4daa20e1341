"""Image loading with Pillow."""
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from nepa_mm.datasets.images import check_color_type, convert_pixels, read_image


@TRANSFORMS.register_module()
class LoadImageWithPillow(BaseTransform):
    """Load an image through :func:`decode_image`, or raise an error.

    For 8-bit RGB, grey, palette and 1-bit files the pixels equal those of mmcv's
    LoadImageFromFile. Differences from it, and from ``convert('RGB')`` in the reference code:

    ======================  =====================================================================
    truncated, corrupt      always an error; OpenCV before 5.0 fills the rest with grey
    CMYK                    as the reference; OpenCV differs by at most 2 of 255
    transparency            dropped, as in both; OpenCV darkens TIFFs by it
    16-bit grey             the high byte, as OpenCV; the reference clips, almost all is white
    float, 32-bit grey      see :func:`decode_image`; OpenCV reads none
    turned by EXIF          turned upright, as mmcv; ``convert('RGB')`` alone does not
    1 x 1                   loaded like any other size
    ======================  =====================================================================

    An existing ``img`` (datasets without files, mmpretrain's inferencers) is only converted. mmcv
    and mmpretrain crop and resize 'unchanged' images with other than 1 or 3 channels only by
    ``backend='cv2'``; LoadRandomResizedCrop handles any number.

    Args:
        color_type (str): 'color', 'grayscale' or 'unchanged', see :func:`decode_image`. The
            backbone needs ``in_channels`` 3, 1, or the number in the files. Defaults to 'color'.
        backend_args (dict, optional): Unused; accepted because this class replaces OpenMMLab's
            LoadImageFromFile. Defaults to None.

    Adds ``img``, ``img_shape`` and ``ori_shape``.

    Raises:
        ValueError: ``color_type`` is unknown.
        UnreadableImageError: ``results['img_path']`` cannot be read. UnreadableImageHook replaces
            such samples.
        DataError: See :func:`decode_image`.
    """

    def __init__(self, color_type: str = 'color', backend_args: dict | None = None):
        self.color_type = check_color_type(color_type)
        self.backend_args = backend_args
        self.channels = None    # of the network, set by the tools

    def transform(self, results: dict) -> dict:
        """Load ``results['img_path']``."""
        path, img = results.get('img_path'), results.get('img')
        if img is None:
            img = read_image(path, self.color_type, self.channels)
        else:
            img = img[..., ::-1] if img.shape[2:] == (3,) else img
            img = convert_pixels(img, path or 'An image', self.color_type, self.channels)
        results['img'] = img
        results['img_shape'] = results['ori_shape'] = img.shape[:2]
        return results
