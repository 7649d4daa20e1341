"""Reading weights of any origin, and writing them."""
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine import dist
from mmengine.fileio import get_local_path
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    _get_mmengine_home,
    _process_mmcls_checkpoint,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from safetensors import safe_open
from safetensors.torch import save_file

from nepa_mm.checkpoints.hub import download
from nepa_mm.checkpoints.huggingface import from_published
from nepa_mm.checkpoints.safe_load import safe_load
from nepa_mm.utils.files import atomic_write

# what a file may hold in these places, if anything
PARTS = dict(meta=dict, state_dict=dict, ema_state_dict=dict, message_hub=dict,
             optimizer=dict, param_schedulers=(dict, list))
META = dict(
    cfg=lambda value: isinstance(value, str), config=lambda value: isinstance(value, str),
    weights=lambda value: isinstance(value, dict),
    dataset_meta=lambda value: isinstance(value, dict),
    epoch=lambda value: type(value) is int and 0 <= value < 2 ** 53,
    iter=lambda value: type(value) is int and 0 <= value < 2 ** 53,
    seed=lambda value: type(value) is int and 0 <= value < 2 ** 32)
PUBLISHED_FILES = dict(raw=('model.safetensors', 'pytorch_model.bin'),
                       ema=('pytorch_model_ema.bin',))


def locate(path, weights=None):
    """The weight file behind a path, a published folder, or an address on the Hugging Face Hub.

    Args:
        path (str): A file or an address, returned as it is; a folder with
            ``config.json`` and weights; or ``hf://owner/name[@revision]``, which is
            downloaded through huggingface_hub into its cache.
        weights (str, optional): 'ema' takes ``pytorch_model_ema.bin`` of a folder; None
            and 'raw' take ``model.safetensors``, or else ``pytorch_model.bin``.
            Defaults to None.

    Returns:
        str: Path of the file.

    Raises:
        FileNotFoundError: The folder lacks the file.
        ValueError: The address is malformed, or cannot be downloaded.
    """
    path, names = str(path), PUBLISHED_FILES['ema' if weights == 'ema' else 'raw']
    if path.startswith('hf://'):
        return download(path, names)
    folder = Path(path).expanduser()
    if '://' in path or not folder.is_dir():
        return path
    if not (folder / 'config.json').is_file():
        raise FileNotFoundError(f'The folder {path} has no config.json, so it is no published '
                                'checkpoint; name the weight file itself.')
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f'The folder {path} has no {" and no ".join(names)}.')


def read_checkpoint(path, map_location='cpu', weights=None):
    """Read a checkpoint without executing anything that it contains, see safe_load.py.

    Published weights (keys below ``vit_nepa.``) come out in our names.

    Args:
        path (str): A ``.safetensors`` file; any other file is one of ``torch.save``; a published
            folder or ``hf://owner/name[@revision]``, see :func:`locate`; or an address
            that mmengine's ``CheckpointLoader`` knows.
        map_location (str): Device of the tensors; 'meta' leaves what they hold on the disk.
            Defaults to 'cpu'.
        weights (str, optional): Which file of a published folder, see :func:`locate`.
            Defaults to None.

    Returns:
        dict: A checkpoint with at least the keys ``state_dict`` and ``meta``; published weights
        also have ``published_names``, a list. Of what OpenMMLab would evaluate, the text of the
        config is ``meta['config_text']``, and the rest is left out, see :func:`without_programs`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is torn, is no checkpoint, or is a pickle with other classes; the
            message names the class and how to allow it.
    """
    checkpoint = load_from_nepa_mm(path, map_location, weights)
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    tensors = checkpoint['state_dict'] if isinstance(checkpoint, dict) else None
    if not (_is_state_dict(tensors) and tensors):
        raise ValueError(f'{path} holds no state dict of tensors.')
    checkpoint.setdefault('meta', {})
    return checkpoint


@CheckpointLoader.register_scheme(['', *CheckpointLoader._schemes], force=True)
def load_from_nepa_mm(filename, map_location=None, weights=None):
    """Take the place of every loader of mmengine, so that each entrance reads as safely.

    Those of mmengine repeat with ``weights_only=False`` what was refused.

    Args:
        filename (str): See :func:`read_checkpoint`.
        map_location (str, optional): Device of the tensors. Defaults to None, the CPU.
        weights (str, optional): See :func:`read_checkpoint`. Defaults to None.

    Returns:
        Any: What the file holds, as OpenMMLab expects it: other keys than ``state_dict``, too.

    Raises:
        FileNotFoundError, ValueError: See :func:`read_checkpoint`.
    """
    with _local(str(filename), weights) as file:
        if not file.is_file():
            raise FileNotFoundError(f'The checkpoint {filename} does not exist.')
        try:
            checkpoint = without_programs(_read_file(file, map_location))
        except Exception as error:      # pickle, zip, torch and safetensors each raise their own
            raise ValueError(
                f'{filename} is no checkpoint that can be read safely: {_reason(error)}.'
            ) from error
    published = checkpoint
    if isinstance(checkpoint, dict) and 'state_dict' in checkpoint:
        published = checkpoint['state_dict']
    if _is_state_dict(published) and any(key.startswith('vit_nepa.') for key in published):
        which = 'ema' if file.name in PUBLISHED_FILES['ema'] else 'raw'
        meta = {} if published is checkpoint else checkpoint.get('meta', {})
        return dict(state_dict=from_published(published), published_names=list(published),
                    meta=dict(weights=dict(state_dict=which)) | meta)
    if str(filename).startswith('mmcls://'):
        return _process_mmcls_checkpoint(checkpoint)
    return checkpoint


