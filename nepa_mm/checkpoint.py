"""Reading weights of any origin, writing them whole, and starting a network from them."""
import fcntl
import json
import logging
import os
import re
import zipfile
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine import dist
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
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

from .convert import from_published
from .convert_config import recorded_model
from .hub import download
from .safe_load import safe_load

# Parts of a backbone that every task reads; norms at its output are a task's own.
INNER = ('patch_embed', 'cls_token', 'register_tokens', 'pos_embed', 'layers')
WEIGHTS = (None, 'ema', 'raw')
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
    - Of the files that ``runtime_info`` names WholeCheckpointHook removes its own alone.

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


def find_whole_checkpoint(work_dir, needed=('optimizer', 'message_hub')):
    """The checkpoint of a run that is furthest along of those that are whole.

    How far one is it says itself, in its meta, for times and names of files change when they
    are copied. Whole are its checksums, what can be read, and what a resume needs.

    Args:
        work_dir (str): Folder with the files of the checkpoint hook. A file of another name
            counts if ``last_checkpoint`` names it.
        needed (tuple[str]): Entries that a resume needs beside ``state_dict``. Defaults to
            ('optimizer', 'message_hub').

    Returns:
        tuple[str | None, list[str]]: The file, None if there is none; what is wrong with
        each that may be further along, a sentence each.
    """
    work_dir, progress, problems = Path(work_dir), {}, []
    names = {file.name for pattern in ('epoch_*.pth', 'iter_*.pth', 'interrupted.pth')
             for file in work_dir.glob(pattern)}
    pointer = work_dir / 'last_checkpoint'
    if pointer.is_file():
        with suppress(OSError):
            names.add(Path(pointer.read_text(errors='replace').strip('\0 \n')).name)
    for file in sorted(work_dir / name for name in names if name):
        if not os.path.lexists(file):
            continue
        try:
            progress[file] = _progress(file)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    for file in sorted(progress, key=progress.get, reverse=True):
        try:
            checkpoint = read_checkpoint(file)      # which looks at checksums
            lacking = [key for key in needed if key not in checkpoint]
            if lacking:
                raise ValueError(f'{file} has no {" and no ".join(lacking)}.')
            return str(file), problems
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return None, problems


def _progress(file):
    """How far a checkpoint is: samples seen (or iterations), epochs, whether it was validated."""
    if not file.is_file():
        raise ValueError(f'{file} is no file.')
    if not zipfile.is_zipfile(file):
        raise ValueError(f'{file} is torn.')
    meta = read_checkpoint(file, 'meta')['meta']        # tensors stay on the disk
    run = meta.get('run')
    seen = run.get('seen') if isinstance(run, dict) else None
    found = [meta.get('iter') if seen is None else seen, meta.get('epoch')]
    if not all(type(number) is int for number in found):
        raise ValueError(f'{file} does not say how far the run was.')
    return *found, bool(meta.get('validating'))


@contextmanager
def written_whole(path, overwrite=False):
    """Write a file so that it is either complete or not there.

    What was left of it by a process that was killed meanwhile is removed.

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
    remove_leftovers(path)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    lock = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):     # no locks here
            fcntl.flock(lock, fcntl.LOCK_EX)
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
        os.close(lock)
        temporary.unlink(missing_ok=True)


def remove_leftovers(path):
    """Remove temporary files of :func:`written_whole` that no living process of any machine holds.

    Args:
        path (Path): What was to be written; its name may be a pattern.
    """
    for file in path.parent.glob(f'.{path.stem}.*{path.suffix}'):
        if re.fullmatch(r'\..*\.\d+', file.name.removesuffix(path.suffix)) and file.is_file():
            with suppress(OSError), open(file, 'rb') as opened:     # locked, or no locks here
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()


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


def weights_of(checkpoint, asked=None):
    """Which set :func:`select_weights` takes, 'ema' or 'raw'; ``asked`` is its ``weights``."""
    if asked:
        return asked
    recorded = checkpoint.get('meta', {}).get('weights', {})
    return recorded.get('state_dict', 'ema' if 'ema_state_dict' in checkpoint else 'raw')


def add_weights_argument(parser):
    """Give a tool the flag by which every tool lets one choose the set of weights."""
    parser.add_argument(
        '--weights', choices=[name for name in WEIGHTS if name],
        help='the average or the raw weights; default: the average if the file has one (of a '
        'published folder model.safetensors, which transformers reads, too)')


def unwrapped(model):
    """The network within DistributedDataParallel and test-time augmentation."""
    while hasattr(model, 'module'):
        model = model.module
    return model


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
            adapted, by timm's function of that name. Defaults to False: it is
            refused.

    Returns:
        tuple[list, list, list]: Names that matched, names of the module that
        keep their initial value, names of the file that have no place.

    Raises:
        ValueError: No tensor matched, or the file holds another network, see
            :func:`check_network`.
    """
    return _fill(module, checkpoint, prefix, weights, map_location, adapt_input_conv)[0]


