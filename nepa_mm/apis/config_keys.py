"""Find the keys of a config that are read.

A config file is Python: many of its names (``base_lr``, ``train_pipeline``) only help to write the
others and are not read again. The sets below are derived from the code that reads a config: the
Runner's parameters, and the signature of the class that a ``type`` names.
"""
import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from mmengine import registry as roots
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import averaged_model
from mmengine.optim import DefaultOptimWrapperConstructor, _ParamScheduler
from mmengine.registry import RUNNERS, DefaultScope, Registry
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin, import_modules_from_strings
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn
from torch.nn.utils import clip_grad
from torch.utils.data import DataLoader

from nepa_mm.checkpoints.loading import load_pretrained
from nepa_mm.utils.nested import get_path

# Types that mmengine assumes for a dict without a `type`.
DEFAULT_TYPES = {
    'optim_wrapper': 'OptimWrapper', 'log_processor': 'LogProcessor', 'visualizer': 'Visualizer',
    'val_cfg': 'ValLoop', 'test_cfg': 'TestLoop', 'model_wrapper_cfg': 'MMDistributedDataParallel'}
# Receivers of **kwargs that are not passed to the next class.
FORWARDS = {CheckpointHook: lambda: [Runner.save_checkpoint],
            EMAHook: lambda: [value for value in vars(averaged_model).values()
                              if inspect.isclass(value) and issubclass(value, nn.Module)]}
DEFAULT_HOOKS = set(re.findall(r'(\w+)=dict\(type=',
                               inspect.getsource(Runner.register_default_hooks)))


def runner_keys(cfg: Config) -> set[str]:
    """Return the top-level keys that a Runner reads.

    Args:
        cfg (Config): The config. The sources of its ``runner_type``, ``custom_imports`` and hooks
            are searched as well.

    Returns:
        set[str]: The keys.
    """
    keys = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
    keys |= {'runner_type', 'custom_imports', 'tta_model', 'tta_pipeline'}
    if (cfg.get('model') or {}).get('data_preprocessor'):
        keys.remove('data_preprocessor')    # the Runner uses the model's
    readers = [Runner, RUNNERS.get(cfg.get('runner_type') or 'Runner')]
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    for hook in hooks:
        if isinstance(hook, dict):
            readers += find_classes(cfg, hook)
    for name in (cfg.get('custom_imports') or {}).get('imports') or []:
        with suppress(ImportError):
            readers.append(import_module(name))
    for reader in readers:
        with suppress(OSError, TypeError):
            keys.update(re.findall(r'\b(?:self|runner)\.cfg(?:\.get\(|\[)\s*[\'"](\w+)',
                                   inspect.getsource(reader)))
    return keys


def type_at(cfg: Config, path: tuple[str, ...]) -> Any:
    """Return the ``type`` of a dict of the config, or the type that its reader assumes."""
    node = get_path(cfg, path)
    if not isinstance(node, dict):
        return None
    if node.get('type'):
        return node.get('type')
    if path == ('train_cfg',) and 'by_epoch' in node:
        return 'EpochBasedTrainLoop' if node['by_epoch'] else 'IterBasedTrainLoop'
    if path[1:] == ('data_preprocessor',) and cfg.model.get('type') == 'ImageClassifier':
        return 'ClsDataPreprocessor'
    return DEFAULT_TYPES.get('.'.join(path))


def find_classes(cfg: Config, node: Mapping, name: Any = None) -> list:
    """Return what the registries hold for ``name``, by default for the ``type`` of a dict."""
    return [found for registry in registries(cfg, node)
            if (found := look_up(registry, name or node.get('type'))) is not None]


def registries(cfg: Config, node: Mapping) -> Iterator[Registry]:
    """Yield every registry as seen from the scope of a dict."""
    scope, modules = cfg.get('default_scope') or 'mmengine', [roots]
    with suppress(ImportError):     # mmpretrain has registries without a parent
        modules.append(import_module(f'{scope}.registry'))
    with DefaultScope.overwrite_default_scope(scope):
        for module in modules:
            for root in vars(module).values():
                if isinstance(root, Registry) and root.parent is None:
                    yield root.children.get(node.get('_scope_') or scope, root)


def look_up(registry: Registry, name: Any) -> Any:
    """Return what a registry holds for a name; None if it is unknown or fails to import."""
    if not isinstance(name, str):
        return name if callable(name) else None
    with suppress(Exception):   # e.g. a dotted name whose module fails to import
        return registry.get(name)