@contextmanager
def _local(path, weights):
    """The file behind a path or an address, downloaded if need be."""
    scheme, _, name = path.rpartition('://')
    try:
        if scheme in ('modelzoo', 'torchvision'):
            path = get_torchvision_models()[name]
        elif scheme == 'mmcls':
            path = get_mmcls_models()[name]
        elif scheme in ('open-mmlab', 'openmmlab'):
            path = get_external_models()[get_deprecated_model_names().get(name, name)]
            if '://' not in path:
                path = str(Path(_get_mmengine_home(), path))
    except KeyError as error:
        raise ValueError(f'{scheme}:// has no model {name}.') from error
    if path.startswith(('http://', 'https://')):
        yield _downloaded(path)
    elif '://' in path and not path.startswith('hf://'):
        with get_local_path(path) as file:
            yield Path(file)
    else:
        yield Path(locate(path, weights)).expanduser()


def _downloaded(address):
    """A file from the web, in the cache of torch.hub as mmengine has it."""
    file = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(address).path).name)
    for main in (True, False):      # one process downloads, and the others wait
        if main == dist.is_main_process() and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(address, str(file), progress=os.isatty(0))
            except (OSError, ValueError) as error:
                raise ValueError(f'{address} cannot be downloaded: {error}.') from error
        if main:
            dist.barrier()
    return file


def _is_state_dict(tensors):
    return isinstance(tensors, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor)
        for key, tensor in tensors.items())


def without_programs(checkpoint):
    """A checkpoint without what OpenMMLab evaluates or imports.

    - ``Runner.resume`` evaluates the text in ``meta['config']``, and inferencers without a config
      those in ``meta['cfg']`` and ``runtime_info['cfg']``. Imports and the types of a config may be
      anything, so the text goes to ``meta['config_text']``, where nobody evaluates it.
    - Of the files that ``runtime_info`` names AtomicCheckpointHook removes its own alone.

    Args:
        checkpoint (Any): What a file holds; a dict is changed in place.

    Returns:
        Any: ``checkpoint``.

    Raises:
        ValueError: A part of it that everybody relies on is something else.
    """
    if not isinstance(checkpoint, dict) or _is_state_dict(checkpoint):
        return checkpoint
    for name, kinds in PARTS.items():
        if checkpoint.get(name) is None:
            checkpoint.pop(name, None)
        elif not isinstance(checkpoint[name], kinds):
            raise ValueError(f'its {name} is {repr(checkpoint[name])[:50]}')
    meta = checkpoint.get('meta', {})
    for name, good in META.items():
        if meta.get(name) is not None and not good(meta[name]):
            raise ValueError(f'{name} of its meta is {repr(meta[name])[:50]}')
    texts = [meta.pop(name, None) for name in ('cfg', 'config')]
    if any(texts):
        meta['config_text'] = texts[0] or texts[1]
    hub = checkpoint.get('message_hub', {})
    for name in ('log_scalars', 'runtime_info', 'resumed_keys') if hub else ():
        if not isinstance(hub.get(name), dict):
            raise ValueError(f'{name} of its message_hub is {repr(hub.get(name))[:50]}')
    if hub:
        hub['runtime_info'].pop('cfg', None)
    return checkpoint


def _read_file(file, map_location):
    if file.suffix != '.safetensors':
        return safe_load(file, map_location)
    with safe_open(file, 'pt', device=str(map_location or 'cpu')) as opened:
        meta = json.loads((opened.metadata() or {}).get('nepa_mm', '{}'))
        return dict(state_dict={key: opened.get_tensor(key) for key in opened.keys()}, meta=meta)


def _reason(error):
    """Why the file was refused, in a line; of another class also how to allow it."""
    text = str(error)
    foreign = re.search(r'Unsupported global: GLOBAL (\S+)', text)
    if foreign:
        return (f'it holds {foreign[1]}, and what is no tensor, number, text or log record may '
                'execute something; a class that you trust can be allowed by '
                'torch.serialization.add_safe_globals, in a module of custom_imports, say')
    return text.strip().split('\n')[0].rstrip('.') or type(error).__name__


def save_weights(state_dict, path, for_transformers=False, **meta):
    """Write a ``.safetensors`` file that :func:`read_checkpoint` understands.

    Args:
        state_dict (dict[str, Tensor]): The tensors.
        path (str): The file.
        for_transformers (bool): Whether to add the entry that transformers asks for. Without
            it equal content gives equal bytes: safetensors shuffles entries. Defaults to
            False.
        **meta: What ``checkpoint['meta']`` will hold: values that JSON knows.

    Raises:
        FileExistsError: The file exists.
    """
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state_dict.items()}
    try:
        entries = dict(nepa_mm=json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise ValueError(f'What the checkpoint says beside its tensors is no JSON: {error}.'
                         ) from error
    if for_transformers:
        entries['format'] = 'pt'
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, entries)
