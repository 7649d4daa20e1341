"""Reading weights of any origin, writing them whole, and starting a network from them."""
import json
import os
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader, get_torch_safe_globals
from safetensors import safe_open
from safetensors.torch import save_file

from .convert import adapt_input_conv as adapted
from .convert import from_published
from .hub import download

WEIGHTS = (None, 'ema', 'raw')
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
    """Read a checkpoint without executing anything that it contains.

    Published weights (keys below ``vit_nepa.``) come out in our names.

    Args:
        path (str): A ``.safetensors`` file; any other file is a pickle (read with
            ``weights_only=True``; mmengine's own log records are allowed); a published
            folder or ``hf://owner/name[@revision]``, see :func:`locate`; or an address
            that mmengine's ``CheckpointLoader`` knows.
        map_location (str): Device of the tensors. Defaults to 'cpu'.
        weights (str, optional): Which file of a published folder, see :func:`locate`.
            Defaults to None.

    Returns:
        dict: A checkpoint with at least the keys ``state_dict`` and ``meta``; published weights
        also have ``published_names``, a list.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is torn, is no checkpoint, or is a pickle with other classes; the
            message names the class and how to allow it.
    """
    located = locate(path, weights)
    file = Path(located).expanduser()
    if '://' in located:
        checkpoint = CheckpointLoader.load_checkpoint(located, map_location)
    elif not file.is_file():
        raise FileNotFoundError(f'The checkpoint {path} does not exist.')
    else:
        try:
            checkpoint = _read_file(file, map_location)
        except Exception as error:      # torch, pickle, zip and safetensors each raise their own
            raise ValueError(
                f'{path} is no checkpoint that can be read safely: {_reason(error)}.') from error
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    tensors = checkpoint['state_dict'] if isinstance(checkpoint, dict) else None
    if not (isinstance(tensors, dict) and tensors
            and all(isinstance(key, str) and isinstance(tensor, torch.Tensor)
                    for key, tensor in tensors.items())):
        raise ValueError(f'{path} holds no state dict of tensors.')
    meta = checkpoint['meta'] = checkpoint.get('meta') or {}
    if not (isinstance(meta, dict) and isinstance(meta.get('weights', {}), dict)):
        raise ValueError(f'{path} is damaged: its meta is {repr(meta)[:50]}.')
    if any(key.startswith('vit_nepa.') for key in tensors):
        which = 'ema' if file.name in PUBLISHED_FILES['ema'] else 'raw'
        checkpoint = dict(state_dict=from_published(tensors), published_names=list(tensors),
                          meta=dict(weights=dict(state_dict=which)) | meta)
    return checkpoint


def _read_file(file, map_location):
    if file.suffix == '.safetensors':
        with safe_open(file, 'pt', device=str(map_location or 'cpu')) as opened:
            meta = json.loads((opened.metadata() or {}).get('nepa_mm', '{}'))
            return dict(state_dict={key: opened.get_tensor(key) for key in opened.keys()},
                        meta=meta)
    with torch.serialization.safe_globals(get_torch_safe_globals()):
        return torch.load(file, map_location, weights_only=True)


def _reason(error):
    """Why torch or safetensors refused, without torch's advice to execute the file."""
    text = str(error)
    foreign = re.search(r'Unsupported (?:global|class).*?GLOBAL (\S+)', text)
    if foreign:
        return (f'it holds {foreign[1]}, and what is no tensor, number, text or log record may '
                'execute something; a class that you trust can be allowed by '
                'torch.serialization.add_safe_globals, in a module of custom_imports, say')
    text = text.partition('WeightsUnpickler error: ')[2] or text
    return text.strip().split('\n')[0].rstrip('.')


@CheckpointLoader.register_scheme(
    [r'hf://', r'.*\.safetensors$', r'(.*/)?pytorch_model(_ema)?\.bin$'])
