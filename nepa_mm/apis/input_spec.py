"""Describe the preprocessing of images in plain values, for software without OpenMMLab pipelines.

An *input spec* is a dict: ``resize``, the short side in pixels or [height, width]; ``crop``,
[height, width] of the centre crop or None; ``interpolation`` and ``backend`` of the resizing;
``mean`` and ``std`` per channel, for pixels from 0 to 255; ``channel_order``, 'RGB', 'BGR' or
'any'.
"""
import math
from collections.abc import Mapping

from mmengine.registry import DATASETS
from mmengine.utils import to_2tuple

from nepa_mm.apis.channel_checks import type_name

# codes of PIL.Image.Resampling, which preprocessor_config.json uses
RESAMPLE = dict(nearest=0, lanczos=1, bilinear=2, bicubic=3, box=4, hamming=5)
BACKENDS = ('pillow', 'cv2')
STEPS_WITHOUT_EFFECT = ('LoadImageFromFile', 'LoadImageWithPillow', 'LoadAnnotations', 'PackInputs',
                        'PackSegInputs')


def input_of(cfg: Mapping) -> dict | None:
    """Return the input spec of a config: of its test pipeline, or of its crops in pretraining.

    Args:
        cfg (dict): With ``model`` and ``test_dataloader`` or ``train_dataloader``; or with
            ``input``, a spec recorded in one of our files.

    Returns:
        dict | None: The spec, see above; None if the config has no pipeline.

    Raises:
        ValueError: A step of the test pipeline has no equivalent in a spec, or the recorded spec
            is invalid.
    """
    try:
        found = cfg.get('input') or _input_of(cfg)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f'The config describes no network input: {error!r}.') from error
    return _validated(found) if found is not None else None


def _input_of(cfg):
    test, train = (_pipeline_of(cfg, name) for name in ('test_dataloader', 'train_dataloader'))
    if not (test or train):
        return None
    found = dict(resize=None, crop=None, interpolation='bilinear', backend='cv2')
    found.update(_read_test_pipeline(test) if test else _read_crops(train))
    return found | pixels_of(cfg)


