"""Segmentation data looked at before the first step: folders, class names, a sample of masks."""
import os

import numpy as np
from mmengine import fileio

from nepa_mm.compat import stack

stack.require('mmseg')

from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS

from nepa_mm.datasets.classes import base_datasets
from nepa_mm.datasets.images import IMAGE_SUFFIXES, ORIENTATION, open_image, read_bytes
from nepa_mm.datasets.pipelines import slots
from nepa_mm.datasets.transforms.masks import LoadCheckedMask, join, listing, values_of
from nepa_mm.evaluation.iou_metric import CheckedIoUMetric
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.nested import dicts
from nepa_mm.utils.outputs import dataset_pages

TURNED = (5, 6, 7, 8)   # EXIF orientations that exchange height and width


def check_not_empty(cfg, *loaders):
    """Refuse data sets in which mmseg finds no image; building them would fail on it.

    Args:
        cfg (Config): The config.
        loaders (str): Names of the dataloaders that will be used, e.g. 'train_dataloader'.

    Raises:
        DataError: In one sentence, with a file that is there instead.
    """
    for loader in loaders:
        for node in dicts((cfg.get(loader) or {}).get('dataset')):
            kind = node.get('type')
            kind = DATASETS.get(kind) if isinstance(kind, str) and 'data_prefix' in node else kind
            if not isinstance(kind, type) or not issubclass(kind, BaseSegDataset):
                continue
            try:
                dataset = DATASETS.build(dict(node, pipeline=[], lazy_init=True))
            except TypeError:       # a class of the user's with other arguments
                continue
            if not dataset.load_data_list():
                folder = dataset.data_prefix['img_path']
                there = next(iter(files(folder, dataset)), 'no file')
                raise DataError(
                    f'{loader}: {dataset.ann_file} names no image.'
                    if dataset.ann_file and os.path.isfile(dataset.ann_file) else
                    f'{loader}: no file in {folder} ends with img_suffix={dataset.img_suffix!r}; '
                    f'there is {there}.')


def check_segmentation_data(dataset, num_classes, ignore_index=255, name='data set', sample=100):
    """Look at folders, class names and a sample of masks of a data set before it is used.

    Args:
        dataset (Dataset): Of mmseg, built, possibly within ConcatDataset or RepeatDataset. Parts
            that are no BaseSegDataset or load no masks are left alone.
        num_classes (int): ``num_classes`` of the decode head.
        ignore_index (int): The label that is left out. Defaults to 255.
        name (str): What sentences call it, e.g. 'train_dataloader'. Defaults to 'data set'.
        sample (int): Masks looked at in each part, evenly spread. Defaults to 100.

    Returns:
        list[str]: What is unusual, a sentence each.

    Raises:
        DataError: A file is at fault, or the masks as a whole: all ignored, or masks of 0 and 255
            for two classes.
        ValueError: The data set names another number of classes than ``num_classes``.
    """
    warnings, read, seen, names = [], [], set(), None
    for part in base_datasets(dataset):
        steps = [steps[index] for steps, index in slots(part.pipeline)]
        loader = next((step for step in steps if isinstance(step, LoadAnnotations)), None)
        if not isinstance(part, BaseSegDataset) or loader is None:
            continue
        names = check_names(part, num_classes, name) or names
        warnings += check_folders(part, name)
        if type(loader) not in (LoadAnnotations, LoadCheckedMask):
            warnings.append(f'{name}: {type(loader).__name__} reads the masks, which are not '
                            'looked at.')
            continue
        look = LoadCheckedMask.like(loader, num_classes, ignore_index)
        upright = reads_upright(steps)
        num, first = len(part), len(read)
        for index in np.linspace(0, num - 1, min(num, sample)).round().astype(int):
            info = part.get_data_info(int(index))
            if upright is not None:
                info['ori_shape'] = image_size(info['img_path'], upright)
            values, labels = look.read(info)
            seen.update(values_of(labels[labels != ignore_index]).tolist())
            read.append((info, values))
        looked_at = [(info, values.tolist()) for info, values in read[first:]]
        loader.no_void = look.no_void = (
            look.num_classes == 2 and not part.reduce_zero_label
            and not any(1 in values and 255 in values for _, values in looked_at))
        for info, values in looked_at if len(seen) > 1 else ():
            if values == [0, 255]:
                look.read(info)     # refuses it, unless 255 was seen beside both classes
    if read:
        check_sample(look, read, seen, name)
        warnings += unseen(look, read, seen, names, name)
    return list(dict.fromkeys(warnings))


