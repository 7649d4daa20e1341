"""Images in a folder of one's own: any format, nested or flat, with or without classes."""
import os
from collections import Counter
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmpretrain.datasets import CustomDataset

from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.datasets.splits import check_split, held_out, split_folders
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.text import listed


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """mmpretrain's CustomDataset that can divide a folder, and logs what it found.

    ===============================================  ==============================================
    ``data_root/<any folders>/*``                    ``with_label=False``: all images
    ``data_root/{train,val}/<class>/*``              ``split`` names the folder
    ``data_root/<class>/*``                          ``split='val'``: a part of every class, chosen
                                                     by file name; ``split='train'``: the others
    ===============================================  ==============================================

    Args:
        data_root (str): The folder.
        split (str, optional): 'train' or 'val'. Defaults to None: the whole folder.
        val_fraction (float): Part of every class that is kept for validation if there is no folder
            ``val``. Defaults to 0.2.
        **kwargs: Other arguments of CustomDataset; ``extensions`` defaults to ``.npy`` and the
            suffixes of all common formats that Pillow reads.

    Raises:
        ValueError: ``split`` or ``val_fraction`` is invalid, or there is ``val`` without ``train``.
        DataError: There are no folders of classes, or no image is left for ``split``.
    """

    def __init__(self, data_root: str, split: str | None = None, val_fraction: float = 0.2,
                 **kwargs: Any):
        check_split(split, val_fraction)
        self.split, self.val_fraction = split, val_fraction
        self.left_out = set()       # images of the other part, as paths
        kwargs.setdefault('extensions', (*IMAGE_SUFFIXES, '.npy'))
        root = os.path.expanduser(data_root)
        self.divided = split is not None and not kwargs.get('data_prefix') and split_folders(
            root, [entry.name for entry in os.scandir(root) if entry.is_dir()])
        if self.divided:
            kwargs['data_prefix'] = split
        super().__init__(data_root=root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """The images of the split, sorted by path."""
        folder = os.path.normpath(self.img_prefix)
        if self.with_label and not self.ann_file and not any(
                entry.is_dir() for entry in os.scandir(folder)):
            raise DataError(f'{folder} has no folders of classes.')
        infos = super().load_data_list()
        for info in infos:
            info['img_path'] = os.path.normpath(info['img_path'])
        kinds = Counter(os.path.splitext(info['img_path'])[1].lower() for info in infos)
        found = (f'{len(infos)} images in {folder} ('
                 + listed((f'{num} {kind}' for kind, num in kinds.most_common()), 8) + ')')
        if self.split and not self.divided:
            names = {}      # of each class, relative to the folder: a moved folder is divided alike
            for info in infos:
                name = os.path.relpath(info['img_path'], folder)
                names.setdefault(info.get('gt_label'), {})[name] = info['img_path']
            val = {of_class[name] for of_class in names.values()
                   for name in held_out(of_class, self.val_fraction)}
            kept = [info for info in infos if (info['img_path'] in val) == (self.split == 'val')]
            self.left_out = ({info['img_path'] for info in infos}
                             - {info['img_path'] for info in kept})
            infos = kept
            found += f'; {len(infos)} of them are for {self.split}, chosen by file name'
        if self.with_label:
            classes = Counter(info['gt_label'] for info in infos)
            names = self._metainfo.get('classes') or sorted(classes)
            found += '; classes: ' + listed(
                (f'{name} {classes[label]}' for label, name in enumerate(names)), 20)
        if not infos:
            raise DataError(f'No image is left for split={self.split!r} in {folder}.')
        self.found = found
        return infos

    def full_init(self) -> None:
        """Load the list of images and log what was found."""
        if not self._fully_initialized:
            super().full_init()
            print_log(f'Found {self.found}.', logger='current')
