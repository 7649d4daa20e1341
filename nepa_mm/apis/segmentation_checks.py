"""Check segmentation data before the first step: class names and a sample of masks."""
from collections.abc import Sequence

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from torch.utils.data import Dataset

from nepa_mm.compat import stack

stack.require('mmseg')

from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric

from nepa_mm.apis.segmentation_folders import check_folders
from nepa_mm.datasets.classes import base_datasets
from nepa_mm.datasets.images import ORIENTATION, open_image, read_bytes
from nepa_mm.datasets.pipelines import iter_transforms
from nepa_mm.datasets.transforms.masks import LoadCheckedMask, values_of
from nepa_mm.evaluation.iou_metric import CheckedIoUMetric
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.nested import iter_dicts
from nepa_mm.utils.outputs import dataset_pages
from nepa_mm.utils.text import joined

SWAPPED_ORIENTATIONS = (5, 6, 7, 8)   # EXIF orientations that swap height and width
SAMPLE = 100            # masks that are checked in each data set, evenly spaced


def check_masks(runner: Runner, dataset: Dataset, loader: str,
                metrics: Sequence[BaseMetric] = ()) -> None:
    """Check the data of a segmentor now and whenever a mask is read; log the warnings.

    Args:
        runner (Runner): Built, not started.
        dataset (Dataset): Data set of the loader; no worker has a copy yet.
        loader (str): 'train_dataloader', 'val_dataloader' or 'test_dataloader'.
        metrics (list[BaseMetric]): Metrics of the evaluator. Defaults to none.

    Raises:
        DataError, ValueError: See :func:`check_segmentation_data`.
    """
    labels = label_settings(runner.cfg, loader)
    if labels:
        for note in install_checks(dataset, metrics, **labels):
            runner.logger.info(f'{loader}: {note}')
        for warning in check_segmentation_data(dataset, **labels, name=loader):
            runner.logger.warning(warning)


def check_segmentation_data(dataset: Dataset, num_classes: int, ignore_index: int, name: str
                            ) -> list[str]:
    """Check folders, class names and a sample of masks of a data set.

    Args:
        dataset (Dataset): A built data set of mmseg, also in ConcatDataset or RepeatDataset. Base
            datasets that are not a BaseSegDataset or load no masks are skipped.
        num_classes (int): ``num_classes`` of the decode head.
        ignore_index (int): The ignored label.
        name (str): Name of the data set in messages, e.g. 'train_dataloader'.

    Returns:
        list[str]: Warnings.

    Raises:
        DataError: A file is invalid, or the sample of masks is: everything is ignored, or masks
            hold 0 and 255 for two classes.
        ValueError: The number of class names differs from ``num_classes``.
    """
    warnings, read, seen, names = [], [], set(), None
    for base in base_datasets(dataset):
        steps = [steps[index] for steps, index in iter_transforms(base.pipeline)]
        loader = next((step for step in steps if isinstance(step, LoadAnnotations)), None)
        if not isinstance(base, BaseSegDataset) or loader is None:
            continue
        names = check_names(base, num_classes, name) or names
        warnings += check_folders(base, name)
        if type(loader) not in (LoadAnnotations, LoadCheckedMask):
            warnings.append(f'{name}: masks read by {type(loader).__name__} are not checked.')
            continue
        reader = LoadCheckedMask.like(loader, num_classes, ignore_index)
        upright = applies_exif(steps)
        num, first = len(base), len(read)
        for index in np.linspace(0, num - 1, min(num, SAMPLE)).round().astype(int):
            info = base.get_data_info(int(index))
            if upright is not None:
                info['ori_shape'] = image_size(info['img_path'], upright)
            values, labels = reader.read(info)
            seen.update(values_of(labels[labels != ignore_index]).tolist())
            read.append((info, values))
        own = [(info, values.tolist()) for info, values in read[first:]]
        loader.no_void = reader.no_void = (
            reader.num_classes == 2 and not base.reduce_zero_label
            and not any(1 in values and 255 in values for _, values in own))
        for info, values in own if len(seen) > 1 else ():
            if values == [0, 255]:
                reader.read(info)   # rejects it, unless 255 was seen beside both classes
    if read:
        check_sample(reader, read, seen, name)
        warnings += unseen_classes(reader, read, seen, names, name)
    return list(dict.fromkeys(warnings))


def applies_exif(steps: list) -> bool | None:
    """Return whether images are rotated by their EXIF data; None if the reader is unknown."""
    for step in steps:
        if type(step).__name__ in ('LoadImageWithPillow', 'LoadImageFromFile'):
            return getattr(step, 'color_type', 'color') in ('color', 'grayscale')
    return None


