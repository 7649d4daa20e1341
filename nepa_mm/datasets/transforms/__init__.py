"""Pipeline transforms; importing this package registers them."""
from . import gpu_decode  # noqa: F401
from .crops import LoadRandomResizedCrop, PackEncodedCrop
from .loading import LoadImageWithPillow
from .timm_augment import TimmBatchAugment, TimmRandAugment

__all__ = ['LoadRandomResizedCrop', 'LoadImageWithPillow', 'PackEncodedCrop', 'TimmBatchAugment',
           'TimmRandAugment']