def load_from_published(filename, map_location=None):
    """What mmengine calls for such names, so that ``load_from`` and every tool accept them."""
    return read_checkpoint(filename, map_location)


def find_whole_checkpoint(work_dir):
    """The newest checkpoint of a run that is whole, by checksums and by reading it.

    Args:
        work_dir (str): Folder with ``last_checkpoint`` and the files of the checkpoint hook.

    Returns:
        tuple[str | None, list[str]]: The file, None if there is none; what is wrong with
        each newer one, a sentence each.
    """
    work_dir, problems = Path(work_dir), []
    found = [file for pattern in ('epoch_*.pth', 'iter_*.pth', 'interrupted.pth')
             for file in work_dir.glob(pattern)]
    found.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    pointer = work_dir / 'last_checkpoint'
    named = pointer.read_text(errors='replace').strip('\0 \n') if pointer.is_file() else ''
    if named:      # the file may lie in another folder, or the folder may have been moved
        last = work_dir / Path(named).name
        found = [last if last.is_file() else Path(named), *(f for f in found if f != last)]
    for file in found:
        try:
            if file.is_file() and not zipfile.is_zipfile(file):
                raise ValueError(f'{file} is torn.')
            checkpoint = read_checkpoint(file)
            with zipfile.ZipFile(file) as opened:
                damaged = opened.testzip()
            if damaged:
                raise ValueError(f'{file} is damaged in {damaged}.')
            if not {'epoch', 'iter'} <= set(checkpoint['meta']):
                raise ValueError(f'{file} does not say how far the run was.')
            return str(file), problems
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            problems.append(str(error))
    return None, problems


