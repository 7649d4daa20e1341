"""Check the folders and annotation files of data sets before anything is built."""
import os

from mmengine.config import Config
from mmengine.fileio import list_from_file

from nepa_mm.apis.channel_checks import type_name
from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.utils.nested import iter_dicts

MAX_TRIED = 1000    # images whose existence is checked per annotation file; network disks are slow
FOLDERS = ('CustomDataset', 'ImageFolder')
# Expected layouts of the data sets in our configs, below `data_root`.
LAYOUTS = dict(
    ImageNet='{root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG',
    CustomDataset='folders of images, one per class',
    ImageFolder='{root}/<class>/* or {root}/{{train,val}}/<class>/*',
    ADE20KDataset='{root}/images/{{training,validation}}/*.jpg and '
                  '{root}/annotations/{{training,validation}}/*.png')


def check_data(cfg: Config, *loaders: str) -> None:
    """Reject data sets whose folders are missing or hold no image.

    Checks data sets that read a folder: those with a ``data_prefix``, ``ImageNet``,
    ``CustomDataset`` and ``ImageFolder``. Data sets that download or generate their images are
    skipped.

    Args:
        cfg (Config): The config.
        loaders (str): Names of the dataloaders that will be used, e.g. 'train_dataloader'.

    Raises:
        FileNotFoundError: The message names the path that was tried and the expected layout.
    """
    for name in loaders:
        for dataset in iter_dicts((cfg.get(name) or {}).get('dataset', {})):
            kind = type_name(dataset)
            if 'data_prefix' not in dataset and kind not in (*FOLDERS, 'ImageNet'):
                continue
            root = dataset.get('data_root') or ''
            prefixes = dataset.get('data_prefix') or (
                dataset.get('split') if kind == 'ImageNet' else '') or ''
            prefixes = prefixes.values() if isinstance(prefixes, dict) else [prefixes]
            wanted = [os.path.join(root, prefix) for prefix in prefixes]
            if dataset.get('ann_file'):
                wanted.append(os.path.join(root, dataset['ann_file']))
            labelled = kind == 'ImageNet' or (
                kind in FOLDERS and dataset.get('with_label', True)
                and (cfg.get('model') or {}).get('type') != 'NEPA')
            for path in wanted:
                problem = _find_problem(path, labelled and not dataset.get('ann_file'))
                if problem:
                    layout = '' if kind in FOLDERS and not labelled else LAYOUTS.get(
                        kind, '').format(root=root.rstrip('/') or '.')
                    raise FileNotFoundError(
                        f'{name}: {path!r} {problem}' + (f'; expected {layout}' if layout else '')
                        + f' (relative to {os.getcwd()}; {name}.dataset.data_root sets another '
                        'folder).')
            if kind in FOLDERS and dataset.get('ann_file') and os.path.isfile(wanted[-1]):
                check_annotations(wanted[-1], wanted[0], dataset.get('with_label', True), name)


def check_annotations(path: str, folder: str, labelled: bool, name: str) -> None:
    """Reject lines that are not ``IMAGE LABEL``, and images that do not exist.

    Args:
        path (str): The annotation file, on a local disk.
        folder (str): Folder of the images.
        labelled (bool): Whether lines end with a label.
        name (str): Name of the data set in messages.

    Raises:
        ValueError: The file is empty, or a line is not an image and an integer.
        FileNotFoundError: An image does not exist. About a thousand, evenly spaced, are tried.
    """
    lines = list_from_file(path)
    if not lines:
        raise ValueError(f'{name}: {path} is empty; each line must hold an image'
                         f'{" and its label" * labelled}.')
    images = lines
    if labelled:
        images = []
        for number, line in enumerate(lines, 1):
            image, _, label = line.strip().rpartition(' ')
            if not image or not label.lstrip('-').isdigit():
                raise ValueError(f'{name}: line {number} of {path} is {line!r}; expected an image, '
                                 'a blank and the number of its class.')
            images.append(image)
    for image in images[::len(images) // MAX_TRIED + 1]:
        image = os.path.join(folder, image)
        if '://' not in image and not os.path.isfile(image):
            raise FileNotFoundError(f'{name}: there is no image {image}, which {path} names.')


def _find_problem(path, labelled):
    """Return what is wrong with a data folder or annotation file, or None.

    With ``labelled`` the folder must hold a folder of images for every class.
    """
    path = os.path.expanduser(path)
    if '://' in path or os.path.isfile(path):
        return None
    if not os.path.exists(path):
        return 'does not exist'
    flat = False
    for folder, _, files in os.walk(path, followlinks=True):
        if any(file.lower().endswith((*IMAGE_SUFFIXES, '.npy')) for file in files):
            if not labelled or folder != path:
                return None
            flat = True
    return 'has images, but no folders of classes' if flat else 'holds no image'
