"""Load checkpoint weights into a network: choose the set, check the fit, log what is new."""
import logging
from inspect import signature
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.recorded_config import recorded_model

# Parts of a backbone that every task uses; output norms belong to a task.
INNER = ('patch_embed', 'cls_token', 'register_tokens', 'pos_embed', 'layers')
WEIGHTS = (None, 'ema', 'raw')


def select_weights(checkpoint: dict, weights: str | None = None,
                   name: str = 'the checkpoint') -> dict[str, Tensor]:
    """Return the raw or the EMA weights of a checkpoint.

    A run with an EMA hook saves two sets: ``state_dict`` holds the EMA weights, and
    ``ema_state_dict``, despite its name, the raw weights.

    Args:
        checkpoint (dict): Result of :func:`read_checkpoint`.
        weights (str, optional): 'ema', 'raw', or None for the EMA weights if present, else raw.
            Defaults to None.
        name (str): Name of the checkpoint in error messages. Defaults to 'the checkpoint'.

    Returns:
        dict[str, Tensor]: The chosen state dict.

    Raises:
        ValueError: ``weights`` is unknown, or the file does not have this set.
    """
    if weights not in WEIGHTS:
        raise ValueError(f'weights must be one of {WEIGHTS}, got {weights!r}.')
    raw = checkpoint.get('ema_state_dict')
    first = weights_kind(checkpoint)
    if weights == 'ema' and first != 'ema':
        raise ValueError(f"{name} was saved without EMA weights: weights='ema' is not in it, "
                         "use weights='raw' or leave it out.")
    if weights == 'raw' and raw is not None:
        return {key.removeprefix('module.'): value for key, value in raw.items() if key != 'steps'}
    if weights == 'raw' and first == 'ema':
        raise ValueError(f"{name} holds only EMA weights: weights='raw' is not in it, "
                         "use weights='ema' or leave it out.")
    return checkpoint['state_dict']


def weights_kind(checkpoint: dict, weights: str | None = None) -> str:
    """The set that :func:`select_weights` returns for these arguments: 'ema' or 'raw'."""
    if weights:
        return weights
    recorded = checkpoint.get('meta', {}).get('weights', {})
    return recorded.get('state_dict', 'ema' if 'ema_state_dict' in checkpoint else 'raw')


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers such as DistributedDataParallel and test-time augmentation."""
    while hasattr(model, 'module'):
        model = model.module
    return model


def load_pretrained(
        module: nn.Module, checkpoint: str, prefix: str = '', weights: str | None = None,
        map_location: str = 'cpu',
        adapt_input_conv: bool = False) -> tuple[list[str], list[str], list[str]]:
    """Load the matching tensors of a checkpoint, and log which matched and which did not.

    Args:
        module (nn.Module): The network to fill.
        checkpoint (str): See :func:`read_checkpoint`.
        prefix (str): Load only keys with this prefix, e.g. 'backbone.'. Defaults to ''.
        weights (str, optional): See :func:`select_weights`. Defaults to None.
        map_location (str): Device of the tensors. Defaults to 'cpu'.
        adapt_input_conv (bool): Whether to adapt a patch embedding for another number of channels,
            by timm's function of that name. Defaults to False: raise an error.

    Returns:
        tuple[list, list, list]: Names that matched, names of the module that keep their initial
        value, names of the file that the module does not have.

    Raises:
        ValueError: No tensor matched, or the file holds another network, see
            :func:`check_network`.
    """
    return _load_matching(module, checkpoint, prefix, weights, map_location, adapt_input_conv)[0]


def _load_matching(module, checkpoint, prefix='', weights=None, map_location='cpu',
                   adapt_input_conv=False):
    """Return the result of :func:`load_pretrained`, the set of weights loaded, and the meta."""
    read = read_checkpoint(checkpoint, map_location, weights)
    state_dict, which = select_weights(read, weights, checkpoint), weights_kind(read, weights)
    own, found = module.state_dict(), strip_prefix(state_dict, prefix)
    matched = [key for key in own if key in found]
    new = [key for key in own if key not in found]
    unused = [key for key in found if key not in own]
    if not matched:
        raise ValueError(
            f'No tensor of {checkpoint} below the prefix {prefix!r} fits {type(module).__name__}: '
            f'the file has keys like {", ".join(list(state_dict)[:3])}; '
            f'the network wants keys like {prefix}{next(iter(own))}.')
    if adapt_input_conv:
        found = adapt_input_channels(own, found, checkpoint)
    check_network(own, found, checkpoint)
    warn_if_function_differs(module, read['meta'], checkpoint)
    module.load_state_dict(found, strict=False)
    print_log(f'Loaded {len(matched)} of {len(own)} tensors of {type(module).__name__} '
              f'from the {which} weights of {checkpoint}. New, at their initial value: '
              f'{", ".join(new) or "none"}. Unused in the file: '
              f'{", ".join(unused) or "none"}.', logger='current')
    return (matched, new, unused), which, read['meta']


def strip_prefix(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors of a submodule, under their names within it."""
    prefix = prefix and prefix.rstrip('.') + '.'
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()
            if name.startswith(prefix)}