@contextmanager
def written_whole(path, overwrite=False):
    """Write a file so that it is either complete or not there.

    Args:
        path (str): The file.
        overwrite (bool): Whether it may take the place of an older one, which stays until
            the new one is whole. Defaults to False.

    Yields:
        Path: A temporary file beside it, which takes its place at the end.

    Raises:
        FileExistsError: Something is there already.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path} exists already; remove it or name another.')
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        temporary.touch()
        mode = temporary.stat().st_mode     # of any new file; safetensors makes its own private
        yield temporary
        temporary.chmod(mode)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)      # the new name, too, outlives a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


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
    entries = dict(nepa_mm=json.dumps(meta))
    if for_transformers:
        entries['format'] = 'pt'
    with written_whole(path) as temporary:
        save_file(tensors, temporary, entries)


def select_weights(checkpoint, weights=None, name='the checkpoint'):
    """The raw or the averaged state dict of a checkpoint.

    A run with an EMA hook saves two sets: ``state_dict`` is the average, and
    ``ema_state_dict``, whatever its name says, holds the raw weights.

    Args:
        checkpoint (dict): What :func:`read_checkpoint` returns.
        weights (str, optional): 'ema', 'raw', or None for what the file offers
            first: the average if there is one. Defaults to None.
        name (str): What error messages call it.

    Returns:
        dict[str, Tensor]: The chosen state dict.

    Raises:
        ValueError: ``weights`` is something else, or the file has no such set.
    """
    if weights not in WEIGHTS:
        raise ValueError(f'weights must be one of {WEIGHTS}, got {weights!r}.')
    raw = checkpoint.get('ema_state_dict')
    first = weights_of(checkpoint)
    if weights == 'ema' and first != 'ema':
        raise ValueError(f"{name} was saved without an average: weights='ema' is not in it, "
                         "use weights='raw' or leave it out.")
    if weights == 'raw' and raw is not None:
        return {key.removeprefix('module.'): value for key, value in raw.items() if key != 'steps'}
    if weights == 'raw' and first == 'ema':
        raise ValueError(f"{name} holds the average alone: weights='raw' is not in it, "
                         "use weights='ema' or leave it out.")
    return checkpoint['state_dict']


def weights_of(checkpoint):
    """Whether ``state_dict`` of a checkpoint is 'ema' or 'raw'."""
    recorded = checkpoint.get('meta', {}).get('weights', {})
    return recorded.get('state_dict', 'ema' if 'ema_state_dict' in checkpoint else 'raw')


def load_pretrained(module, checkpoint, prefix='', weights=None, map_location='cpu',
                    adapt_input_conv=False):
    """Load what fits from a checkpoint, and say in the log what did and what did not.

    Args:
        module (nn.Module): The network to fill.
        checkpoint (str): See :func:`read_checkpoint`.
        prefix (str): Only the keys below it are read, e.g. 'backbone.'. Defaults
            to ''.
        weights (str, optional): See :func:`select_weights`. Defaults to None.
        map_location (str): Device of the tensors. Defaults to 'cpu'.
        adapt_input_conv (bool): Whether a patch embedding of another number of channels is
            adapted, see :func:`nepa_mm.convert.adapt_input_conv`. Defaults to False: it is
            refused.

    Returns:
        tuple[list, list, list]: Names that matched, names of the module that
        keep their initial value, names of the file that have no place.

    Raises:
        ValueError: No tensor matched, or one has another shape.
    """
    state_dict = select_weights(read_checkpoint(checkpoint, map_location, weights), weights,
                                checkpoint)
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    own = module.state_dict()
    matched = [k for k in own if k in found]
    new = [k for k in own if k not in found]
    unused = [k for k in found if k not in own]
    if not matched:
        raise ValueError(
            f'No tensor of {checkpoint} below the prefix {prefix!r} fits {type(module).__name__}: '
            f'the file has keys like {", ".join(list(state_dict)[:3])}; '
            f'the network wants keys like {prefix}{next(iter(own))}.')
    for key in matched:
        shape, wanted = tuple(found[key].shape), tuple(own[key].shape)
        if shape == wanted:
            continue
        channels_only = (key.endswith('patch_embed.projection.weight') and len(shape) == 4
                         and shape[:1] + shape[2:] == wanted[:1] + wanted[2:])
        if not (channels_only and adapt_input_conv):
            hint = ('is it another architecture, patch size or class count?' if not channels_only
                    else f'adapt_input_conv=True in init_cfg makes {wanted[1]} channels of '
                    f'{shape[1]}.')
            raise ValueError(f'{checkpoint} does not fit {type(module).__name__}: {prefix}{key} '
                             f'has shape {shape}, but {wanted} is needed; {hint}')
        found[key] = adapted(found[key], wanted[1])
        print_log(f'{prefix}{key} of {checkpoint} is adapted from {shape[1]} to {wanted[1]} '
                  'channels.', logger='current')
    module.load_state_dict(found, strict=False)
    which = f'{weights} weights' if weights else 'weights'
    print_log(f'Loaded {len(matched)} of {len(own)} tensors of {type(module).__name__} '
              f'from the {which} of {checkpoint}. New, at their initial value: '
              f'{", ".join(new) or "none"}. In the file, without a place: '
              f'{", ".join(unused) or "none"}.', logger='current')
    return matched, new, unused


def load_all(model, checkpoint, **kwargs):
    """Load a whole model, as is needed before it predicts anything.

    Args:
        model (nn.Module): The network, or a wrapper with the network as ``module``.
        checkpoint (str): See :func:`read_checkpoint`.
        **kwargs: ``prefix`` and others of :func:`load_pretrained`.

    Raises:
        ValueError: A tensor is missing or has another shape. The weights of QK-norm
            may be missing; they do nothing at their initial value.
    """
    while hasattr(model, 'module'):     # of DistributedDataParallel and of test-time augmentation
        model = model.module
    _, new, _ = load_pretrained(model, checkpoint, **kwargs)
    new = [name for name in new if '.q_norm.' not in name and '.k_norm.' not in name]
    if new:
        raise ValueError(f'{checkpoint} lacks what the config has, and what was never trained '
                         f'cannot predict: {", ".join(new)}.')
