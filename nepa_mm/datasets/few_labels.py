"""Labelled subsets: the same number of images of every class."""
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmpretrain.datasets import FashionMNIST


class FewLabels(BaseDataset):
    """Base class of datasets that can keep a random, balanced part of their images.

    Args:
        num_labels (int, optional): Keep this many images, equally many of each class. Defaults
            to None: all.
        seed (int): Seed that selects the kept images. Defaults to 0.
        **kwargs: Arguments of the dataset.

    Raises:
        ValueError: ``num_labels`` is not a multiple of the number of classes, or too large.
    """

    def __init__(self, *args: Any, num_labels: int | None = None, seed: int = 0, **kwargs: Any):
        self.num_labels, self.seed = num_labels, seed
        super().__init__(*args, **kwargs)

    def filter_data(self) -> list[dict]:
        """The kept samples, for mmengine's BaseDataset."""
        if self.num_labels is None:
            return self.data_list
        labels = np.array([sample['gt_label'] for sample in self.data_list])
        classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        most = len(classes) * min(map(len, classes))
        if self.num_labels % len(classes) or not 0 < self.num_labels <= most:
            raise ValueError(f'num_labels must be a multiple of {len(classes)} up to {most}, '
                             f'got {self.num_labels}.')
        rng = np.random.default_rng(self.seed)
        return [self.data_list[i] for members in classes
                for i in rng.permutation(members)[:self.num_labels // len(classes)]]


@DATASETS.register_module()
class FashionMNISTSubset(FewLabels, FashionMNIST):
    """mmpretrain's FashionMNIST with ``num_labels`` and ``seed`` of :class:`FewLabels`.

    Args:
        split (str): 'train', 60,000 images, or 'test', 10,000 images. It sets ``test_mode``:
            mmpretrain's class reads the training images for 'test' without it. Defaults to
            'train'.
        **kwargs: Other arguments of FewLabels and FashionMNIST.
    """

    def __init__(self, *args: Any, split: str = 'train', **kwargs: Any):
        super().__init__(*args, **{**kwargs, 'split': split, 'test_mode': split == 'test'})
