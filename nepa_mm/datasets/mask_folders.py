"""Images and masks in a folder of one's own.

Needs mmseg, so ``custom_imports`` of the segmentation configs names this module.
"""
import os
from typing import Any

from mmengine import fileio
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from nepa_mm.compat import stack

stack.require('mmseg')

from mmseg.datasets import BaseSegDataset

from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.datasets.splits import check_split, held_out, split_folders


@DATASETS.register_module()
class ImageMaskFolder(BaseSegDataset):
    """mmseg's BaseSegDataset for images of mixed formats that can divide its folder.

    The mask of ``images/a/b.jpg`` is ``masks/a/b.png``.

    ===============================================  ==============================================
    ``images/{train,val}/*``, ``masks/{train,val}``  ``split`` names the folder
    ``images/*``, ``masks/*``                        ``split='val'``: a part, chosen by file name;
                                                     ``split='train'``: the others
    ===============================================  ==============================================

    Args:
        data_root (str): The folder that holds both.
        data_prefix (dict): Folders of the images and the masks. Defaults to ``dict(
            img_path='images', seg_map_path='masks')``.
        split (str, optional): 'train' or 'val'. Defaults to None: all images.
        val_fraction (float): Part of the images that is kept for validation if there is no folder
            ``val``. Defaults to 0.2.
        img_suffix (tuple[str]): Suffixes of images, in lower or upper case. Defaults to ``.npy``
            and those of all common formats that Pillow reads.
        **kwargs: Other arguments of BaseSegDataset, e.g. ``metainfo=dict(classes=...)``.

    Raises:
        ValueError: ``split`` or ``val_fraction`` is invalid, or there is ``val`` without ``train``.
    """

    def __init__(self, data_root: str,
                 data_prefix: dict = dict(img_path='images', seg_map_path='masks'),
                 split: str | None = None, val_fraction: float = 0.2,
                 img_suffix: tuple[str, ...] = (*IMAGE_SUFFIXES, '.npy'), **kwargs: Any):
        check_split(split, val_fraction)
        self.split, self.val_fraction = split, val_fraction
        self.left_out = set()       # images and masks of the other part, as paths
        root = os.path.expanduser(data_root)
        images = os.path.join(root, data_prefix['img_path'])
        self.divided = split is not None and os.path.isdir(images) and split_folders(
            images, [entry.name for entry in os.scandir(images) if entry.is_dir()])
        if self.divided:
            data_prefix = {key: os.path.join(path, split) for key, path in data_prefix.items()}
        super().__init__(data_root=root, data_prefix=data_prefix, img_suffix=tuple(img_suffix),
                         **kwargs)

    def load_data_list(self) -> list[dict]:
        """The images of the split with the paths of their masks, sorted by path."""
        images, masks = self.data_prefix['img_path'], self.data_prefix.get('seg_map_path')
        names = sorted(name for name in fileio.list_dir_or_file(
            images, list_dir=False, recursive=True, backend_args=self.backend_args)
            if name.lower().endswith(self.img_suffix))
        mask_of = {name: os.path.splitext(name)[0] + self.seg_map_suffix for name in names}
        kept = set(names)
        found = f'{len(names)} images in {os.path.normpath(images)}'
        if self.split and not self.divided:
            val = held_out(names, self.val_fraction)
            kept = val if self.split == 'val' else kept - val
            self.left_out = {
                os.path.normpath(os.path.join(folder, file)) for name in set(names) - kept
                for folder, file in ((images, name), (masks, mask_of[name])) if folder}
            found += f'; {len(kept)} of them are for {self.split}, chosen by file name'
        self.found = found
        return [dict(img_path=os.path.join(images, name), label_map=self.label_map,
                     reduce_zero_label=self.reduce_zero_label, seg_fields=[],
                     **(dict(seg_map_path=os.path.join(masks, mask_of[name])) if masks else {}))
                for name in names if name in kept]

    def full_init(self) -> None:
        """Load the list of images and log what was found."""
        if not self._fully_initialized:
            super().full_init()
            print_log(f'Found {self.found}.', logger='current')
