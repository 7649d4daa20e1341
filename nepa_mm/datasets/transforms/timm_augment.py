"""timm's augmentations for mmpretrain's pipelines: the reference fine-tunes with timm.

mmpretrain has operations of the same names, but not the same numbers: its RandAugment
translates by a share of the image instead of timm's constant 100 pixels, its Mixup and CutMix
draw a random partner instead of the reversed batch and smooth no labels, and its erasing fills
with clipped integers before the normalisation.
"""
import re

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmpretrain.registry import BATCH_AUGMENTS
from PIL import Image
from timm.data import Mixup, auto_augment, rand_augment_transform
from timm.data.random_erasing import RandomErasing

# timm ignores a misspelt `mstd` or `t`, and asserts without a word on others
SECTION = r'm\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]|t(weights|3a|3aw)'


def posterize(image, bits_to_keep, **kwargs):
    """timm's operation, with the black image for 0 bits that Pillow gave before 13."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


@TRANSFORMS.register_module()
class TimmRandAugment(BaseTransform):
    """RandAugment by timm.

    Args:
        policy (str): timm's description. Defaults to 'rand-m9-mstd0.5-inc1', the
            reference's.
        fill (int): Grey level of what moves into view. Defaults to 128.
        translate_const (int): Largest translation in pixels; the reference's is 100 at
            224 pixels. Defaults to 100.

    Changes ``img`` (height, width, 3), uint8, BGR, or (height, width), which becomes what three
    equal channels would. Shapes stay as they are.

    Raises:
        ValueError: timm does not know the policy, or a part of it; or the image has another number
            of channels.
    """

    def __init__(self, policy='rand-m9-mstd0.5-inc1', fill=128, translate_const=100):
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

    def transform(self, results):
        """Augment ``results['img']``."""
        img = np.atleast_3d(results['img'])
        if img.shape[2] not in (1, 3):
            raise ValueError('TimmRandAugment augments images of 1 or 3 channels, got '
                             f'{img.shape[2]}; take it out of the train_pipeline.')
        rgb = np.broadcast_to(img[..., ::-1], (*img.shape[:2], 3))      # timm wants it
        augmented = np.asarray(self.augment(Image.fromarray(np.ascontiguousarray(rgb))))
        augmented = np.ascontiguousarray(augmented[..., ::-1][..., :img.shape[2]])
        results['img'] = augmented.reshape(results['img'].shape)
        return results


@BATCH_AUGMENTS.register_module()
class TimmBatchAugment:
    """Random erasing, then Mixup or CutMix, by timm, on a normalised batch.

    One lambda holds for the batch of one GPU, and an image's partner stands at the
    mirrored place. The label smoothing is part of the one-hot targets.

    Args:
        mixup_alpha (float): Defaults to 0.8.
        cutmix_alpha (float): Defaults to 1.
        switch_prob (float): Share of CutMix when both are on. Defaults to 0.5.
        label_smoothing (float): Defaults to 0.1.
        erase_prob (float): Share of images with one rectangle of normal noise, of 2 to
            33 % of the area. Defaults to 0.25.
    """

    def __init__(self, mixup_alpha=0.8, cutmix_alpha=1., switch_prob=0.5,
                 label_smoothing=0.1, erase_prob=0.25):
        self.erase_prob = erase_prob
        self.mixup = Mixup(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha,
                           switch_prob=switch_prob, label_smoothing=label_smoothing)

    @torch.no_grad()
    def __call__(self, inputs, scores):
        """Augment a batch.

        Args:
            inputs (Tensor): Normalised images (B, C, height, width), changed in place.
            scores (Tensor): One-hot labels (B, num_classes).

        Returns:
            tuple[Tensor, Tensor]: Images and soft targets (B, num_classes), fp32.

        Raises:
            ValueError: B is odd, so that an image would be its own partner.
        """
        if len(inputs) % 2:
            raise ValueError('Mixup pairs the images of a batch and needs an even batch size, got '
                             f'{len(inputs)}; set train_dataloader.drop_last=True.')
        erase = RandomErasing(self.erase_prob, mode='pixel', device=inputs.device)
        self.mixup.num_classes = scores.shape[1]
        return self.mixup(erase(inputs), scores.argmax(dim=1))
