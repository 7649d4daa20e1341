"""The model card of published weights: what a checkpoint records, and no figure beyond that."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.utils import to_2tuple

from nepa_mm.checkpoints.huggingface_config import backbone_cfg
from nepa_mm.checkpoints.recorded_config import recorded_values
from nepa_mm.models.timm_eva import eva_args

UNKNOWN = 'not recorded'
CARD = """---
license: {license}
pipeline_tag: {task}
tags:
- nepa
- vision-transformer
---

# {name}

{what}

NEPA pretrains a Vision Transformer by predicting the embedding of the next patch
([arXiv 2512.16922](https://arxiv.org/abs/2512.16922)). {origin}

| | |
| --- | --- |
{table}

## Validation

{metrics}

## Use

With nepa_mm, in the folder that contains this one:

```python
import nepa_mm

model = nepa_mm.load({folder})
```

{timm}Input: pixels from 0 to 1, normalised as in `preprocessor_config.json`, which the
`AutoImageProcessor` of transformers reads. The other files have the format of the authors'
`vit_nepa` model for transformers, which needs their code.
"""
TIMM = """As a timm model:

```python
import json

import nepa_mm
from nepa_mm.checkpoints.huggingface_config import model_cfg
from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.models.timm_eva import to_timm

config = json.load(open({config}))
model = to_timm(model_cfg(config{classes}), read_checkpoint({folder})['state_dict'])
```

"""


def model_card(name: str, checkpoint: Mapping, which: str, config: Mapping, cfg: Mapping,
               license: str, parameters: int) -> str:
    """Return the text of a model card.

    Args:
        name (str): Name of the folder.
        checkpoint (dict): Result of :func:`nepa_mm.checkpoints.io.read_checkpoint`.
        which (str): The set of weights, 'ema' or 'raw'.
        config (dict): The complete ``config.json``.
        cfg (dict): The config of the network.
        license (str): A name that the Hub knows.
        parameters (int): Number of parameters.
    """
    meta = checkpoint['meta']
    classes = len(config['id2label']) if 'id2label' in config else None
    height, width = to_2tuple(config['image_size'])
    task = f'classifier of {classes} classes' if classes else 'pretrained backbone'
    rows = {
        'Weights': 'average over training (EMA)' if which == 'ema' else 'raw',
        'Parameters': f'{parameters / 1e6:.2f} M',
        'Network': f'{config["num_hidden_layers"]} blocks, {config["hidden_size"]} dimensions, '
                   f'{config["num_attention_heads"]} heads, patches of {_size(config)} pixels',
        'Image size': f'{height} x {width}, {config["num_channels"]} channels',
        **training(meta, cfg)}
    origin = ('Converted from weights in the published format.' if meta.get('published') else
              'Trained with nepa_mm, not by the authors of the paper.')
    found = recorded_metrics(checkpoint)
    metrics = ('The last validation before the checkpoint was saved:\n\n| metric | value |\n'
               '| --- | --- |\n' + '\n'.join(f'| {_cell(key)} | {value:.4g} |'
                                             for key, value in found.items())
               if found else 'The checkpoint records no validation.')
    paths = dict(config=repr(f'{name}/config.json'), folder=repr(name),
                 classes=f', num_classes={classes}' if classes else '')
    return CARD.format(
        license=license, origin=origin, name=_cell(name), **paths,
        task='image-classification' if classes else 'image-feature-extraction',
        what=f'A NEPA Vision Transformer: {task}.', metrics=metrics,
        table='\n'.join(f'| {key} | {_cell(value)} |' for key, value in rows.items()),
        timm=TIMM.format(**paths) if _timm_has(config) else '')


def training(meta: Mapping, cfg: Mapping) -> dict[str, str]:
    """Return what a checkpoint and its config record of the training, by title."""
    values = {**recorded_values(meta.get('config_text') or ''), **cfg}
    loader = _dict(values.get('train_dataloader'))
    dataset = _dict(loader.get('dataset'))
    while 'type' in dataset and isinstance(dataset.get('dataset'), dict):     # a wrapper
        dataset = dataset['dataset']
    wrapper = _dict(values.get('optim_wrapper'))
    optimizer = _dict(wrapper.get('optimizer'))
    # the name of the folder, but not where it lies on this machine
    where = Path(str(dataset.get('data_root') or '')).name
    data = ' '.join(str(part) for part in (dataset.get('type'), where and f'({where})') if part)
    batch = loader.get('batch_size')
    return {
        'Training data': data or UNKNOWN,
        'Length': ', '.join(f'{meta[key]} {noun}' for key, noun in (
            ('epoch', 'epochs'), ('iter', 'iterations')) if meta.get(key)) or UNKNOWN,
        'Batch': f'{batch} images per process x '
                 f'{wrapper.get("accumulative_counts", 1)} accumulated' if batch
                 else UNKNOWN,
        'Optimizer': f'{optimizer["type"]}, learning rate {optimizer.get("lr", UNKNOWN)}'
                     if optimizer.get('type') else UNKNOWN}


def recorded_metrics(checkpoint: Mapping) -> dict[str, float]:
    """Return the last value of each metric of a validation that a checkpoint records."""
    found = {}
    for key, history in _dict(checkpoint.get('message_hub')).get('log_scalars', {}).items():
        name = key.removeprefix('val/')
        if name != key and name not in ('time', 'data_time') and len(history.data[0]):
            found[name] = float(history.current())
    return found


def _timm_has(config):
    try:
        eva_args(backbone_cfg(config))
    except ValueError:
        return False
    return True


def _dict(value: Any) -> Mapping:
    return value if isinstance(value, dict) else {}


def _size(config):
    return ' x '.join(map(str, to_2tuple(config['patch_size'])))


def _cell(text):
    """Text that neither ends a cell of a table nor starts HTML."""
    return ' '.join(str(text).split()).replace('|', r'\|').replace('<', '&lt;')
