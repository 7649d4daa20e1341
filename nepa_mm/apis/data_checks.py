"""Data sets looked at before anything is built: folders and annotation files."""
import os

from mmengine.fileio import list_from_file

from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.utils.nested import dicts

SHOWN = 1000    # images of a file whose existence is checked, for a network's disk is slow


def check_annotations(path, folder, labelled, whose):
    """Refuse lines that are no ``IMAGE LABEL``, and images that are not there.

    Args:
        path (str): The file, on a local disk.
        folder (str): What its images are relative to.
        labelled (bool): Whether lines end with a label.
        whose (str): What messages call the data set.

    Raises:
        ValueError: A line is no image and an integer, or there is none.
        FileNotFoundError: An image does not exist; a thousand of them, spread evenly, are tried.
    """
    lines = list_from_file(path)
    if not lines:
        raise ValueError(f'{whose}: {path} is empty; its lines are an image'
                         f'{" and its label" * labelled} each.')
    images = lines
    if labelled:
        images = []
        for number, line in enumerate(lines, 1):
            image, _, label = line.strip().rpartition(' ')
            if not image or not label.lstrip('-').isdigit():
                raise ValueError(f'{whose}: line {number} of {path} is {line!r}; expected is an '
                                 'image, a blank and the number of its class.')
            images.append(image)
    for image in images[::len(images) // SHOWN + 1]:
        image = os.path.join(folder, image)
        if '://' not in image and not os.path.isfile(image):
            raise FileNotFoundError(f'{whose}: there is no image {image}, which {path} names.')


# The layouts of the data sets in our configs, below `data_root`.
LAYOUTS = dict(
    ImageNet='{root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG',
    CustomDataset='folders of images, one per class',
    ADE20KDataset='{root}/images/{{training,validation}}/*.jpg and '
                  '{root}/annotations/{{training,validation}}/*.png')


def check_data(cfg, *loaders):
    """Refuse data sets whose folders are missing or hold no image.

    Looks at data sets that read a folder: those with a ``data_prefix``, ``ImageNet`` and
    ``CustomDataset``. Data sets that download or make their own images are left alone.

    Args:
        cfg (Config): The config.
        loaders (str): Names of the dataloaders that will be used, e.g. 'train_dataloader'.

    Raises:
        FileNotFoundError: With the path that was tried and the layout expected there.
    """
    for name in loaders:
        for dataset in dicts((cfg.get(name) or {}).get('dataset', {})):
            kind = str(dataset.get('type')).rpartition('.')[2]
            if 'data_prefix' not in dataset and kind not in ('ImageNet', 'CustomDataset'):
                continue
            root = dataset.get('data_root') or ''
            prefixes = dataset.get('data_prefix') or dataset.get('split') or ''
            prefixes = prefixes.values() if isinstance(prefixes, dict) else [prefixes]
            wanted = [os.path.join(root, prefix) for prefix in prefixes]
            if dataset.get('ann_file'):
                wanted.append(os.path.join(root, dataset['ann_file']))
            labelled = kind == 'ImageNet' or (
                kind == 'CustomDataset' and dataset.get('with_label', True)
                and (cfg.get('model') or {}).get('type') != 'NEPA')
            for path in wanted:
                problem = _data_problem(path, labelled and not dataset.get('ann_file'))
                if problem:
                    layout = LAYOUTS.get(kind, '').format(root=root.rstrip('/') or '.')
                    raise FileNotFoundError(
                        f'{name}: {path!r} {problem}'
                        + (f'; expected are {layout}' if layout else '')
                        + f' (relative to {os.getcwd()}; {name}.dataset.data_root sets another '
                        'place).')
            if kind == 'CustomDataset' and dataset.get('ann_file') and os.path.isfile(wanted[-1]):
                check_annotations(wanted[-1], wanted[0], dataset.get('with_label', True), name)


def _data_problem(path, labelled):
    """What is wrong with a data folder or annotation file, or None.

    With ``labelled`` the folder has to have a folder of images for every class.
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