def _fill(module, checkpoint, prefix='', weights=None, map_location='cpu',
          adapt_input_conv=False):
    """What :func:`load_pretrained` returns, which set of weights was taken, and the meta."""
    read = read_checkpoint(checkpoint, map_location, weights)
    state_dict, which = select_weights(read, weights, checkpoint), weights_of(read, weights)
    own, found = module.state_dict(), below(state_dict, prefix)
    matched = [key for key in own if key in found]
    new = [key for key in own if key not in found]
    unused = [key for key in found if key not in own]
    if not matched:
        raise ValueError(
            f'No tensor of {checkpoint} below the prefix {prefix!r} fits {type(module).__name__}: '
            f'the file has keys like {", ".join(list(state_dict)[:3])}; '
            f'the network wants keys like {prefix}{next(iter(own))}.')
    if adapt_input_conv:
        found = adapted(own, found, checkpoint)
    check_network(own, found, checkpoint)
    warn_of_other_function(module, read['meta'], checkpoint)
    module.load_state_dict(found, strict=False)
    print_log(f'Loaded {len(matched)} of {len(own)} tensors of {type(module).__name__} '
              f'from the {which} weights of {checkpoint}. New, at their initial value: '
              f'{", ".join(new) or "none"}. In the file, without a place: '
              f'{", ".join(unused) or "none"}.', logger='current')
    return (matched, new, unused), which, read['meta']


def below(state_dict, prefix):
    """The tensors of a module, by their names within it."""
    prefix = prefix and prefix.rstrip('.') + '.'
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()
            if name.startswith(prefix)}


def adapted(own, found, name):
    """The tensors of a checkpoint, with a patch embedding for the channels of the network.

    By timm's rule the kernels of three channels are summed for one: a grey image gives what its
    three equal channels gave. For more they are repeated in order, cut off and scaled.

    Raises:
        ValueError: The weights are for other than three channels.
    """
    from timm.models import adapt_input_conv  # which takes a second to import
    found = dict(found)
    for key in own.keys() & found.keys():
        if differs_in_channels(key, own, found):
            print_log(f'{key} of {name} is adapted from {found[key].shape[1]} to '
                      f'{own[key].shape[1]} channels.', logger='current')
            if found[key].shape[1] != 3:
                raise ValueError(f'{name} has weights for {found[key].shape[1]} channels; '
                                 'adapt_input_conv adapts those for 3.')
            found[key] = adapt_input_conv(own[key].shape[1], found[key])
    return found


def differs_in_channels(key, own, found):
    """Whether a kernel of the patch embedding has another shape for its channels alone."""
    (out, channels, *size), (own_out, own_channels, *own_size) = (
        [*tensors[key].shape, 0, 0][:4] for tensors in (found, own))
    return (key.endswith('patch_embed.projection.weight') and channels != own_channels
            and (out, size) == (own_out, own_size))


def check_network(own, found, name):
    """Refuse tensors of another network.

    Norms at the output may be new or go unused, for each task reads another output. So may
    QK-norm where it does nothing: new weights start at one, unused ones must be one.

    Args:
        own (dict[str, Tensor]): Of the module.
        found (dict[str, Tensor]): Of the checkpoint, under the same names.
        name (str): What error messages call the checkpoint.

    Raises:
        ValueError: A tensor has another shape; one of a block, or of what precedes the blocks, is
            missing or has no place.
    """
    for key in own.keys() & found.keys():
        if own[key].shape != found[key].shape:
            hint = 'is it another architecture, patch size or class count?'
            if differs_in_channels(key, own, found):
                hint = 'adapt_input_conv=True in init_cfg adapts weights for 3 channels.'
            raise ValueError(f'{name} does not fit: {key} has shape {tuple(found[key].shape)}, '
                             f'but {tuple(own[key].shape)} is needed; {hint}')

    def inner(key):
        return key.removeprefix('backbone.').split('.')[0] in INNER

    def is_qk_norm(key):
        return '.q_norm.' in key or '.k_norm.' in key

    missing = [key for key in own if key not in found and inner(key) and not is_qk_norm(key)]
    unused = [key for key in found if key not in own and inner(key) and not (
        is_qk_norm(key) and (found[key] == key.endswith('weight')).all())]
    if missing or unused:
        raise ValueError(f'{name} holds another network: ' + '; '.join(
            f'{what} {", ".join(keys[:3])}' + f' and {len(keys) - 3} more' * (len(keys) > 3)
            for what, keys in (('it lacks', missing), ('there is no place for', unused)) if keys)
            + '.')


def warn_of_other_function(model, meta, name):
    """Warn if a backbone computes something else with the tensors than what they were trained for.

    Args:
        model (nn.Module): A NEPAViT, or a model with one as ``backbone``; others are not looked at.
        meta (dict): Of the checkpoint.
        name (str): What the warning calls the checkpoint.
    """
    backbone = getattr(model, 'backbone', model)
    function = getattr(backbone, 'function', {})
    recorded = (recorded_model(meta, name) or {}).get('backbone', {}) if function else {}
    defaults = signature(type(backbone)).parameters
    for key, value in function.items():
        trained = recorded.get(key, defaults[key].default)
        if recorded.get('type') == type(backbone).__name__ and trained != value:
            print_log(f'{name} was trained with {key}={trained}, and {key} is {value} here.',
                      logger='current', level=logging.WARNING)


def load_all(model, checkpoint, **kwargs):
    """Load a whole model, as is needed before it predicts anything.

    Args:
        model (nn.Module): The network, or a wrapper, see :func:`unwrapped`.
        checkpoint (str): See :func:`read_checkpoint`.
        **kwargs: ``prefix``, ``weights`` and others of :func:`load_pretrained`.

    Returns:
        tuple[str, dict]: 'ema' or 'raw', the set of weights that was taken, and the file's meta.

    Raises:
        ValueError: A tensor is missing or has another shape. The weights of QK-norm
            may be missing; they do nothing at their initial value.
    """
    (_, new, _), which, meta = _fill(unwrapped(model), checkpoint, **kwargs)
    new = [name for name in new if '.q_norm.' not in name and '.k_norm.' not in name]
    if new:
        raise ValueError(f'{checkpoint} lacks what the config has, and what was never trained '
                         f'cannot predict: {", ".join(new)}.')
    return which, meta
