"""Classes are names. Wherever two lists of them meet, labels follow the names, not the numbers."""
import numbers
import os

from nepa_mm.datasets.images import IMAGE_SUFFIXES

SHOWN = 5       # names in a message


def leaves(dataset):
    """The data sets below wrappers such as RepeatDataset and ConcatDataset."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        return [dataset]
    return [leaf for one in inner for leaf in leaves(one)]


def listed(names):
    """``'ant, bee, cat'``; of many names the first ones."""
    names = list(map(str, names))
    rest = len(names) - SHOWN
    return ', '.join(names[:SHOWN]) + (f' and {rest} more' if rest > 0 else '')


def match(names, known, whose, others):
    """Where each name stands in another list.

    Args:
        names, known (Sequence[str]): The two lists of classes.
        whose, others (str): What messages call them.

    Returns:
        list[int] | None: Positions in ``known``; None if the lists have no name in common, so
        that only their order can tell.

    Raises:
        ValueError: Only some of the names are known, or the two lists have no name and not even
            their length in common.
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


def relabel(dataset, order, classes):
    """Let label i of a data set be ``order[i]``, one of ``classes``."""
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    for info in infos:
        info['gt_label'] = order[info['gt_label']]
        del info['sample_idx']
    if dataset.serialize_data:
        dataset.data_list = infos
        dataset.data_bytes, dataset.data_address = dataset._serialize_data()
    else:
        dataset.data_list = infos
    dataset._metainfo['classes'] = tuple(classes)
    folders = getattr(dataset, 'folder_to_idx', None)
    if folders:
        dataset.folder_to_idx = {name: order[i] for name, i in folders.items()}


def has_labels(dataset):
    """Whether the samples of a data set have one label each."""
    return (hasattr(dataset, 'get_data_info') and len(dataset) > 0
            and isinstance(dataset.get_data_info(0).get('gt_label'), numbers.Integral))


def classes_of(dataset):
    """The names of a data set's classes, None if it has none."""
    return (getattr(dataset, 'metainfo', None) or {}).get('classes')


def folders_of(dataset):
    """The folder of each class, by label, None if they do not come from folders."""
    folders = getattr(dataset, 'folder_to_idx', None)
    return sorted(folders, key=folders.get) if folders else None


def follow_folders(dataset, whose):
    """Let the labels follow ``metainfo.classes`` where these are names of the folders.

    mmpretrain numbers folders by the alphabet. Names of which none is a folder (words for
    ImageNet's numbers) are taken in that order.

    Raises:
        ValueError: Only some of the folders are among the classes.
    """
    for leaf in filter(has_labels, leaves(dataset)):
        folders, classes = folders_of(leaf), classes_of(leaf)
        if folders and classes:
            order = match(folders, classes, f'the folder of {whose}', 'its metainfo.classes')
            if order and order != sorted(order):
                relabel(leaf, order, classes)


def follow(dataset, whose, classes, others, folders=None):
    """Let the labels of a data set be those of other classes, by name.

    Args:
        dataset (mmengine.dataset.BaseDataset): Changed in place, with its ``metainfo``.
        whose (str): What messages call it.
        classes (Sequence[str]): The other classes, of the training data or a checkpoint.
        others (str): What messages call them.
        folders (Sequence[str], optional): Their folders, if they have any. Defaults to None.

    Returns:
        list[str]: Sentences for the log.

    Raises:
        ValueError: See :func:`match`; or labels are no numbers of one class each (masks), and the
            order differs.
    """
    sentences = []
    for leaf in leaves(dataset):
        own, own_folders = classes_of(leaf), folders_of(leaf)
        if not own:
            if has_labels(leaf):
                sentences.append(f'{whose} names no class: its numbers are taken to be those of '
                                 f'{others} ({listed(classes)}).')
            continue
        order = match(own, classes, whose, others)
        if folders and own_folders and order in (None, list(range(len(classes)))):
            by_folder = match(own_folders, folders, whose, others)
            if by_folder is None and order is None:
                raise ValueError(f'{whose} has the classes {listed(own_folders)} and {others} '
                                 f'{listed(folders)}: they have none in common.')
            order = order if by_folder is None else by_folder
        if order == list(range(len(classes))):
            continue
        if order is not None and not has_labels(leaf):
            raise ValueError(f'{whose} has its classes in another order than {others}, or fewer of '
                             f'them: set its metainfo.classes to {listed(classes)}.')
        if order is None:
            sentences.append(f'{whose} and {others} name no class alike ({listed(own)}; '
                             f'{listed(classes)}): their order is taken to be the same.')
        else:
            relabel(leaf, order, classes)
            sentences.append(f'{whose} has its classes in another order than {others}, or fewer of '
                             'them: its labels follow the names.')
    return sentences


def align(dataset, whose, reference, others):
    """:func:`follow` of the classes of another data set, both by their folders first."""
    follow_folders(reference, others)
    follow_folders(dataset, whose)
    first = leaves(reference)[0]
    classes = classes_of(first)
    if classes:
        return follow(dataset, whose, classes, others, folders_of(first))
    own = classes_of(leaves(dataset)[0])
    return [f'{others} names no class: its numbers are taken to be those of {whose} '
            f'({listed(own)}).'] if own and has_labels(first) else []


def check_labels(dataset, whose, num_classes):
    """Compare a data set's classes and labels with a head; on a GPU a bad label has no name.

    Raises:
        ValueError: It has another number of classes, or a label that is none of the outputs.
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


def left_out(dataset, whose):
    """Sentences about images below the folder of a data set that are no samples of it.

    Looks at mmpretrain's CustomDataset and its like on a local disk. What an annotation file or
    ``indices`` leaves out is meant.
    """
    sentences = []
    for leaf in leaves(dataset):
        if (not hasattr(leaf, 'extensions') or leaf.ann_file or not os.path.isdir(leaf.img_prefix)
                or getattr(leaf, '_indices', None) is not None):
            continue
        folder = leaf.img_prefix
        seen = {os.path.normpath(leaf.get_data_info(i)['img_path']) for i in range(len(leaf))}
        left = [path for path in images_below(folder) if path not in seen]
        if left:
            sentences.append(f'{whose}: {len(left)} images below {folder} are left out, e.g. '
                             f'{left[0]}.')
    return sentences


def images_below(folder):
    """Paths of the images in a folder and its subfolders, without hidden ones."""
    for root, _, files in os.walk(folder, followlinks=True):
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith('.'):
                yield os.path.normpath(os.path.join(root, file))
