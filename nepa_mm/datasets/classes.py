"""Class names of datasets and checkpoints. Labels are matched by name, not by number."""
import numbers
import os
from collections.abc import Sequence

from torch.utils.data import Dataset

from nepa_mm.datasets.images import find_images
from nepa_mm.utils.text import listed


def base_datasets(dataset: Dataset) -> list[Dataset]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        return [dataset]
    return [base for one in inner for base in base_datasets(one)]


def match_classes(names: Sequence[str], known: Sequence[str], whose: str,
                  others: str) -> list[int] | None:
    """Find the position of each name in another list.

    Args:
        names, known (Sequence[str]): The two lists of classes.
        whose, others (str): How messages refer to them.

    Returns:
        list[int] | None: Positions in ``known``. None if the lists have the same length and no
        name in common, so only their order can be compared.

    Raises:
        ValueError: Only some of the names are known; the lists share no name and differ in length;
            or ``known`` contains a name twice and the order differs.
    """
    if tuple(names) == tuple(known):
        return list(range(len(names)))
    missing = [name for name in names if name not in set(known)]
    if len(missing) == len(names):
        if len(names) != len(known):
            raise ValueError(f'{whose} has {len(names)} classes ({listed(names)}) and {others} '
                             f'{len(known)} ({listed(known)}): they are not the same.')
        return None
    if missing:
        raise ValueError(f'{whose} has the class{"es" * (len(missing) > 1)} {listed(missing)}, '
                         f'and {others} does not: its classes are {listed(known)}.')
    places = {name: i for i, name in enumerate(known)}
    if len(places) < len(known):
        raise ValueError(f'{others} names a class twice, so {whose}, in another order, cannot be '
                         'compared with it.')
    return [places[name] for name in names]


def _remap_labels(dataset, order, classes):
    """Replace each label i of a dataset by ``order[i]``, an index into ``classes``."""
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    for info in infos:
        info['gt_label'] = order[info['gt_label']]
        del info['sample_idx']
    dataset.data_list = infos
    if dataset.serialize_data:
        dataset.data_bytes, dataset.data_address = dataset._serialize_data()
    dataset._metainfo['classes'] = tuple(classes)
    folders = getattr(dataset, 'folder_to_idx', None)
    if folders:
        dataset.folder_to_idx = {name: order[i] for name, i in folders.items()}


def has_labels(dataset: Dataset) -> bool:
    """Whether each sample of a dataset has one label."""
    return (hasattr(dataset, 'get_data_info') and len(dataset) > 0
            and isinstance(dataset.get_data_info(0).get('gt_label'), numbers.Integral))


def classes_of(dataset: Dataset) -> Sequence[str] | None:
    """Class names of a dataset, or None."""
    return (getattr(dataset, 'metainfo', None) or {}).get('classes')


def _folders_of(dataset):
    """Folder of each class, by label; None if classes are not folders."""
    folders = getattr(dataset, 'folder_to_idx', None)
    return sorted(folders, key=folders.get) if folders else None


def order_by_metainfo(dataset: Dataset, whose: str) -> None:
    """Renumber labels to follow ``metainfo.classes`` where these are names of the folders.

    mmpretrain numbers folders alphabetically. If no class is a folder name (words for ImageNet's
    WordNet IDs), classes are assumed to be in alphabetical order of the folders.

    Args:
        dataset (Dataset): Changed in place.
        whose (str): How messages refer to it.

    Raises:
        ValueError: See :func:`match_classes`.
    """
    for base in filter(has_labels, base_datasets(dataset)):
        folders, classes = _folders_of(base), classes_of(base)
        if folders and classes:
            order = match_classes(folders, classes, f'the folder of {whose}',
                                  'its metainfo.classes')
            if order and order != sorted(order):
                _remap_labels(base, order, classes)