def image_size(path: str, upright: bool) -> tuple[int, int]:
    """Return (height, width) from the header, after the EXIF rotation if ``upright``."""
    image = open_image(read_bytes(path), path)
    try:
        turned = upright and image.getexif().get(ORIENTATION) in SWAPPED_ORIENTATIONS
    except Exception:       # corrupt EXIF
        turned = False
    return image.size if turned else image.size[::-1]


def check_names(dataset: Dataset, num_classes: int, name: str) -> Sequence[str] | None:
    """Return the class names, if any; reject a number of names that does not fit the head."""
    names = dataset.metainfo.get('classes')
    if names and len(names) != max(num_classes, 2):
        raise ValueError(
            f'{name}: the data set names {len(names)} classes ({", ".join(map(str, names[:20]))}'
            f'{", ..." if len(names) > 20 else ""}), but model.decode_head.num_classes='
            f'{num_classes}{", which predicts 2" if num_classes == 1 else ""}.')
    return names


def check_sample(reader: LoadCheckedMask, read: list, seen: set[int], name: str) -> None:
    """Reject masks that are ignored completely, or that lose a class because they use 0 and 255."""
    values = np.unique(np.concatenate([found for _, found in read]))
    info = next((info for info, found in read if len(found) > 1), read[0][0])
    ignored = reader.labels(info)[values] == reader.ignore_index
    if not seen:
        raise DataError(
            f'{name}: every pixel of the {len(read)} checked masks is ignored '
            f'(ignore_index={reader.ignore_index}): {info["seg_map_path"]} '
            f'{reader.sentence(values, info)}.')
    if len(seen) == 1 and ignored.any() and (
            reader.num_classes == 2 or values.tolist() == [0, 255]):
        raise DataError(
            f'{name}: only one class is left in the {len(read)} checked masks: '
            f'{info["seg_map_path"]} {reader.sentence(values, info)}.')


def unseen_classes(reader: LoadCheckedMask, read: list, seen: set[int],
                   names: Sequence[str] | None, name: str) -> list[str]:
    """Return a warning about classes that are absent from the sample of masks, if any."""
    absent = [names[index] if names else index for index in range(reader.num_classes)
              if index not in seen and index != reader.ignore_index]
    if not absent:
        return []
    hint = (' (reduce_zero_label=True ignores the value 0 and decrements all others)'
            if any(info.get('reduce_zero_label') for info, _ in read) else '')
    return [f'{name}: {joined(map(repr, absent))}, {len(absent)} of {reader.num_classes} classes, '
            f'{"are" if len(absent) > 1 else "is"} in none of the {len(read)} checked masks{hint}.']


def label_settings(cfg: Config, loader: str) -> dict | None:
    """Return the keywords of LoadCheckedMask for a loader.

    Args:
        cfg (Config): The config; ``model`` may be wrapped for test-time augmentation.
        loader (str): 'train_dataloader', 'val_dataloader' or 'test_dataloader'.

    Returns:
        dict | None: ``num_classes`` of the decode head, and ``ignore_index`` of the head in
        training, of the evaluator otherwise. None if the model has no decode head.

    Raises:
        ValueError: The heads differ in ``num_classes``, there are more than 255 classes, or a
            single logit is trained without ``use_sigmoid``.
    """
    model = next((node for node in iter_dicts(cfg.model) if 'decode_head' in node), None)
    if model is None:
        return None
    head = _heads(model['decode_head'])[-1]
    num_classes = head.get('num_classes')
    if not num_classes:
        return None
    if num_classes > 255:
        raise ValueError(f'model.decode_head.num_classes={num_classes}, but mmseg reads masks as '
                         '8 bits: 255 classes at most.')
    losses = [loss for loss in iter_dicts(head.get('loss_decode')) if loss.get('type') in (
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
    source = [head] if loader == 'train_dataloader' else iter_dicts(
        cfg.get(loader.replace('dataloader', 'evaluator')))
    ignored = [node['ignore_index'] for node in source if 'ignore_index' in node]
    return dict(num_classes=num_classes, ignore_index=ignored[0] if ignored else 255)


def _heads(heads):
    """Return the heads of a config that has one, a list, or none."""
    return heads if isinstance(heads, (list, tuple)) else [heads] if heads else []


def install_checks(dataset: Dataset, metrics: Sequence[BaseMetric], num_classes: int,
                   ignore_index: int) -> list[str]:
    """Replace mmseg's LoadAnnotations by LoadCheckedMask, and its IoUMetric by CheckedIoUMetric.

    The config does not change: mmseg's inference needs its own names there.

    Args:
        dataset (Dataset): Changed in place; no worker has a copy yet.
        metrics (list[BaseMetric]): Changed in place.
        num_classes (int): ``num_classes`` of the decode head.
        ignore_index (int): The ignored label.

    Returns:
        list[str]: Log messages.
    """
    replaced = set()
    for base in base_datasets(dataset):
        for steps, index in iter_transforms(base.pipeline):
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
    return [f'Replaced: {joined(sorted(replaced))}.'] if replaced else []