def check_masks(runner, dataset, loader, metrics=()):
    """Look at the data of a segmentor, now and as they are read; the log has the warnings.

    Args:
        runner (Runner): Built, not started.
        dataset (Dataset): Of the loader; no worker has it yet.
        loader (str): 'train_dataloader', 'val_dataloader' or 'test_dataloader'.
        metrics (list[BaseMetric]): Of the evaluator. Defaults to none.

    Raises:
        DataError, ValueError: See :func:`check_segmentation_data`.
    """
    rule = rules(runner.cfg, loader)
    if rule:
        for note in look_while_reading(dataset, metrics, **rule):
            runner.logger.info(f'{loader}: {note}')
        for warning in check_segmentation_data(dataset, **rule, name=loader):
            runner.logger.warning(warning)


def reads_upright(steps):
    """Whether images are turned as their EXIF says; None if they are read in a way of their own."""
    for step in steps:
        if type(step).__name__ in ('LoadImageWithPillow', 'LoadImageFromFile'):
            return getattr(step, 'color_type', 'color') in ('color', 'grayscale')
    return None


def image_size(path, upright):
    """(height, width) as the header says; of the image as it is shown if ``upright``."""
    image = open_image(read_bytes(path), path)
    try:
        turned = upright and image.getexif().get(ORIENTATION) in TURNED
    except Exception:       # damaged EXIF
        turned = False
    return image.size if turned else image.size[::-1]


def check_names(dataset, num_classes, name):
    """The names of the classes, if there are any: as many as the head tells apart."""
    names = dataset.metainfo.get('classes')
    if names and len(names) != max(num_classes, 2):
        raise ValueError(
            f'{name}: the data set names {len(names)} classes ({", ".join(map(str, names[:20]))}'
            f'{", ..." if len(names) > 20 else ""}), but model.decode_head.num_classes='
            f'{num_classes}{", which tells 2 apart" if num_classes == 1 else ""}.')
    return names


def check_folders(dataset, name):
    """Refuse images without a mask; say what is in the folders and not used."""
    images, masks = dataset.data_prefix['img_path'], dataset.data_prefix.get('seg_map_path')
    infos = [info for info in dataset.load_data_list() if 'seg_map_path' in info]
    suffix = dataset.seg_map_suffix
    if not infos:
        return []
    for key, kind in (('img_path', 'image'), ('seg_map_path', 'mask')):
        absent = [info for info in infos if not exists(info[key])]
        if len(absent) == len(infos) and kind == 'mask':
            there = next(iter(files(masks, dataset)), 'no file')
            raise DataError(
                f'{name}: no image of {images} has a mask with seg_map_suffix={suffix!r}: '
                f'{absent[0][key]} does not exist, in {masks} there is {there}.')
        if absent:
            raise DataError(
                f'{name}: {len(absent)} of {len(infos)} images have no {kind} file, e.g. '
                f'{absent[0]["img_path"]}: {absent[0][key]} does not exist.')
    if dataset.ann_file and os.path.isfile(dataset.ann_file):
        return []       # whose names are a choice
    used = {os.path.normpath(info[key]) for info in infos for key in ('img_path', 'seg_map_path')}
    in_masks = [path for path in files(masks, dataset) if path.endswith(suffix)]
    left = [path for path in files(images, dataset)
            if path.lower().endswith(IMAGE_SUFFIXES) and path not in used and path not in in_masks]
    warnings = []
    if left:
        warnings.append(
            f'{name}: {len(left)} of {len(left) + len(infos)} images in {images} are left out, '
            f'because they do not end with img_suffix={dataset.img_suffix!r}, e.g. {left[0]}.')
    stems = {os.path.splitext(os.path.relpath(path, images))[0] for path in left}
    alone = [path for path in in_masks if path not in used
             and os.path.relpath(path, masks)[:-len(suffix)] not in stems]
    if alone:
        warnings.append(f'{name}: {len(alone)} of {len(in_masks)} masks in {masks} are without an '
                        f'image and left out, e.g. {alone[0]}.')
    return warnings


def files(folder, dataset):
    """The paths of all files below a folder, sorted."""
    return sorted(os.path.normpath(os.path.join(folder, path)) for path in fileio.list_dir_or_file(
        folder, list_dir=False, recursive=True, backend_args=dataset.backend_args))


def exists(path):
    """Whether a local file exists; files elsewhere are believed in."""
    return '://' in path or os.path.exists(path)


def check_sample(look, read, seen, name):
    """Refuse masks of which nothing is left, or one of two classes because of 0 and 255."""
    values = np.unique(np.concatenate([found for _, found in read]))
    info = next((info for info, found in read if len(found) > 1), read[0][0])
    ignored = look.labels(info)[values] == look.ignore_index
    if not seen:
        raise DataError(
            f'{name}: every pixel of the {len(read)} masks looked at is ignored '
            f'(ignore_index={look.ignore_index}): {info["seg_map_path"]} '
            f'{look.sentence(values, info)}.')
    if len(seen) == 1 and ignored.any() and (look.num_classes == 2 or values.tolist() == [0, 255]):
        raise DataError(
            f'{name}: only one class is left in the {len(read)} masks looked at: '
            f'{info["seg_map_path"]} {look.sentence(values, info)}.')


