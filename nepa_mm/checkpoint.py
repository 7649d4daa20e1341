"""Starting a network from the weights of another run."""
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader, get_torch_safe_globals
from safetensors.torch import load_file

WEIGHTS = (None, 'ema', 'raw')


def read_checkpoint(path, map_location='cpu'):
    """Read a checkpoint without executing anything that it contains.

    Args:
        path (str): A ``.safetensors`` file, a ``.pth`` file (read with
            ``weights_only=True``; mmengine's own log records are allowed), or an
            address that mmengine's ``CheckpointLoader`` knows.
        map_location (str): Device of the tensors. Defaults to 'cpu'.

    Returns:
        dict: A checkpoint with at least the key ``state_dict``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is torn, or is no checkpoint.
    """
    if '://' in str(path):
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location)
    elif not Path(path).expanduser().is_file():
        raise FileNotFoundError(f'The checkpoint {path} does not exist.')
    else:
        file = Path(path).expanduser()
        try:
            if file.suffix == '.safetensors':
                checkpoint = load_file(file, device=map_location)
            else:
                with torch.serialization.safe_globals(get_torch_safe_globals()):
                    checkpoint = torch.load(file, map_location, weights_only=True)
        except Exception as error:      # torch, pickle, zip and safetensors each raise their own
            reason = str(error).strip().split('\n')[0]
            raise ValueError(
                f'{path} is no checkpoint that can be read safely: {reason}') from error
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    tensors = checkpoint['state_dict'] if isinstance(checkpoint, dict) else None
    if not (isinstance(tensors, dict) and tensors
            and all(isinstance(t, torch.Tensor) for t in tensors.values())):
        raise ValueError(f'{path} holds no state dict of tensors.')
    return checkpoint


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
    if weights == 'ema' and raw is None:
        raise ValueError(f"{name} was saved without an average: weights='ema' is not in it, "
                         "use weights='raw' or leave it out.")
    if weights == 'raw' and raw is not None:
        return {key.removeprefix('module.'): value for key, value in raw.items() if key != 'steps'}
    return checkpoint['state_dict']


def load_pretrained(module, checkpoint, prefix='', weights=None, map_location='cpu'):
    """Load what fits from a checkpoint, and say in the log what did and what did not.

    Args:
        module (nn.Module): The network to fill.
        checkpoint (str): See :func:`read_checkpoint`.
        prefix (str): Only the keys below it are read, e.g. 'backbone.'. Defaults
            to ''.
        weights (str, optional): See :func:`select_weights`. Defaults to None.
        map_location (str): Device of the tensors. Defaults to 'cpu'.

    Returns:
        tuple[list, list, list]: Names that matched, names of the module that
        keep their initial value, names of the file that have no place.

    Raises:
        ValueError: No tensor matched, or one has another shape.
    """
    state_dict = select_weights(read_checkpoint(checkpoint, map_location), weights, checkpoint)
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
        if own[key].shape != found[key].shape:
            raise ValueError(f'{checkpoint} does not fit {type(module).__name__}: {prefix}{key} '
                             f'has shape {tuple(found[key].shape)}, but {tuple(own[key].shape)} is '
                             'needed; is it another architecture, patch size or class count?')
    module.load_state_dict(found, strict=False)
    which = f'{weights} weights' if weights else 'weights'
    print_log(f'Loaded {len(matched)} of {len(own)} tensors of {type(module).__name__} '
              f'from the {which} of {checkpoint}. New, at their initial value: '
              f'{", ".join(new) or "none"}. In the file, without a place: '
              f'{", ".join(unused) or "none"}.', logger='current')
    return matched, new, unused