def parameters(receiver: Callable) -> set[str] | None:
    """Return the keywords that a class or a function accepts.

    Args:
        receiver (type | Callable): ``**kwargs`` of a class are followed to the next class if they
            are passed to ``super().__init__`` and not used in any other way.

    Returns:
        set[str] | None: None if more keywords may be accepted.
    """
    steps = {receiver: receiver}
    if inspect.isclass(receiver):
        steps = {c: vars(c)['__init__'] for c in receiver.__mro__[:-1] if '__init__' in vars(c)}
    names = {'name'} if inspect.isclass(receiver) and issubclass(receiver, ManagerMixin) else set()
    for owner, step in steps.items():
        try:
            declared = inspect.signature(step).parameters.values()
        except ValueError:      # a C function
            return None
        names |= {p.name for p in declared if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        rest = [p.name for p in declared if p.kind == p.VAR_KEYWORD]
        if not rest:
            return names - {'self'}
        if owner in FORWARDS:
            return names.union(*map(parameters, FORWARDS[owner]())) - {'self'}
        read = _read_from_kwargs(step, rest[0])
        if read is None:
            return None
        names |= read[0]
        if not read[1]:
            return names - {'self'}
    return None if steps else names


def _read_from_kwargs(function, rest):
    """Find the keys that a function reads from ``**rest``, and whether it passes ``rest`` on.

    Returns:
        tuple[set[str], bool] | None: None if the function uses ``rest`` in another way.
    """
    try:
        tree = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, TypeError, SyntaxError):
        return None
    code = {node: ast.unparse(node) for node in tree if isinstance(node, (ast.expr, ast.Assign))}
    uses = sum(isinstance(node, ast.Name) and node.id == rest for node in tree)
    names, passed_on = set(), 0
    for node in tree:
        if isinstance(node, ast.Assign) and code[node.targets[0]] == rest:
            if not isinstance(node.value, ast.Dict):
                return None
            uses -= 1 + sum(key is None and code[value] == rest
                            for key, value in zip(node.value.keys, node.value.values))
        elif isinstance(node, ast.Call) and re.fullmatch(r'super\(.*\)\.__init__', code[node.func]):
            passed_on += any(k.arg is None and re.match(rf'{rest}$|dict\({rest}, ', code[k.value])
                             for k in node.keywords)
        elif isinstance(node, (ast.Call, ast.Subscript, ast.Compare)):
            start = code[node.func] + '(' if isinstance(node, ast.Call) else code[node]
            if re.match(rf'{rest}(\.(pop|get|setdefault)\(|\[)|\S+ in {rest}$', start):
                literals = re.findall(r"'(\w+)'", code[node])
                if not literals:
                    return None
                names.add(literals[0])
                uses -= 1
    return (names, passed_on > 0) if uses == passed_on else None


def accepted_keys(cfg: Config, path: tuple[str, ...]) -> set[str] | None:
    """Return the keys that are read from a dict of the config.

    Args:
        cfg (Config): The config.
        path (tuple[str]): Path of the dict, at least one name.

    Returns:
        set[str] | None: None if the keys are unknown.
    """
    if path == ('optim_wrapper', 'paramwise_cfg'):
        return _paramwise_keys(cfg)
    fixed = _plain_dict_keys('.'.join(path))
    node = get_path(cfg, path)
    if fixed is not None or not isinstance(node, dict):
        return fixed
    names = {'type', '_scope_'}
    found = find_classes(cfg, node, type_at(cfg, path)) if type_at(cfg, path) else []
    for receiver in found:
        more = parameters(receiver)
        if more is None:
            return None
        names |= more
        if inspect.isclass(receiver) and issubclass(receiver, Hook):
            names.add('priority')
        if inspect.isclass(receiver) and issubclass(receiver, _ParamScheduler):
            names.add('convert_to_iter_based')
    # keys that are removed before the class is built
    if 'magnitude_range' in names:
        names.add('magnitude_key')
    if path[-1] == 'init_cfg':
        names |= {'override', *parameters(load_pretrained)} - {'module'}
    if path[-1].endswith('_cfg'):
        names |= {'requires_grad', 'fallback_on_stride'}
    if path == ('train_cfg',):
        names.add('by_epoch')
    if path == ('optim_wrapper',):
        names |= {'constructor', 'paramwise_cfg'}
        for receiver in find_classes(cfg, node, node.get('constructor') or 'OptimWrapper'):
            if node.get('constructor') and not (inspect.isclass(receiver) and issubclass(
                    receiver, DefaultOptimWrapperConstructor)):
                return None
    return names if found else None


def _paramwise_keys(cfg):
    """Return the keys of our and mmengine's constructors; None for others, which may read more."""
    name = cfg.optim_wrapper.get('constructor') or 'DefaultOptimWrapperConstructor'
    for constructor in find_classes(cfg, cfg.optim_wrapper, name):
        if constructor.__module__.startswith(('nepa_mm.', 'mmengine.')):
            return set(re.findall(r'paramwise_cfg(?:\.get\(|\[)\s*\'(\w+)\'',
                                  inspect.getsource(constructor))) or None
    return None


def _plain_dict_keys(place):
    """Return the keys of a dict that no class is built from, None for other dicts."""
    def found(pattern, function):
        return set(re.findall(pattern + r'\(\s*\'(\w+)', inspect.getsource(function)))

    if re.fullmatch(r'(train|val|test)_dataloader', place):
        return parameters(DataLoader) | found(r'dataloader_cfg\.(?:pop|get)',
                                              Runner.build_dataloader)
    return {
        'randomness': lambda: parameters(Runner.set_randomness) - {'self'},
        'env_cfg': lambda: found(r'env_cfg\.get', Runner.setup_env),
        'env_cfg.mp_cfg': lambda: parameters(set_multi_processing),
        'optim_wrapper.clip_grad': lambda: {'type', *parameters(clip_grad.clip_grad_norm_),
                                            *parameters(clip_grad.clip_grad_value_)},
        'custom_imports': lambda: parameters(import_modules_from_strings),
        'auto_scale_lr': lambda: {'enable', 'base_batch_size'},
    }.get(place, lambda: None)()
