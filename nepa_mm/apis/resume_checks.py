"""What a checkpoint to resume must have in common with the run that goes on from it."""
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.optim import OptimWrapper
from torch.optim import Adam, AdamW

from nepa_mm.checkpoints.loading import check_network, select_weights, unwrapped
from nepa_mm.checkpoints.recorded import recorded_values

# Options that change how a model computes, not what, and those that tools fill in.
SAME_FUNCTION = ('init_cfg', 'with_cp', 'compile_blocks', 'bf16_residual', 'extensions',
                 'with_label')
# Parts of two configs that are compared before one goes on from the other's checkpoint.
COMPARED = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg',
            'custom_hooks')
# Of torch.optim: whose state has other shapes than the parameters', and what is one number.
OTHER_SHAPES, NUMBERS = ('Adafactor', 'LBFGS'), ('step', 'mu_product', 'eta', 'mu')


def differences_of_configs(meta, cfg):
    """Where the config of a run differs from that of a checkpoint.

    Args:
        meta (dict): Of the checkpoint; without a config it differs nowhere.
        cfg (Config): Of the run.

    Returns:
        tuple[dict, dict]: {dotted path: (old value, new value)} of everything that is compared, and
        of that what makes it another experiment: model and training data.
    """
    old, new = map(recorded_values, (str(meta.get('config_text', '')), cfg.pretty_text))
    found = {}
    for key in COMPARED if old else ():
        found |= differences(old.get(key), new.get(key), key)
    found = {path: pair for path, pair in found.items()
             if not set(SAME_FUNCTION) & set(path.split('.'))}
    return found, {path: pair for path, pair in found.items()
                   if path.startswith(('model.', 'train_dataloader.dataset.'))}


def differences(old, new, path=''):
    """Where two nested configs differ: {dotted path: (old value, new value)}."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in {**old, **new}:
            found |= differences(old.get(key), new.get(key), f'{path}.{key}'.lstrip('.'))
        return found
    if (isinstance(old, (list, tuple)) and isinstance(new, (list, tuple))
            and len(old) == len(new)):
        found = {}
        for i, pair in enumerate(zip(old, new)):
            found |= differences(*pair, f'{path}.{i}')
        return found
    same = old == new or {str(old), str(new)} <= {'BN', 'SyncBN'}
    return {} if same else {path: (old, new)}


def in_words(found):
    """The first few of :func:`differences`."""
    return '; '.join(f'{path} is {str(new)[:60]} and was {str(old)[:60]}'
                     for path, (old, new) in list(found.items())[:4])


def check_state(runner, checkpoint, source):
    """Refuse a state that does not fit the run: its place, weights, average and optimizer.

    Where the run has no EMA hook, the raw weights take the place of the average.

    Args:
        runner (Runner): About to take the state.
        checkpoint (dict): The state; its weights may be replaced.
        source (str): What sentences call it.

    Returns:
        list[str]: Sentences about what is odd.

    Raises:
        ValueError: The sentence names what does not fit.
    """
    meta, odd = checkpoint['meta'], []
    numbers = [meta.get('epoch'), meta.get('iter'), *_values_of(meta.get('run', {}))]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f'{source} does not say where the run was: epoch, iter and run are '
                         f'{", ".join(map(repr, numbers))}, and must be integers from 0.'[:300])
    model = unwrapped(runner.model)
    sets = dict(weights=select_weights(checkpoint, 'raw', source))
    if 'ema_state_dict' in checkpoint:
        sets['average'] = checkpoint['state_dict']
        if not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            checkpoint['state_dict'] = sets['weights']
            odd.append(f'{source} holds an average of the weights, which this run has not: it '
                       'goes on from the raw weights, without an EMA hook.')
    for what, state in sets.items():
        _check_weights(model.state_dict(), state, f'the {what} of {source}')
    if 'optimizer' in checkpoint:
        if isinstance(runner.optim_wrapper, OptimWrapper):
            _check_optimizer(runner.optim_wrapper.optimizer, model, checkpoint['optimizer'], source)
    elif all(hook.save_optimizer for hook in runner.hooks if isinstance(hook, CheckpointHook)):
        raise ValueError(f'{source} holds no state of the optimizer, so the run cannot go on from '
                         f'it; load_from={source} starts a run from its weights.')
    else:
        odd.append(f'{source} holds no state of the optimizer, which starts anew.')
    return odd


def _values_of(run):
    return list(run.values()) if isinstance(run, dict) else [run]


def _check_weights(own, found, name):
    """Refuse a state dict with other names or shapes than the model's."""
    check_network(own, found, name)
    missing, unused = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    for what, names in (('lack', missing), ('have no place for', unused)):
        if names:
            raise ValueError(f'{name[0].upper()}{name[1:]} {what} {", ".join(names[:3])}'
                             + f' and {len(names) - 3} more' * (len(names) > 3)
                             + '; another network cannot go on from them.')


def _check_optimizer(optimizer, model, state, source):
    """Refuse a state dict of an optimizer with other groups or tensors."""
    groups, states = state.get('param_groups'), state.get('state')
    if not (isinstance(groups, list) and isinstance(states, dict)
            and all(isinstance(group, dict) and isinstance(group.get('params'), list)
                    for group in groups)):
        raise ValueError(f'{source} is damaged: its optimizer holds no groups of parameters.')
    sizes, own = ([len(group['params']) for group in each]
                  for each in (groups, optimizer.param_groups))
    if sizes != own:
        raise ValueError(f'The optimizer of {source} has groups of {sizes} tensors, and that of '
                         f'this run of {own}: is it another network, or another paramwise_cfg?')
    kind = type(optimizer)
    if not kind.__module__.startswith('torch.optim') or kind.__name__ in OTHER_SHAPES:
        return
    names = {id(param): name for name, param in model.named_parameters()}
    needed = {'step', 'exp_avg', 'exp_avg_sq'} if isinstance(optimizer, (Adam, AdamW)) else set()
    for group, saved in zip(optimizer.param_groups, groups):
        for param, number in zip(group['params'], saved['params']):
            name, entry = names[id(param)], states.get(number) or {}
            if not isinstance(entry, dict) or entry and not needed <= entry.keys():
                raise ValueError(f'{source} is damaged: its optimizer lacks {sorted(needed)} of '
                                 f'{name}.')
            for key, value in entry.items():
                shape = tuple(getattr(value, 'shape', ()))
                if value is not None and shape != (() if key in NUMBERS else param.shape):
                    raise ValueError(f'The optimizer of {source} does not fit: {key} of {name} has '
                                     f'shape {shape}, and the parameter {tuple(param.shape)}.')
