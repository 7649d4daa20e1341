"""Handwritten digits, shipped with scikit-learn."""
from typing import Any

import numpy as np
from mmengine.registry import DATASETS
from mmpretrain.datasets.base_dataset import BaseDataset

from nepa_mm.datasets.few_labels import FewLabels

SPLITS = ('train', 'test')
NUM_TRAIN = 1297


@DATASETS.register_module()
class Digits(FewLabels, BaseDataset):
    """1,797 handwritten digits of 8 x 8 pixels (UCI ML repository, shipped with scikit-learn).

    A fixed shuffle splits them into 1,297 training and 500 test images.

    Args:
        split (str): 'train' or 'test'.
        **kwargs: ``num_labels`` and ``seed`` of :class:`FewLabels`; ``pipeline``, ``test_mode``
            and other arguments of mmpretrain's BaseDataset.

    A sample enters the pipeline as ``img`` (8, 8, 3), uint8, and ``gt_label``.

    Raises:
        ValueError: ``split`` is unknown, or ``num_labels`` is not a multiple of 10 or too large.
        ImportError: scikit-learn is missing.
    """

    METAINFO = dict(classes=tuple('0123456789'))

    def __init__(self, split: str, **kwargs: Any):
        if split not in SPLITS:
            raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
        self.split = split
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        """All samples of the split, for mmengine's BaseDataset."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError('The Digits dataset is part of scikit-learn; '
                              'run: pip install scikit-learn') from None
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        order = order[:NUM_TRAIN] if self.split == 'train' else order[NUM_TRAIN:]
        images = (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8, 1)
        return [dict(img=images[i].repeat(3, axis=2), img_shape=(8, 8), ori_shape=(8, 8),
                     gt_label=int(labels[i])) for i in order]