def test_pipeline_of(cfg: Mapping) -> list[dict] | None:
    """Return the test pipeline of a config, None if it has none.

    Raises:
        ValueError: It is not a list of steps.
    """
    try:
        pipeline = _pipeline_of(cfg, 'test_dataloader')
        good = pipeline is None or all(isinstance(step['type'], str) for step in pipeline)
    except (AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError('The test pipeline of the config is not a list of steps.')
    return pipeline


def _pipeline_of(cfg, name):
    """The pipeline of a dataloader, or None."""
    dataset = (cfg.get(name) or {}).get('dataset') or {}
    while dataset.get('pipeline') is None and dataset.get('dataset'):     # a wrapper
        dataset = dataset['dataset']
    return dataset.get('pipeline') or None


def pixels_of(cfg: Mapping) -> dict:
    """Return ``mean``, ``std`` and ``channel_order`` of a config's data preprocessor."""
    settings = cfg['model'].get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    channels = cfg['model']['backbone'].get('in_channels', 3)
    to_rgb = settings.get('to_rgb') or settings.get('bgr_to_rgb')
    return dict(
        mean=[float(x) for x in settings.get('mean') or [0.] * channels],
        std=[float(x) for x in settings.get('std') or [1.] * channels],
        channel_order='any' if channels != 3 else 'RGB' if to_rgb else 'BGR')


def _read_test_pipeline(pipeline):
    found = {}
    for step in pipeline:
        kind = type_name(step)
        if kind in STEPS_WITHOUT_EFFECT:
            continue
        plain = (kind == 'ResizeEdge' and step.get('edge', 'short') == 'short'
                 or kind == 'Resize' and step.get('scale') and not step.get('keep_ratio'))
        if plain and not found:
            scale = step['scale']
            found.update(
                resize=int(scale) if kind == 'ResizeEdge' else list(to_2tuple(scale))[::-1],
                interpolation=step.get('interpolation', 'bilinear'),
                backend=step.get('backend', 'cv2'))
        elif kind == 'CenterCrop' and 'crop' not in found and not step.get('auto_pad'):
            found.update(crop=list(to_2tuple(step['crop_size']))[::-1])
        else:
            raise ValueError(
                f'The step {dict(step)} of the test pipeline cannot be expressed in published '
                'formats, which have one Resize or ResizeEdge, then one CenterCrop.')
    return found


def _read_crops(pipeline):
    """Read the size from the crops: pretraining never sees a full image."""
    sizes = [step for step in pipeline if 'scale' in step or 'crop_size' in step]
    if not sizes:
        return {}
    last = sizes[-1]
    crop = list(to_2tuple(last.get('crop_size', last.get('scale'))))[::-1]
    antialiased = type_name(last) == 'LoadRandomResizedCrop'    # has no argument backend
    return dict(resize=min(crop) if crop[0] == crop[1] else crop, crop=crop,
                interpolation=last.get('interpolation', 'bilinear'),
                backend=last.get('backend', 'pillow' if antialiased else 'cv2'))


def _validated(found):
    """Return a spec if it is valid, else raise ValueError; it may come from an untrusted file."""
    try:
        sizes = [found['resize'], *(found['crop'] or [])]
        sizes += sizes.pop(0) if isinstance(sizes[0], list) else []
        numbers = found['mean'] + found['std']
        good = (all(type(size) is int and 0 < size < 2 ** 16 for size in sizes if size is not None)
                and all(isinstance(x, float) and math.isfinite(x) for x in numbers)
                and len(found['mean']) == len(found['std']) and min(found['std']) > 0
                and (found['crop'] is None or len(found['crop']) == 2)
                and found['backend'] in BACKENDS and found['interpolation'] in (*RESAMPLE, 'area')
                and found['channel_order'] in ('RGB', 'BGR', 'any'))
    except (AttributeError, KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f'Not a valid input spec: {repr(found)[:200]}.')
    return found


def published_input(config: Mapping) -> dict:
    """Return the spec with which the authors evaluate a model of a complete ``config.json``."""
    size, channels = to_2tuple(config['image_size']), config['num_channels']
    large = config['hidden_size'] == 1024 and tuple(size) == (224, 224)
    resize = [235, 235] if large else round(min(size) * 256 / 224)
    return dict(
        resize=resize, crop=list(size), interpolation='bicubic', backend='pillow',
        mean=[127.5] * channels, std=[127.5] * channels,
        channel_order='RGB' if channels == 3 else 'any')


def size_of(found: Mapping) -> list[int] | None:
    """Return [height, width] of the network's input, or None if the size varies by image."""
    if found['crop']:
        return found['crop']
    return found['resize'] if isinstance(found['resize'], list) else None


def pipeline_of(found: Mapping) -> list[dict]:
    """Return the test pipeline of a spec, the inverse of :func:`input_of`."""
    how = dict(interpolation=found['interpolation'], backend=found['backend'])
    resize, crop = found['resize'], found['crop']
    channels = len(found['mean'])
    color = {} if channels == 3 else dict(
        color_type='grayscale' if channels == 1 else 'unchanged')
    steps = [dict(type='LoadImageWithPillow', **color)]
    if isinstance(resize, list):
        steps.append(dict(type='Resize', scale=tuple(resize[::-1]), **how))
    elif resize:
        steps.append(dict(type='ResizeEdge', scale=resize, edge='short', **how))
    if crop:
        steps.append(dict(type='CenterCrop', crop_size=tuple(crop[::-1])))
    return [*steps, dict(type='PackInputs')]


def preprocessor_config(found: Mapping) -> dict:
    """Return the ``preprocessor_config.json`` of a spec, for transformers' BitImageProcessor.

    Raises:
        ValueError: The interpolation is OpenCV's 'area', or the channel order is BGR.
    """
    if found['interpolation'] not in RESAMPLE or found['channel_order'] == 'BGR':
        raise ValueError(
            'A preprocessor_config.json supports neither interpolation="area" nor the channel '
            f'order BGR; the test pipeline has {found["interpolation"]} and '
            f'{found["channel_order"]}.')
    resize, crop = found['resize'], found['crop']
    shape = ('height', 'width')
    config = dict(
        image_processor_type='BitImageProcessor', do_convert_rgb=len(found['mean']) == 3,
        do_resize=resize is not None, do_center_crop=crop is not None,
        resample=RESAMPLE[found['interpolation']], do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=[x / 255 for x in found['mean']],
        image_std=[x / 255 for x in found['std']])
    if resize is not None:
        config['size'] = (dict(zip(shape, resize)) if isinstance(resize, list)
                          else dict(shortest_edge=resize))
    if crop is not None:
        config['crop_size'] = dict(zip(shape, crop))
    return config


def timm_config(found: Mapping) -> dict:
    """Return the preprocessing of a spec as fields of timm's ``pretrained_cfg``.

    timm resizes with Pillow to floor(crop / crop_pct): the short side ('center') or both
    ('squash'), and crops the centre.

    Raises:
        ValueError: timm cannot express it; the message names the step.
    """
    resize, crop, size = found['resize'], found['crop'], size_of(found)
    squash = isinstance(resize, list)
    sides = resize if squash else [resize or 0] * 2
    good = (size and found['channel_order'] != 'BGR' and found['interpolation'] in RESAMPLE
            and (squash or size[0] == size[1]) and all(a >= b for a, b in zip(sides, size))
            and size[0] * sides[1] == size[1] * sides[0])
    if not good:
        raise ValueError(
            "timm's transform resizes the short side and crops a square, or resizes and crops both "
            f'sides by one factor, in RGB; here are resize={resize}, crop={crop}, '
            f'interpolation={found["interpolation"]}, channel order {found["channel_order"]}.')
    crop_pct = size[0] / sides[0]
    while any(math.floor(a / crop_pct) < b for a, b in zip(size, sides)):     # rounding
        crop_pct = math.nextafter(crop_pct, 0)
    return dict(
        input_size=[len(found['mean']), *size], interpolation=found['interpolation'],
        crop_pct=crop_pct, crop_mode='squash' if squash else 'center',
        mean=[x / 255 for x in found['mean']], std=[x / 255 for x in found['std']])


def class_names(cfg: Mapping, meta: Mapping) -> list[str] | None:
    """Return the class names of the checkpoint, or else of the config's data set.

    Args:
        cfg (dict): The config, see :func:`input_of`.
        meta (dict): The ``meta`` of the checkpoint.

    Returns:
        list[str] | None: In the order of the network's outputs; None if they are unknown.
    """
    sources = [meta.get('dataset_meta')]
    for name in ('test_dataloader', 'train_dataloader'):
        dataset = (cfg.get(name) or {}).get('dataset') or {}
        sources += [dataset.get('metainfo'), dataset]
        for registry in (DATASETS, *DATASETS.children.values()):
            registry.import_from_location()     # get() would import what an untrusted file names
            found = registry.module_dict.get(type_name(dataset))
            sources.append(getattr(found, 'METAINFO', None))
    for source in sources:
        names = source.get('classes') if isinstance(source, dict) else None
        if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
            return list(names)
    return None
