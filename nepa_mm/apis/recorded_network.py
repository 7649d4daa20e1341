"""The network that a checkpoint records: its config, built from known classes only.

A file from elsewhere may record anything. mmengine imports what a ``type`` names and calls it, so
every name is looked up first.
"""
import importlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.registry import MODELS, TASK_UTILS, DefaultScope
from mmpretrain.registry import BATCH_AUGMENTS
from torch import nn

from nepa_mm.apis.input_spec import published_input
from nepa_mm.checkpoints.huggingface_config import (
    ACTIVATIONS,
    complete_config,
    count_classes,
    model_cfg,
    read_published_config,
)
from nepa_mm.checkpoints.io import locate, read_checkpoint
from nepa_mm.checkpoints.recorded_config import recorded_config
from nepa_mm.compat.quiet import import_mmseg
from nepa_mm.utils.nested import iter_dicts
from nepa_mm.utils.random_state import preserve_rng_state

# Modules whose classes a record may name. They build layers from numbers. Other classes of
# OpenMMLab read files (VQA heads), download, or run code of the Hub (HuggingFaceClassifier).
SAFE = re.compile(
    r'torch\.nn\.|mmcv\.cnn\.|mmengine\.(?:model|utils\.dl_utils\.parrots_wrapper)\.'
    r'|nepa_mm\.(?:models|datasets\.transforms\.timm_augment)\.'
    r'|mmpretrain\.models\.(?:classifiers\.image|losses|necks|utils\.(?:data_pre|batch_aug)'
    r'|heads\.(?:cls_head|linear_head|stacked_head|margin_head|multi_label_\w+))'
    r'|mmseg\.(?:structures\.sampler'
    r'|models\.(?:segmentors\.encoder_decoder|decode_heads|losses|necks|data_preprocessor))')
FILES = ('init_cfg', 'pretrained')      # keys that name weight files; the checkpoint has all
SAFE_PATHS = {cfg['type'] for cfg in ACTIVATIONS.values()}
SCOPES = ('mmpretrain', 'mmseg', 'mmengine', 'nepa_mm')


def read_record(checkpoint: str | Path, weights: str | None = None) -> tuple[dict, dict, str]:
    """Read what a checkpoint records about its network and images.

    Args:
        checkpoint (str | Path): File, published folder or ``hf://`` address.
        weights (str, optional): 'ema' or 'raw', for a published folder. Defaults to None.

    Returns:
        tuple[dict, dict, str]: The config, with ``model`` and ``input`` or the fields of
        :func:`recorded_config`; the meta of the file; the path of the weight file.

    Raises:
        FileNotFoundError: The checkpoint, or the ``config.json`` of published weights, is missing.
        ValueError: The file is no checkpoint, or records no config, or one of another network.
    """
    file = locate(checkpoint, weights)
    read = read_checkpoint(file, 'meta', weights)
    meta, tensors = read['meta'], read['state_dict']
    if 'published_names' in read:
        published = complete_config(read_published_config(checkpoint))
        classes = count_classes(tensors)
        cfg = dict(model=model_cfg(published, classes),
                   input=meta.get('input') or published_input(published))
        names = [published.get('id2label', {}).get(str(i)) for i in range(classes or 0)]
        if classes and all(isinstance(name, str) for name in names):
            meta = dict(dataset_meta=dict(classes=names)) | meta
    else:
        cfg = recorded_config(meta, str(checkpoint))
    if 'model' not in cfg:
        raise ValueError(f'{checkpoint} records no config: name the config as well, '
                         'load(CONFIG, CHECKPOINT).')
    check_types(cfg['model'], str(checkpoint), cfg.get('default_scope'))
    check_types(cfg.get('data_preprocessor'), str(checkpoint), cfg.get('default_scope'))
    check_shapes(cfg, tensors, str(checkpoint))
    return cfg, meta, file