def align_to_classes(dataset: Dataset, whose: str, classes: Sequence[str], others: str,
                     folders: Sequence[str] | None = None) -> list[str]:
    """Renumber the labels of a dataset to match a list of classes by name.

    Args:
        dataset (Dataset): Changed in place, with its ``metainfo``.
        whose (str): How messages refer to it.
        classes (Sequence[str]): Classes of the training data or of a checkpoint.
        others (str): How messages refer to ``classes``.
        folders (Sequence[str], optional): Folders of ``classes``. Defaults to None.

    Returns:
        list[str]: Sentences for the log.

    Raises:
        ValueError: See :func:`match_classes`. Or the order differs and samples have masks instead
            of one label.
    """
    sentences = []
    for base in base_datasets(dataset):
        own, own_folders = classes_of(base), _folders_of(base)
        if not own:
            if has_labels(base):
                sentences.append(f'{whose} names no class: its numbers are taken to be those of '
                                 f'{others} ({listed(classes)}).')
            continue
        order = match_classes(own, classes, whose, others)
        if folders and own_folders and order in (None, list(range(len(classes)))):
            by_folder = match_classes(own_folders, folders, whose, others)
            if by_folder is None and order is None:
                raise ValueError(f'{whose} has the classes {listed(own_folders)} and {others} '
                                 f'{listed(folders)}: they have none in common.')
            order = order if by_folder is None else by_folder
        if order == list(range(len(classes))):
            continue
        if order is not None and not has_labels(base):
            raise ValueError(f'{whose} has its classes in another order than {others}, or fewer of '
                             f'them: set its metainfo.classes to {listed(classes)}.')
        if order is None:
            sentences.append(f'{whose} and {others} name no class alike ({listed(own)}; '
                             f'{listed(classes)}): their order is taken to be the same.')
        else:
            _remap_labels(base, order, classes)
            sentences.append(f'{whose} has its classes in another order than {others}, or fewer of '
                             'them: its labels follow the names.')
    return sentences


def align_datasets(dataset: Dataset, whose: str, reference: Dataset, others: str) -> list[str]:
    """Renumber the labels of a dataset to match a reference dataset by class name.

    Both first follow their own ``metainfo.classes``, see :func:`order_by_metainfo`.

    Args:
        dataset, reference (Dataset): Changed in place.
        whose, others (str): How messages refer to them.

    Returns:
        list[str]: Sentences for the log.

    Raises:
        ValueError: See :func:`align_to_classes`.
    """
    order_by_metainfo(reference, others)
    order_by_metainfo(dataset, whose)
    first = base_datasets(reference)[0]
    classes = classes_of(first)
    if classes:
        return align_to_classes(dataset, whose, classes, others, _folders_of(first))
    own = classes_of(base_datasets(dataset)[0])
    return [f'{others} names no class: its numbers are taken to be those of {whose} '
            f'({listed(own)}).'] if own and has_labels(first) else []


def check_labels(dataset: Dataset, whose: str, num_classes: int) -> None:
    """Compare the classes and labels of a dataset with a head of ``num_classes`` outputs.

    On a GPU, an invalid label would end in an error that does not name it.

    Raises:
        ValueError: The number of classes differs, or a label is out of range.
    """
    classes = classes_of(dataset)
    if classes is not None and len(classes) != num_classes:
        raise ValueError(f'model.head.num_classes is {num_classes}, but {whose} has {len(classes)} '
                         f'classes: {listed(classes)}.')
    labels = dataset.get_gt_labels()
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f'Labels of {whose} must be 0 to {num_classes - 1}, as '
                         f'model.head.num_classes is {num_classes}, but they go from '
                         f'{labels.min()} to {labels.max()}.')


def skipped_images(dataset: Dataset, whose: str) -> list[str]:
    """Report images in the folder of a dataset that are not among its samples.

    Covers mmpretrain's CustomDataset and its subclasses on a local disk. Datasets with an
    annotation file or ``indices`` skip images on purpose and are not reported.

    Returns:
        list[str]: Sentences for the log.
    """
    sentences = []
    for base in base_datasets(dataset):
        if (not hasattr(base, 'extensions') or base.ann_file or not os.path.isdir(base.img_prefix)
                or getattr(base, '_indices', None) is not None):
            continue
        folder = os.path.normpath(base.img_prefix)
        seen = {os.path.normpath(base.get_data_info(i)['img_path']) for i in range(len(base))}
        seen |= getattr(base, 'left_out', set())    # those of the other split
        skipped = [path for path in find_images(folder) if path not in seen]
        if skipped:
            sentences.append(f'{whose}: {len(skipped)} images below {folder} are skipped, e.g. '
                             f'{skipped[0]}.')
    return sentences