def adapt_input_channels(own: dict[str, Tensor], found: dict[str, Tensor],
                         name: str) -> dict[str, Tensor]:
    """Adapt the patch embedding of a checkpoint to the network's number of channels.

    timm's rule. One channel: the kernels of three channels are summed, so a grey image yields the
    output of three equal channels. More channels: kernels are repeated in order, cut and scaled.

    Args:
        own (dict[str, Tensor]): Tensors of the module.
        found (dict[str, Tensor]): Tensors of the checkpoint, under the same names.
        name (str): Name of the checkpoint in messages.

    Raises:
        ValueError: The weights are for other than three channels.
    """
    from timm.models import adapt_input_conv  # this import takes a second
    found = dict(found)
    for key in own.keys() & found.keys():
        if _differs_in_channels(key, own, found):
            print_log(f'{key} of {name} is adapted from {found[key].shape[1]} to '
                      f'{own[key].shape[1]} channels.', logger='current')
            if found[key].shape[1] != 3:
                raise ValueError(f'{name} has weights for {found[key].shape[1]} channels; '
                                 'adapt_input_conv adapts those for 3.')
            found[key] = adapt_input_conv(own[key].shape[1], found[key])
    return found


def _differs_in_channels(key, own, found):
    """Whether a key is the patch embedding's kernel and differs only in the number of channels."""
    (out, channels, *size), (own_out, own_channels, *own_size) = (
        [*tensors[key].shape, 0, 0][:4] for tensors in (found, own))
    return (key.endswith('patch_embed.projection.weight') and channels != own_channels
            and (out, size) == (own_out, own_size))


def check_network(own: dict[str, Tensor], found: dict[str, Tensor], name: str) -> None:
    """Reject tensors of another network.

    Output norms may be missing or unused, because each task reads another output. QK-norm may be
    missing or unused where it has no effect: new weights start at one, and unused weights must be
    one, biases zero.

    Args:
        own (dict[str, Tensor]): Tensors of the module.
        found (dict[str, Tensor]): Tensors of the checkpoint, under the same names.
        name (str): Name of the checkpoint in error messages.

    Raises:
        ValueError: A tensor has another shape. Or a tensor of a block, or of a layer before the
            blocks, is missing or unused.
    """
    for key in own.keys() & found.keys():
        if own[key].shape != found[key].shape:
            hint = 'is it another architecture, patch size or class count?'
            if _differs_in_channels(key, own, found):
                hint = 'adapt_input_conv=True in init_cfg adapts weights for 3 channels.'
            raise ValueError(f'{name} does not fit: {key} has shape {tuple(found[key].shape)}, '
                             f'but {tuple(own[key].shape)} is needed; {hint}')

    def inner(key):
        return key.removeprefix('backbone.').split('.')[0] in INNER

    missing = [key for key in own if key not in found and inner(key) and not _is_qk_norm(key)]
    unused = [key for key in found if key not in own and inner(key) and not (
        _is_qk_norm(key) and (found[key] == key.endswith('weight')).all())]
    if missing or unused:
        raise ValueError(f'{name} holds another network: ' + '; '.join(
            f'{what} {", ".join(keys[:3])}' + f' and {len(keys) - 3} more' * (len(keys) > 3)
            for what, keys in (('it lacks', missing), ('it has no use for', unused)) if keys)
            + '.')


def _is_qk_norm(key):
    return '.q_norm.' in key or '.k_norm.' in key


def warn_if_function_differs(model: nn.Module, meta: dict, name: str) -> None:
    """Warn if the recorded backbone computes another function of the same tensors.

    Args:
        model (nn.Module): A NEPAViT, or a model with one as ``backbone``; others are ignored.
        meta (dict): Meta of the checkpoint.
        name (str): Name of the checkpoint in the warning.
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


def load_strict(model: nn.Module, checkpoint: str, **kwargs: Any) -> tuple[str, dict]:
    """Load all weights of a model, before it predicts.

    Args:
        model (nn.Module): The network, or a wrapper, see :func:`unwrapped`.
        checkpoint (str): See :func:`read_checkpoint`.
        **kwargs: ``prefix``, ``weights`` and others of :func:`load_pretrained`.

    Returns:
        tuple[str, dict]: The set of weights, 'ema' or 'raw', and the meta of the file.

    Raises:
        ValueError: A tensor is missing or has another shape. QK-norm may be missing, because it
            has no effect at its initial value.
    """
    (_, new, _), which, meta = _load_matching(unwrapped(model), checkpoint, **kwargs)
    new = [name for name in new if not _is_qk_norm(name)]
    if new:
        raise ValueError(f'{checkpoint} lacks tensors that the config has, and untrained weights '
                         f'cannot predict: {", ".join(new)}.')
    return which, meta
