"""Pipeline transforms; importing this package registers them."""
from .crops import LoadRandomResizedCrop
from .loading import LoadImageWithPillow
from .timm_augment import TimmBatchAugment, TimmRandAugment

__all__ = ['LoadRandomResizedCrop', 'LoadImageWithPillow', 'TimmBatchAugment',
           'TimmRandAugment']
