"""The networks; importing this package registers them. Start reading at nepa.py.

segmentors.py needs mmseg, so configs of segmentation name it in ``custom_imports``.
"""
from .data_preprocessor import NEPAClsDataPreprocessor, NEPADataPreprocessor
from .heads import AttentiveClsHead
from .losses import SIGReg
from .nepa import NEPA, NEPAHead, next_embedding_loss
from .timm_eva import nepa_vit
from .vit import NEPAViT

__all__ = ['NEPA', 'AttentiveClsHead', 'NEPAClsDataPreprocessor', 'NEPADataPreprocessor',
           'NEPAHead', 'NEPAViT', 'SIGReg', 'nepa_vit', 'next_embedding_loss']
