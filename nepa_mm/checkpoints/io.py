"""Read checkpoints of any origin, and write weights."""
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any
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
from nepa_mm.utils.errors import first_line
from nepa_mm.utils.files import atomic_write

# valid types of optional entries
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


def locate(path: str | Path, weights: str | None = None) -> str:
    """Find the weight file of a path, a published folder, or a Hugging Face Hub address.

    Args:
        path (str | Path): A file or another address, returned unchanged; a folder with
            ``config.json`` and weights; or ``hf://owner/name[@revision]``, downloaded to
            huggingface_hub's cache.
        weights (str, optional): 'ema' selects ``pytorch_model_ema.bin`` of a folder; None and
            'raw' select ``model.safetensors``, or else ``pytorch_model.bin``. Defaults to None.

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
        raise FileNotFoundError(f'The folder {path} has no config.json, so it is not a published '
                                'checkpoint; name the weight file itself.')
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f'The folder {path} has no {" and no ".join(names)}.')


def read_checkpoint(path: str | Path, map_location: str = 'cpu',
                    weights: str | None = None) -> dict:
    """Read a checkpoint without executing anything in it, see safe_load.py.

    Keys of published weights (prefix ``vit_nepa.``) are renamed to ours.

    Args:
        path (str | Path): A ``.safetensors`` file; any other file is read as one of
            ``torch.save``; a published folder or ``hf://owner/name[@revision]``, see
            :func:`locate`; or an address that mmengine's ``CheckpointLoader`` supports.
        map_location (str): Device of the tensors; 'meta' does not read their values. Defaults to
            'cpu'.
        weights (str, optional): File of a published folder, see :func:`locate`. Defaults to None.

    Returns:
        dict: A checkpoint with at least the keys ``state_dict`` and ``meta``. Published weights
        also have ``published_names``, a list. Text that OpenMMLab would evaluate is removed,
        except for the config, which is in ``meta['config_text']``, see
        :func:`remove_evaluated_text`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is truncated, corrupt, not a checkpoint, or a pickle with other
            classes; the message names the class and how to allow it.
    """
    checkpoint = load_from_nepa_mm(path, map_location, weights)
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    tensors = checkpoint['state_dict'] if isinstance(checkpoint, dict) else None
    if not (_is_state_dict(tensors) and tensors):
        raise ValueError(f'{path} contains no state dict of tensors.')
    checkpoint.setdefault('meta', {})
    return checkpoint


@CheckpointLoader.register_scheme(['', *CheckpointLoader._schemes], force=True)
def load_from_nepa_mm(filename: str | Path, map_location: str | None = None,
                      weights: str | None = None) -> Any:
    """Load a checkpoint for mmengine; replaces all its loaders, so every entry point is safe.

    mmengine's loaders retry a rejected file with ``weights_only=False``.

    Args:
        filename (str | Path): See :func:`read_checkpoint`.
        map_location (str, optional): Device of the tensors. Defaults to None, the CPU.
        weights (str, optional): See :func:`read_checkpoint`. Defaults to None.

    Returns:
        Any: Content of the file as OpenMMLab expects it, including keys besides ``state_dict``.

    Raises:
        FileNotFoundError, ValueError: See :func:`read_checkpoint`.
    """
    with _local(str(filename), weights) as file:
        if not file.is_file():
            raise FileNotFoundError(f'The checkpoint {filename} does not exist.')
        try:
            checkpoint = remove_evaluated_text(_read_file(file, map_location))
        except Exception as error:      # pickle, zip, torch and safetensors each raise their own
            raise ValueError(
                f'{filename} is not a checkpoint that can be read safely: {_reason(error)}.'
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
    """Yield the local file of a path or an address, downloaded if necessary."""
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
    """Download a file to the cache of torch.hub, as mmengine does."""
    file = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(address).path).name)
    for main in (True, False):      # the main process downloads while the other processes wait
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


def remove_evaluated_text(checkpoint: Any) -> Any:
    """Remove the texts that OpenMMLab would evaluate, and check the types of common entries.

    ``Runner.resume`` evaluates ``meta['config']``. Inferencers without a config evaluate
    ``meta['cfg']`` and ``runtime_info['cfg']``. A config can import and build anything, so its
    text is moved to ``meta['config_text']``, which is never evaluated.

    ``runtime_info`` also names files; AtomicCheckpointHook removes only those that it wrote.

    Args:
        checkpoint (Any): Content of a file; a dict is changed in place.

    Returns:
        Any: ``checkpoint``.

    Raises:
        ValueError: A common entry has another type.
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
    device = str(map_location or 'cpu')
    # safetensors has no meta tensors; those of the CPU are mapped, not read
    with safe_open(file, 'pt', device='cpu' if device == 'meta' else device) as opened:
        meta = json.loads((opened.metadata() or {}).get('nepa_mm', '{}'))
        return dict(state_dict={key: opened.get_tensor(key).to(device) for key in opened.keys()},
                    meta=meta)


def _reason(error):
    """Reason for rejecting a file, in one line; for an unknown class also how to allow it."""
    foreign = re.search(r'Unsupported global: GLOBAL (\S+)', str(error))
    if foreign:
        return (f'it holds {foreign[1]}, which may execute code: only tensors, numbers, texts and '
                'log records are safe; a class that you trust can be allowed by '
                'torch.serialization.add_safe_globals, e.g. in a module of custom_imports')
    return first_line(error)


def save_weights(state_dict: dict[str, torch.Tensor], path: str | Path,
                 for_transformers: bool = False, **meta: Any) -> None:
    """Write a ``.safetensors`` file for :func:`read_checkpoint`.

    Args:
        state_dict (dict[str, Tensor]): The tensors.
        path (str | Path): The file.
        for_transformers (bool): Whether to add the metadata entry that transformers requires.
            safetensors shuffles several entries, so only without it equal content yields equal
            bytes. Defaults to False.
        **meta: JSON-serialisable content of ``checkpoint['meta']``.

    Raises:
        FileExistsError: The file exists.
        ValueError: ``meta`` is not JSON-serialisable.
    """
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state_dict.items()}
    try:
        entries = dict(nepa_mm=json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise ValueError(f'The meta of the checkpoint is not JSON: {error}.') from error
    if for_transformers:
        entries['format'] = 'pt'
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, entries)