def unseen(look, read, seen, names, name):
    """A warning of the classes that no mask of the sample has."""
    absent = [names[index] if names else index for index in range(look.num_classes)
              if index not in seen and index != look.ignore_index]
    if not absent:
        return []
    hint = (' (reduce_zero_label=True ignores the value 0 and makes every other one less)'
            if any(info.get('reduce_zero_label') for info, _ in read) else '')
    return [f'{name}: {listing(absent)}, {len(absent)} of {look.num_classes} classes, '
            f'{"are" if len(absent) > 1 else "is"} in none of the {len(read)} masks looked at'
            f'{hint}.']


LOADERS = {f'{name}_dataloader': f'{name}_evaluator' for name in ('train', 'val', 'test')}


def rules(cfg, loader):
    """What the masks of a loader have to keep to: keywords of LoadCheckedMask.

    Args:
        cfg (Config): The config; ``model`` may be wrapped for test-time augmentation.
        loader (str): 'train_dataloader', 'val_dataloader' or 'test_dataloader'.

    Returns:
        dict | None: ``num_classes`` of the decode head and ``ignore_index``, in training the
        head's, else the evaluator's; None if the model has no decode head.

    Raises:
        ValueError: The auxiliary head has another ``num_classes``, or there are more than 255.
    """
    model = next((node for node in dicts(cfg.model) if 'decode_head' in node), None)
    if model is None:
        return None
    head = _heads(model['decode_head'])[-1]
    num_classes = head.get('num_classes')
    if not num_classes:
        return None
    if num_classes > 255:
        raise ValueError(f'model.decode_head.num_classes={num_classes}, but mmseg reads masks as '
                         '8 bits: 255 classes at most.')
    losses = [loss for loss in dicts(head.get('loss_decode')) if loss.get('type') in (
        'CrossEntropyLoss', 'mmseg.CrossEntropyLoss')]
    if 1 in (num_classes, head.get('out_channels')) and not all(
            loss.get('use_sigmoid') for loss in losses):
        raise ValueError('model.decode_head has a single logit, whose CrossEntropyLoss needs '
                         'use_sigmoid=True in loss_decode; or set num_classes=2 and no '
                         'out_channels.')
    for other in _heads(model.get('auxiliary_head')):
        if other.get('num_classes', num_classes) != num_classes and other['type'] != 'STDCHead':
            raise ValueError(f'model.auxiliary_head.num_classes={other["num_classes"]} differs '
                             f'from model.decode_head.num_classes={num_classes}.')
    source = [head] if loader == 'train_dataloader' else dicts(cfg.get(LOADERS[loader]))
    ignored = [node['ignore_index'] for node in source if 'ignore_index' in node]
    return dict(num_classes=num_classes, ignore_index=ignored[0] if ignored else 255)


def _heads(heads):
    """The heads of a config that gives one, a list of them, or none."""
    return heads if isinstance(heads, (list, tuple)) else [heads] if heads else []


def look_while_reading(dataset, metrics, num_classes, ignore_index=255):
    """Let a data set and the metrics of its evaluator use the classes of this module.

    mmseg's LoadAnnotations becomes :class:`LoadCheckedMask`, and its IoUMetric
    :class:`CheckedIoUMetric`. The config stays as it is: mmseg's inference looks for its own names
    there.

    Args:
        dataset (Dataset): Changed in place; no worker has it yet.
        metrics (list[BaseMetric]): Changed in place.
        num_classes (int): ``num_classes`` of the decode head.
        ignore_index (int): The label that is left out. Defaults to 255.

    Returns:
        list[str]: What was replaced, for the log.
    """
    replaced = set()
    for part in base_datasets(dataset):
        for steps, index in slots(part.pipeline):
            old = steps[index]
            if type(old) is LoadAnnotations:
                steps[index] = LoadCheckedMask.like(old, num_classes, ignore_index)
                replaced.add('LoadAnnotations by LoadCheckedMask')
    for metric in metrics:
        if type(metric) is IoUMetric:
            metric.__class__ = CheckedIoUMetric
            if metric.output_dir:
                metric.pages = dataset_pages(dataset, metric.output_dir)
            replaced.add('IoUMetric by CheckedIoUMetric')
    return [f'Replaced: {join(sorted(replaced))}.'] if replaced else []
