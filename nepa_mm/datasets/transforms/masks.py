"""Segmentation masks, with a check of every value."""
from collections.abc import Iterable
from typing import Any

import mmcv
import numpy as np
from mmengine import fileio
from mmengine.registry import TRANSFORMS

from nepa_mm.compat import stack

stack.require('mmseg')

from mmseg.datasets.transforms import LoadAnnotations

from nepa_mm.utils.errors import DataError, first_line
from nepa_mm.utils.text import joined


def read_mask(path: str, backend: str = 'pillow', backend_args: dict | None = None) -> np.ndarray:
    """Read the values of a mask file: (height, width), of any dtype.

    Args:
        path (str): The file.
        backend (str): Image backend of mmcv. Defaults to 'pillow'.
        backend_args (dict, optional): File backend of mmengine. Defaults to None.

    Raises:
        DataError: The file cannot be read, or has several channels.
    """
    try:
        mask = mmcv.imfrombytes(
            fileio.get(path, backend_args), flag='unchanged', backend=backend)
        mask = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
    except Exception as error:      # every backend and decoder raises its own
        raise DataError(f'The mask {path} cannot be read: {first_line(error)}.') from error
    if mask.ndim != 2:
        colours = np.unique(mask.reshape(-1, mask.shape[-1]), axis=0)
        colours = (colours[:, [2, 1, 0, *range(3, mask.shape[-1])]]     # RGB order
                   if mask.shape[-1] > 2 else colours)
        raise DataError(
            f'The mask {path} is an image of {mask.shape[-1]} channels with colours such as '
            f'{joined([tuple(colour.tolist()) for colour in colours[:3]])}, but the dataset needs '
            'masks of one class index per pixel (a grey or palette PNG).')
    return mask


def values_of(mask: np.ndarray) -> np.ndarray:
    """Unique values of a mask, sorted."""
    if mask.dtype == np.uint8:      # ten times faster than sorting
        return np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    return np.unique(mask.astype(int) if mask.dtype == bool else mask)


def spans(values: Iterable[int]) -> str:
    """``[0, 1, 2, 255]`` -> ``'0..2 and 255'``, for ascending integers."""
    ends = []
    for value in values:
        if ends and ends[-1][1] == value - 1:
            ends[-1][1] = value
        else:
            ends.append([value, value])
    return joined(f'{a}..{b}' if b > a else a for a, b in ends) if ends else 'none'


@TRANSFORMS.register_module()
class LoadCheckedMask(LoadAnnotations):
    """mmseg's LoadAnnotations that rejects masks it would misread.

    Accepts any file whose values are class indices: grey, palette, 1 or 16 bits, integral floats.

    Args:
        num_classes (int): ``num_classes`` of the decode head; 1 (a single logit) means two
            classes.
        ignore_index (int): The ignored label, after ``reduce_zero_label`` and the dataset's
            ``label_map``. Defaults to 255.
        **kwargs: ``imdecode_backend``, ``backend_args`` and ``reduce_zero_label`` of
            LoadAnnotations.

    Raises:
        DataError: The mask cannot be read, has several channels or another size than its image, or
            has a value that is neither a class nor ignored.
        ValueError: ``reduce_zero_label`` differs from the dataset's.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_classes, self.ignore_index = max(num_classes, 2), ignore_index
        self.no_void = False        # whether a mask of 0 and 255 means two classes, not void

    @classmethod
    def like(cls, loader: LoadAnnotations, num_classes: int,
             ignore_index: int) -> 'LoadCheckedMask':
        """Create a loader with the options of a LoadAnnotations."""
        self = cls(num_classes, ignore_index, imdecode_backend=loader.imdecode_backend,
                   backend_args=loader.backend_args)
        self.reduce_zero_label = loader.reduce_zero_label   # deprecated as an argument
        return self

    def _load_seg_map(self, results):
        results['gt_seg_map'] = self.read(results)[1]
        results['seg_fields'].append('gt_seg_map')

    def read(self, results: dict) -> tuple[np.ndarray, np.ndarray]:
        """Read and check ``results['seg_map_path']``.

        Returns:
            tuple: The distinct values in the file, ascending, and the labels (height, width),
            both uint8.

        Raises:
            DataError, ValueError: See the class.
        """
        path, table = results['seg_map_path'], self.labels(results)
        mask = read_mask(path, self.imdecode_backend, self.backend_args)
        size = results.get('ori_shape', mask.shape)[:2]
        if tuple(size) != mask.shape:
            height, width = mask.shape
            raise DataError(f'The mask {path} has {height} x {width} pixels, but its image '
                            f'{results.get("img_path")} {size[0]} x {size[1]} (height x width).')
        values = values_of(mask)
        allowed = (table < self.num_classes) | (table == self.ignore_index)
        if not np.isin(values, np.flatnonzero(allowed)).all():
            raise DataError(f'The mask {path} {self.sentence(values, results)}.')
        if self.no_void and values.tolist() == [0, 255]:
            raise DataError(f'The mask {path} {self.sentence(values, results)}, and other masks '
                            'hold 1 but never beside 255.')
        return values.astype(np.uint8), table[mask.astype(np.uint8)]

    def labels(self, results: dict) -> np.ndarray:
        """The label of each mask value by mmseg's rules: (256,), uint8."""
        reduce_zero_label = results.get('reduce_zero_label', False)
        if self.reduce_zero_label not in (None, reduce_zero_label):
            raise ValueError(f'reduce_zero_label={self.reduce_zero_label} of LoadAnnotations '
                             f'differs from {reduce_zero_label} of the dataset, which counts.')
        table = np.arange(256)
        if reduce_zero_label:
            table = np.where((table == 0) | (table == 255), 255, table - 1)
        old = table.copy()
        for source, target in (results.get('label_map') or {}).items():
            table[old == source] = target
        return table.astype(np.uint8)

    def sentence(self, values: np.ndarray, results: dict) -> str:
        """Build 'holds the values ..., but the classes are ...' with a hint."""
        table = self.labels(results)
        ignored = table == self.ignore_index
        classes = np.flatnonzero((table < self.num_classes) & ~ignored)
        names = [f'{value:g}' if isinstance(value, float) else value for value in values.tolist()]
        found = (f'{len(names)} values, {names[0]}..{names[-1]}' if len(names) > 8 else
                 f'the value{"s" if len(names) > 1 else ""} {joined(names)}')
        out = np.flatnonzero(ignored).tolist()
        if results.get('reduce_zero_label') or len(out) > 1:
            left_out = f'{spans(out)} {"are" if len(out) > 1 else "is"} ignored'
            if results.get('reduce_zero_label'):
                left_out += ' (reduce_zero_label=True)'
        else:
            left_out = f'{self.ignore_index} is ignore_index'
        hint = ('; if 0 is no class, give the dataset reduce_zero_label=True'
                if values[-1] == self.num_classes and not results.get('reduce_zero_label') else '')
        return (f'holds {found}, but the classes are {spans(classes.tolist())}, {left_out}: the '
                f'dataset needs masks of class indices{hint}')
