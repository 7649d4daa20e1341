"""Datasets and transforms; importing this package registers them."""
from . import collate, transforms  # noqa: F401
from .digits import Digits
from .imagenet_shards import ImageNetShards

__all__ = ['Digits', 'ImageNetShards']
