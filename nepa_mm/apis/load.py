"""A network of a checkpoint or of a config in one call, for scripts and notebooks."""
import copy
import logging
import os
import warnings
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from nepa_mm.apis.config import check_checkpoint, read_config
from nepa_mm.apis.image_transform import build_transform
from nepa_mm.apis.input_spec import class_names
from nepa_mm.apis.recorded_network import build_network, read_record
from nepa_mm.checkpoints.io import locate, read_checkpoint
from nepa_mm.checkpoints.loading import WEIGHTS, load_strict
from nepa_mm.utils.errors import first_line
from nepa_mm.utils.random_state import preserve_rng_state

CONFIGS = Path(__file__).parents[1] / '.mim/configs'
FILES = ('.bin', '.ckpt', '.pkl', '.pt', '.pth', '.safetensors')
# type of the data preprocessor of a network whose file records mean and std only
PREPROCESSORS = dict(NEPA='NEPADataPreprocessor', ImageClassifier='ClsDataPreprocessor')


def load(name: str | os.PathLike, checkpoint: str | os.PathLike | None = None, *,
         device: str | torch.device | None = None, weights: str | None = None) -> nn.Module:
    """Load a network with its weights and its image transform.

    ========================================  ==================================================
    ``load('work_dirs/run/epoch_60.pth')``    the network that the checkpoint of a run records
    ``load('mine_20260101-0123abcd.safetensors')``  the same, of a file of publish_model
    ``load('FOLDER')``, ``load('hf://owner/name')``  published weights with their ``config.json``
    ``load('nepa_vit-b', 'FILE')``            the network of a config, and weights of any of these
    ``load('my_config.py', 'FILE')``          the same with a config file of your own
    ``load('nepa_vit-b')``                    the untrained network of a config, with a warning
    ========================================  ==================================================

    Without a config, only known classes are built and nothing in the file is executed. A config
    file is Python and is executed.

    Args:
        name (str | Path): With ``checkpoint``: a config of this package by its file's name
            ('nepa_vit-b', 'pretrain/nepa_vit-b', with or without '.py'), or a path of a config
            file. Alone: a checkpoint, or else a config. An existing path is preferred to a name.
        checkpoint (str | Path, optional): ``.pth`` or ``.safetensors`` file, published folder or
            ``hf://owner/name[@revision]``. Defaults to None.
        device (str, optional): Where the network goes. Defaults to None: the CPU.
        weights (str, optional): 'ema', 'raw', or None for the EMA weights if the file has them.
            Defaults to None.

    Returns:
        nn.Module: ``NEPA``, ``ImageClassifier``, ``EncoderDecoder`` or what the config names, in
        evaluation mode, with the outputs of the Runner's network. It has two more attributes:

        - ``transform``: image file or PIL image -> tensor (C, height, width), the bits that the
          test pipeline and the data preprocessor of the run yield, see :class:`ImageTransform`.
          Pretraining has no test pipeline: its short side is resized to the training size and the
          centre cropped. Segmentors keep the size of their test pipeline, so the sides of the
          tensors may vary with the image. None, with a warning, if it cannot be built.
        - ``dataset_meta``: ``classes``, a list, if they are known.

    Raises:
        FileNotFoundError: The checkpoint or the config file does not exist.
        ValueError: The name is unknown, the file is no checkpoint, records no config or one that
            cannot be built safely, does not fit the config, or lacks this set of weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f'weights must be one of {WEIGHTS}, got {weights!r}.')
    for value in (name, *([] if checkpoint is None else [checkpoint])):
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f'load takes names and paths, got {value!r}.')
    name, device = os.fspath(name), _check_device(device)
    meta, recorded = {}, checkpoint is None and not _is_config(name)
    if recorded:
        check_checkpoint(name, 'the checkpoint of load')
        checkpoint = name
        cfg, meta, file = read_record(checkpoint, weights)
        _add_preprocessor(cfg)
    else:
        cfg = read_config(find_config(name)).to_dict()
        if not isinstance(cfg.get('model'), dict):
            raise ValueError(f'The config {name} has no model.')
        while isinstance(cfg['model'].get('module'), dict):     # test-time augmentation
            cfg['model'] = cfg['model']['module']
        if checkpoint is not None:
            checkpoint = os.fspath(checkpoint)
            check_checkpoint(checkpoint, 'the checkpoint of load')
            file = locate(checkpoint, weights)
            meta = read_checkpoint(file, 'meta')['meta']
    model = build_network(cfg)
    if checkpoint is None:
        warnings.warn(f'{name} has no weights of its own: the network is untrained. '
                      'Give a checkpoint: load(CONFIG, CHECKPOINT).', stacklevel=2)
        disabled = logging.root.manager.disable
        logging.disable(logging.INFO)       # mmengine logs two lines for every tensor
        try:
            with preserve_rng_state():
                model.init_weights()
        finally:
            logging.disable(disabled)
    else:
        load_strict(model, file, weights=weights)
    try:
        model.transform = build_transform(cfg, model.data_preprocessor, trusted=not recorded)
    except ValueError as error:     # the weights are useful without it
        model.transform = None
        warnings.warn(f'{checkpoint or name} gives no image transform: {error}', stacklevel=2)
    names = class_names(cfg, meta)
    model.dataset_meta = copy.copy(meta.get('dataset_meta') or {}) | (
        dict(classes=names) if names else {})
    return model.to(device).eval()


def find_config(name: str) -> str:
    """The file of a config.

    Args:
        name (str): A path, or the name of one of the package's configs, e.g. 'nepa_vit-b' or
            'pretrain/nepa_vit-b.py'.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: The name is unknown.
    """
    if os.path.isfile(name):
        return name
    known = {}
    for file in sorted(CONFIGS.rglob('*.py')):
        inside = file.relative_to(CONFIGS).with_suffix('')
        if inside.parts[0] != '_base_':
            known[inside.name] = known[str(inside)] = str(file)
    wanted = name.removesuffix('.py')
    if wanted in known:
        return known[wanted]
    if name.endswith('.py'):
        raise FileNotFoundError(f'There is no config file {name}, and no config of this package '
                                'has that name.')
    near = get_close_matches(wanted, known, n=3)
    raise ValueError(f'No config of this package and no checkpoint is called {name!r}.'
                     + f' Did you mean {" or ".join(near)}?' * bool(near))


def _is_config(name):
    """Whether the only argument of load is a config rather than a checkpoint."""
    if name.endswith('.py'):
        return True
    return not (os.path.exists(name) or '://' in name or name.endswith(FILES))


def _check_device(device):
    """Return the device, or raise ValueError for one that is not here."""
    try:
        torch.empty(0, device=device or 'cpu')
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'The device {str(device)!r} cannot be used: '
                         f'{first_line(error)}.') from error
    return torch.device(device or 'cpu')


def _add_preprocessor(cfg):
    """Give a network the preprocessor of its recorded input, where the file has no other."""
    model, images = cfg['model'], cfg.get('input')
    kind = PREPROCESSORS.get(model['type'])
    if kind and images and not (model.get('data_preprocessor') or cfg.get('data_preprocessor')):
        model['data_preprocessor'] = dict(
            type=kind, mean=images['mean'], std=images['std'],
            to_rgb=images['channel_order'] == 'RGB')
