"""Datasets and transforms; importing this package registers them."""
from . import collate, transforms  # noqa: F401
from .digits import Digits
from .few_labels import FashionMNISTSubset
from .folders import ImageFolder
from .imagenet_shards import ImageNetShards

__all__ = ['Digits', 'FashionMNISTSubset', 'ImageFolder', 'ImageNetShards']
