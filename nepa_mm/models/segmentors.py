"""Segmentation with patches that do not divide the crop.

Needs mmseg, so ``custom_imports`` of the segmentation configs names this module.
"""
import math

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from torch import Tensor

from nepa_mm.compat import stack

stack.require('mmseg')

from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead

PATCH_RULES = ('resize', 'pad', 'crop')


def crop_or_pad(x: Tensor, size: tuple[int, int], **padding) -> Tensor:
    """Crop or pad (..., h, w) at the bottom and right to ``size`` (height, width).

    Args:
        x (Tensor): (..., h, w).
        size (tuple[int, int]): Height and width of the result.
        **padding: ``mode`` and ``value`` of ``torch.nn.functional.pad``.
    """
    (height, width), (h, w) = size, x.shape[-2:]
    return F.pad(x[..., :height, :width],
                 (0, max(width - w, 0), 0, max(height - h, 0)), **padding)


@MODELS.register_module()
class NEPASegmentor(EncoderDecoder):
    """mmseg's EncoderDecoder for images whose sides are not multiples of the patch.

    A crop of 512 pixels has 36.57 patches of 14 pixels per side; 'resize' makes it a map of
    37 x 37. Under every rule, logits have
    the size of the input, and the logit at (row, column) belongs to the pixel at (row, column).
    Every rule produces at least two patches per axis: Feature2Pyramid halves the map.

    Args:
        backbone (dict): A :class:`NEPAViT` with ``out_type='featmap'``.
        decode_head (dict): As in EncoderDecoder.
        patch_rule (str): What the backbone sees of an image of 512 x 512 pixels:

            - 'resize': the image, resized bilinearly to 518. Features cover exactly the
              image, in training and in both test modes.
            - 'pad': 518 pixels, the last 6 zero after normalisation. Labels are padded with
              ``ignore_index``; logits of the margin are cut.
            - 'crop': the first 504 pixels. Labels are cropped; the last 8 rows and columns
              repeat the nearest logits.

            Defaults to 'resize', which sees every pixel and invents none, at a scale of
            1.012.
        **kwargs: ``neck``, ``auxiliary_head``, ``train_cfg``, ``test_cfg``,
            ``data_preprocessor`` and ``init_cfg`` of EncoderDecoder.

    Raises:
        ValueError: ``patch_rule`` is unknown.
    """

    def __init__(self, backbone: dict, decode_head: dict, patch_rule: str = 'resize', **kwargs):
        if patch_rule not in PATCH_RULES:
            raise ValueError(f'patch_rule must be one of {PATCH_RULES}, got {patch_rule!r}.')
        super().__init__(backbone, decode_head, **kwargs)
        self.data_preprocessor._non_blocking = True     # mmseg's has no argument for it
        self.patch_rule = patch_rule

    def fitted_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the backbone sees of an image of ``size`` (height, width)."""
        count = math.floor if self.patch_rule == 'crop' else math.ceil
        return tuple(max(count(side / patch), 2) * patch
                     for side, patch in zip(size, self.backbone.patch_embed.patch_size))

    def fit_patches(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the backbone sees of images (B, C, height, width) of any size."""
        size = self.fitted_size(inputs.shape[2:])
        if self.patch_rule == 'resize':
            return F.interpolate(inputs, size, mode='bilinear')
        return crop_or_pad(inputs, size)

    def extract_feat(self, inputs):
        """Feature maps of images (B, C, height, width) of any size."""
        return super().extract_feat(self.fit_patches(inputs))

    def encode_decode(self, inputs, batch_img_metas):
        """Logits (B, classes, height, width) of images (B, C, height, width)."""
        size = covered = inputs.shape[2:]
        if self.patch_rule != 'resize':
            covered = torch.Size(self.fitted_size(size))
        # the decode head resizes its logits to an img_shape that is a torch.Size
        metas = [dict(meta, img_shape=covered) for meta in batch_img_metas]
        return crop_or_pad(super().encode_decode(inputs, metas), size, mode='replicate')

    def loss(self, inputs, data_samples):
        """Losses of the heads, on the pixels that the backbone sees."""
        if self.patch_rule != 'resize':
            size = self.fitted_size(inputs.shape[2:])
            for sample in data_samples:
                sample.gt_sem_seg = PixelData(data=crop_or_pad(
                    sample.gt_sem_seg.data, size, value=self.decode_head.ignore_index))
        return super().loss(inputs, data_samples)


@MODELS.register_module()
class LinearSegHead(BaseDecodeHead):
    """Linear segmentation probe: batch normalisation and a 1 x 1 convolution.

    Args:
        in_channels (int | list[int]): Channels of the feature maps, with ``in_index`` and
            ``input_transform`` of BaseDecodeHead.
        **kwargs: Other arguments of BaseDecodeHead; ``channels`` is the sum of
            ``in_channels``, and ``norm_cfg`` must be set.
    """

    def __init__(self, in_channels: int | list[int], **kwargs):
        super().__init__(in_channels, **kwargs)
        self.norm = build_norm_layer(self.norm_cfg, self.channels)[1]

    def forward(self, inputs):
        """Logits at the size of the feature maps."""
        return self.cls_seg(self.norm(self._transform_inputs(inputs)))
