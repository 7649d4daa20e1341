"""Weights of a checkpoint into a network: which set, what fits, and what is new."""
import logging
from inspect import signature

from mmengine.logging import print_log

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.recorded import recorded_model

# Parts of a backbone that every task reads; norms at its output are a task's own.
INNER = ('patch_embed', 'cls_token', 'register_tokens', 'pos_embed', 'layers')
WEIGHTS = (None, 'ema', 'raw')


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


def load_strict(model, checkpoint, **kwargs):
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