def scope_of(cfg: Mapping) -> str:
    """The scope of a config: 'mmseg' or 'mmpretrain'. Files of publish_model record none."""
    segments = cfg.get('default_scope') == 'mmseg' or 'decode_head' in cfg['model']
    return 'mmseg' if segments else 'mmpretrain'


def build_network(cfg: Mapping) -> nn.Module:
    """Build the network of a config as the Runner does, without its ``init_cfg`` weights.

    SyncBN becomes BN, which computes the same in evaluation. Random states stay as they are.

    Args:
        cfg (dict): With ``model``, changed in place.
    """
    model = cfg['model']
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg['data_preprocessor'])
    for node in iter_dicts(model):
        for key in FILES:
            node.pop(key, None)
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
    if scope_of(cfg) == 'mmseg':
        import_mmseg()
        importlib.import_module('nepa_mm.models.segmentors')
    with DefaultScope.overwrite_default_scope(scope_of(cfg)), preserve_rng_state():
        return MODELS.build(model)


def check_types(part: Mapping | None, name: str, scope: str | None = None) -> None:
    """Reject a recorded config that names other than known classes.

    Args:
        part (dict, optional): Recorded config of a network or of a part of it. Keys that name
            weight files are removed.
        name (str): Name of the checkpoint in the error message.
        scope (str, optional): Recorded ``default_scope``. Defaults to None.

    Raises:
        ValueError: The message names the class.
    """
    if scope == 'mmseg' or 'decode_head' in (part or {}):
        import_mmseg()
        importlib.import_module('nepa_mm.models.segmentors')
    for node in iter_dicts(part):
        for key in FILES:
            node.pop(key, None)
        # losses read a class_weight of text from a file, by pickle
        for key, known in dict(type=_is_safe, _scope_=SCOPES.__contains__,
                               class_weight=lambda value: not isinstance(value, str)).items():
            value = node.get(key)
            if key in node and not known(value):
                raise ValueError(
                    f'{name} records {key}={str(value)[:80]!r}, which is not built from a '
                    'record: if you trust it, name the config as well, load(CONFIG, '
                    'CHECKPOINT).')


def _is_safe(name):
    """Whether a name leads to a class of ``SAFE``, in every registry that has it."""
    if not isinstance(name, str):
        return False
    if name in SAFE_PATHS:
        return True
    scope, _, short = name.rpartition('.')
    if scope and scope not in SCOPES:
        return False
    found = [registry.module_dict[short] for registry in _registries()
             if short in registry.module_dict]
    return bool(found) and all(SAFE.match(f'{one.__module__}.') for one in found)


def _registries():
    for root in (MODELS, TASK_UTILS, BATCH_AUGMENTS):
        for registry in (root, *root.children.values()):
            registry.import_from_location()
            yield registry


def check_shapes(cfg: Mapping, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Compare a recorded network with the shapes of its tensors, before memory is allocated.

    Args:
        cfg (dict): With ``model``.
        tensors (dict[str, Tensor]): Of the file, on any device.
        name (str): Name of the checkpoint in the error message.

    Raises:
        ValueError: The network cannot be built, or a tensor has another shape.
    """
    wrong = f'The config that {name} records is not that of its tensors: '
    arch = cfg['model'].get('backbone', {}).get('arch')
    depth = arch.get('num_layers') if isinstance(arch, dict) else None
    if isinstance(depth, int) and f'backbone.layers.{depth - 1}.ln1.weight' not in tensors:
        raise ValueError(f'{wrong}there are none of a block {depth - 1}.')
    try:
        with torch.device('meta'):
            own = build_network(cfg).state_dict()
    except Exception as error:      # constructors of any class raise their own
        raise ValueError(f'The network that {name} records cannot be built: '
                         f'{str(error).splitlines()[0]}') from error
    for key in own.keys() & tensors.keys():
        if own[key].shape != tensors[key].shape:
            raise ValueError(f'{wrong}{key} has shape {tuple(tensors[key].shape)}, and the config '
                             f'{tuple(own[key].shape)}.')
