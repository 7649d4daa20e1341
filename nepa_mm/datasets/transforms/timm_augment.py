"""timm's augmentations for mmpretrain's pipelines; the reference fine-tunes with them.

mmpretrain's operations of the same names compute other numbers. Its RandAugment translates by a
fraction of the image instead of timm's constant 100 pixels. Its Mixup and CutMix draw a random
partner instead of reversing the batch, and do not smooth labels. Its erasing fills with clipped
integers before the normalisation.
"""
import re
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmpretrain.registry import BATCH_AUGMENTS
from PIL import Image
from timm.data import Mixup, auto_augment, rand_augment_transform
from timm.data.random_erasing import RandomErasing

# timm ignores a misspelt `mstd` or `t`, and fails an assertion without a message on other parts
SECTION = r'm\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]|t(weights|3a|3aw)'


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's posterize; 0 bits yield a black image, as with Pillow before 13."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


@TRANSFORMS.register_module()
class TimmRandAugment(BaseTransform):
    """RandAugment by timm.

    Args:
        policy (str): timm's policy string. Defaults to 'rand-m9-mstd0.5-inc1', as the reference.
        fill (int): Grey level of pixels from outside the image. Defaults to 128.
        translate_const (int): Largest translation in pixels. Defaults to 100, as the reference at
            224 pixels.

    Changes ``img`` (height, width, 3), uint8, BGR, or (height, width), treated as three equal
    channels. Shapes do not change.

    Raises:
        ValueError: timm does not know a part of the policy, or the image has another number of
            channels.
    """

    def __init__(self, policy: str = 'rand-m9-mstd0.5-inc1', fill: int = 128,
                 translate_const: int = 100):
        if not re.fullmatch(rf'rand(-({SECTION}))*', policy):
            raise ValueError(
                "policy is timm's, rand and any of m, n, p, mstd, mmax with a number, inc0, inc1, "
                f"tweights, t3a and t3aw, e.g. 'rand-m9-mstd0.5-inc1'; got '{policy}'")
        self.augment = rand_augment_transform(policy, dict(
            translate_const=translate_const, img_mean=(fill,) * 3,
            interpolation=Image.Resampling.BICUBIC))
        for op in self.augment.ops:
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = posterize

    def transform(self, results: dict) -> dict:
        """Augment ``results['img']``."""
        img = np.atleast_3d(results['img'])
        if img.shape[2] not in (1, 3):
            raise ValueError('TimmRandAugment augments images of 1 or 3 channels, got '
                             f'{img.shape[2]}; take it out of the train_pipeline.')
        rgb = np.broadcast_to(img[..., ::-1], (*img.shape[:2], 3))      # timm needs RGB
        augmented = np.asarray(self.augment(Image.fromarray(np.ascontiguousarray(rgb))))
        augmented = np.ascontiguousarray(augmented[..., ::-1][..., :img.shape[2]])
        results['img'] = augmented.reshape(results['img'].shape)
        return results


@BATCH_AUGMENTS.register_module()
class TimmBatchAugment:
    """timm's random erasing, then Mixup or CutMix, on a normalised batch.

    All images on a GPU share one lambda. Image i is mixed with image B - 1 - i. The one-hot
    targets include label smoothing.

    Args:
        mixup_alpha (float): Alpha of Mixup's Beta distribution. Defaults to 0.8.
        cutmix_alpha (float): Alpha of CutMix's Beta distribution. Defaults to 1.
        switch_prob (float): Probability of CutMix if both are enabled. Defaults to 0.5.
        label_smoothing (float): Label smoothing. Defaults to 0.1.
        erase_prob (float): Probability that a rectangle of 2 to 33 % of an image is replaced by
            normal noise. Defaults to 0.25.
    """

    def __init__(self, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.,
                 switch_prob: float = 0.5, label_smoothing: float = 0.1, erase_prob: float = 0.25):
        self.erase_prob = erase_prob
        self.mixup = Mixup(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha,
                           switch_prob=switch_prob, label_smoothing=label_smoothing)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor,
                 scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch.

        Args:
            inputs (Tensor): Normalised images (B, C, height, width), changed in place.
            scores (Tensor): One-hot labels (B, num_classes).

        Returns:
            tuple[Tensor, Tensor]: Images and soft targets (B, num_classes), fp32.

        Raises:
            ValueError: B is odd, so one image would be its own partner.
        """
        if len(inputs) % 2:
            raise ValueError('Mixup pairs the images of a batch and needs an even batch size, got '
                             f'{len(inputs)}; set train_dataloader.drop_last=True.')
        erase = RandomErasing(self.erase_prob, mode='pixel', device=inputs.device)
        self.mixup.num_classes = scores.shape[1]
        return self.mixup(erase(inputs), scores.argmax(dim=1))
