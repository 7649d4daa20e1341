"""Check the folders of segmentation data sets."""
import os

from mmengine import fileio
from mmengine.config import Config
from torch.utils.data import Dataset

from nepa_mm.compat import stack

stack.require('mmseg')

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.nested import iter_dicts


def check_not_empty(cfg: Config, *loaders: str) -> None:
    """Reject data sets in which mmseg finds no image; building them would fail.

    Args:
        cfg (Config): The config.
        loaders (str): Names of the dataloaders that will be used, e.g. 'train_dataloader'.

    Raises:
        DataError: The message names a file that exists instead.
    """
    for loader in loaders:
        for node in iter_dicts((cfg.get(loader) or {}).get('dataset')):
            kind = node.get('type')
            kind = DATASETS.get(kind) if isinstance(kind, str) and 'data_prefix' in node else kind
            if not isinstance(kind, type) or not issubclass(kind, BaseSegDataset):
                continue
            try:
                dataset = DATASETS.build(dict(node, pipeline=[], lazy_init=True))
            except TypeError:       # a custom class with other arguments
                continue
            if not dataset.load_data_list():
                folder = dataset.data_prefix['img_path']
                raise DataError(
                    f'{loader}: {dataset.ann_file} names no image.' if lists_files(dataset) else
                    f'{loader}: no file in {folder} ends with img_suffix={dataset.img_suffix!r}; '
                    f'there is {first_file(folder, dataset)}.')


def check_folders(dataset: Dataset, name: str) -> list[str]:
    """Reject images without a mask; return warnings about unused files in the folders."""
    images, masks = dataset.data_prefix['img_path'], dataset.data_prefix.get('seg_map_path')
    infos = [info for info in dataset.load_data_list() if 'seg_map_path' in info]
    suffix = dataset.seg_map_suffix
    if not infos:
        return []
    for key, kind in (('img_path', 'image'), ('seg_map_path', 'mask')):
        absent = [info for info in infos
                  if '://' not in info[key] and not os.path.exists(info[key])]
        if len(absent) == len(infos) and kind == 'mask':
            raise DataError(
                f'{name}: no image of {images} has a mask with seg_map_suffix={suffix!r}: '
                f'{absent[0][key]} does not exist; in {masks} there is '
                f'{first_file(masks, dataset)}.')
        if absent:
            raise DataError(
                f'{name}: {len(absent)} of {len(infos)} images have no {kind} file, e.g. '
                f'{absent[0]["img_path"]}: {absent[0][key]} does not exist.')
    if lists_files(dataset):
        return []       # unused files are intended
    used = {os.path.normpath(info[key]) for info in infos for key in ('img_path', 'seg_map_path')}
    used |= getattr(dataset, 'left_out', set())     # those of the other split
    in_masks = [path for path in list_files(masks, dataset) if path.endswith(suffix)]
    left = [path for path in list_files(images, dataset)
            if path.lower().endswith(IMAGE_SUFFIXES) and path not in used and path not in in_masks]
    warnings = []
    if left:
        warnings.append(
            f'{name}: {len(left)} of {len(left) + len(infos)} images in {images} are skipped: '
            f'they do not end with img_suffix={dataset.img_suffix!r}, e.g. {left[0]}.')
    stems = {os.path.splitext(os.path.relpath(path, images))[0] for path in left}
    alone = [path for path in in_masks if path not in used
             and os.path.relpath(path, masks)[:-len(suffix)] not in stems]
    if alone:
        warnings.append(f'{name}: {len(alone)} of {len(in_masks)} masks in {masks} have no image '
                        f'and are skipped, e.g. {alone[0]}.')
    return warnings


def lists_files(dataset: Dataset) -> bool:
    """Return whether an annotation file names the images."""
    return bool(dataset.ann_file) and os.path.isfile(dataset.ann_file)


def list_files(folder: str, dataset: Dataset) -> list[str]:
    """Return the paths of all files below a folder, sorted."""
    return sorted(os.path.normpath(os.path.join(folder, path)) for path in fileio.list_dir_or_file(
        folder, list_dir=False, recursive=True, backend_args=dataset.backend_args))


def first_file(folder: str, dataset: Dataset) -> str:
    """Return the first file below a folder, for messages."""
    return next(iter(list_files(folder, dataset)), 'no file')
