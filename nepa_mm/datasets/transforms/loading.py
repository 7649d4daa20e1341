"""Images of any kind, loaded by Pillow."""
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from nepa_mm.datasets.images import check_color_type, convert_pixels, read_image


@TRANSFORMS.register_module()
class LoadImageWithPillow(BaseTransform):
    """Load an image of any kind through :func:`decode_image`, as the reference does, or not at all.

    For 8-bit RGB, grey, palette and 1-bit files the pixels are those of mmcv's
    LoadImageFromFile. Against it, and against ``convert('RGB')`` in the reference:

    ======================  =====================================================================
    truncated, damaged      an error always; OpenCV before 5.0 fills the rest with grey
    CMYK                    as the reference; OpenCV differs by at most 2 of 255
    transparency            dropped, as in both; OpenCV darkens by it in TIFFs
    16-bit grey             the high byte, as OpenCV; the reference clips, nearly all is white
    float, 32-bit grey      OpenCV reads none
    turned by EXIF          turned upright, as mmcv; ``convert('RGB')`` alone does not
    1 x 1                   an image like any other
    ======================  =====================================================================

    An ``img`` that is there already (data sets without files, mmpretrain's inferencers) is
    converted alone. mmcv and mmpretrain crop and resize 'unchanged' images of other than 1 or 3
    channels with ``backend='cv2'`` only; LoadRandomResizedCrop takes any.

    Args:
        color_type (str): 'color', 'grayscale' or 'unchanged', see :func:`decode_image`. The
            backbone's ``in_channels`` is 3, 1, or the number in the files. Defaults to 'color'.

    Adds ``img``, ``img_shape`` and ``ori_shape``.

    Raises:
        ValueError: ``color_type`` is something else.
        UnreadableImageError: ``results['img_path']`` cannot be read. The UnreadableImageHook
            replaces such samples.
        DataError: See :func:`decode_image`.
    """

    def __init__(self, color_type='color', backend_args=None):
        self.color_type = check_color_type(color_type)
        self.backend_args = backend_args
        self.channels = None    # of the network, where a tool knows it

    def transform(self, results):
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
