"""Check that a checkpoint fits the run that resumes from it."""
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch.optim import Adam, AdamW

from nepa_mm.checkpoints.loading import check_network, select_weights, unwrapped
from nepa_mm.checkpoints.recorded_config import recorded_values

# Options that change the implementation but not the numbers, and options that tools fill in.
SAME_FUNCTION = ('init_cfg', 'with_cp', 'compile_blocks', 'extensions', 'with_label')
# Top-level keys that are compared before a run resumes.
COMPARED = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg',
            'custom_hooks')
# In torch.optim: optimizers whose state differs from the parameters in shape, and scalar states.
OTHER_SHAPES, SCALARS = ('Adafactor', 'LBFGS'), ('step', 'mu_product', 'eta', 'mu')


def compare_configs(meta: Mapping, cfg: Config) -> tuple[dict, dict]:
    """Compare the config of a run with that of a checkpoint.

    Args:
        meta (dict): The ``meta`` of the checkpoint; without a config there are no differences.
        cfg (Config): The config of the run.

    Returns:
        tuple[dict, dict]: {dotted path: (old value, new value)} of all differences, and of those in
        the model and the training data, which make it another experiment.
    """
    old, new = map(recorded_values, (str(meta.get('config_text', '')), cfg.pretty_text))
    found = {}
    for key in COMPARED if old else ():
        found |= differences(old.get(key), new.get(key), key)
    found = {path: pair for path, pair in found.items()
             if not set(SAME_FUNCTION) & set(path.split('.'))}
    return found, {path: pair for path, pair in found.items()
                   if path.startswith(('model.', 'train_dataloader.dataset.'))}


def differences(old: Any, new: Any, path: str = '') -> dict[str, tuple]:
    """Return {dotted path: (old value, new value)} of two nested configs."""
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


def describe_differences(found: Mapping[str, tuple]) -> str:
    """Format the first four of :func:`differences`."""
    return '; '.join(f'{path} is {str(new)[:60]} and was {str(old)[:60]}'
                     for path, (old, new) in list(found.items())[:4])


def check_state(runner: Runner, checkpoint: dict, source: str) -> list[str]:
    """Reject a state whose progress, weights, EMA weights or optimizer do not fit the run.

    If the run has no EMA hook, the raw weights replace the EMA weights.

    Args:
        runner (Runner): About to load the state.
        checkpoint (dict): The state; its weights may be replaced.
        source (str): Name of the checkpoint in messages.

    Returns:
        list[str]: Warnings.

    Raises:
        ValueError: The message names what does not fit.
    """
    meta, warnings = checkpoint['meta'], []
    numbers = [meta.get('epoch'), meta.get('iter'), *_values_of(meta.get('run', {}))]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f'{source} has no valid progress of the run: epoch, iter and run are '
                         f'{", ".join(map(repr, numbers))}, and must be integers from 0.'[:300])
    model = unwrapped(runner.model)
    sets = dict(weights=select_weights(checkpoint, 'raw', source))
    if 'ema_state_dict' in checkpoint:
        sets['EMA weights'] = checkpoint['state_dict']
        if not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            checkpoint['state_dict'] = sets['weights']
            warnings.append(f'{source} holds EMA weights, but this run has no EMA hook: it resumes '
                            'from the raw weights.')
    for what, state in sets.items():
        _check_weights(model.state_dict(), state, f'the {what} of {source}')
    if 'optimizer' in checkpoint:
        if isinstance(runner.optim_wrapper, OptimWrapper):
            _check_optimizer(runner.optim_wrapper.optimizer, model, checkpoint['optimizer'], source)
    elif all(hook.save_optimizer for hook in runner.hooks if isinstance(hook, CheckpointHook)):
        raise ValueError(f'{source} holds no optimizer state, so the run cannot resume from it; '
                         f'load_from={source} starts a run from its weights.')
    else:
        warnings.append(f'{source} holds no optimizer state: the optimizer starts anew.')
    return warnings


def _values_of(run):
    return list(run.values()) if isinstance(run, dict) else [run]


def _check_weights(own, found, name):
    """Reject a state dict whose names or shapes differ from the model's."""
    check_network(own, found, name)
    missing, unused = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    for what, names in (('lack', missing), ('have unknown', unused)):
        if names:
            raise ValueError(f'{name[0].upper()}{name[1:]} {what} {", ".join(names[:3])}'
                             + f' and {len(names) - 3} more' * (len(names) > 3)
                             + '; a different network cannot resume from them.')


def _check_optimizer(optimizer, model, state, source):
    """Reject an optimizer state whose groups or shapes differ."""
    groups, states = state.get('param_groups'), state.get('state')
    if not (isinstance(groups, list) and isinstance(states, dict)
            and all(isinstance(group, dict) and isinstance(group.get('params'), list)
                    for group in groups)):
        raise ValueError(f'{source} is corrupt: its optimizer holds no parameter groups.')
    sizes, own = ([len(group['params']) for group in each]
                  for each in (groups, optimizer.param_groups))
    if sizes != own:
        raise ValueError(f'The optimizer of {source} has groups of {sizes} tensors, and this '
                         f'run has {own}: check the network and paramwise_cfg.')
    kind = type(optimizer)
    if not kind.__module__.startswith('torch.optim') or kind.__name__ in OTHER_SHAPES:
        return
    names = {id(param): name for name, param in model.named_parameters()}
    needed = {'step', 'exp_avg', 'exp_avg_sq'} if isinstance(optimizer, (Adam, AdamW)) else set()
    for group, saved in zip(optimizer.param_groups, groups):
        for param, number in zip(group['params'], saved['params']):
            name, entry = names[id(param)], states.get(number) or {}
            if not isinstance(entry, dict) or entry and not needed <= entry.keys():
                raise ValueError(f'{source} is corrupt: its optimizer lacks {sorted(needed)} of '
                                 f'{name}.')
            for key, value in entry.items():
                shape = tuple(getattr(value, 'shape', ()))
                if value is not None and shape != (() if key in SCALARS else param.shape):
                    raise ValueError(f'The optimizer of {source} does not fit: {key} of {name} has '
                                     f'shape {shape}, the parameter {tuple(param.shape)}.')
