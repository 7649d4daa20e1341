"""Merge ``--cfg-options`` into a config and reject options without effect.

Replaces ``Config.merge_from_dict``, which sets keys that nothing reads.
"""
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.utils import import_modules_from_strings

from nepa_mm.apis.config_keys import (
    DEFAULT_HOOKS,
    accepted_keys,
    find_classes,
    look_up,
    registries,
    runner_keys,
    type_at,
)
from nepa_mm.apis.key_suggestions import nearest_paths, repair_path, similarity, value_paths
from nepa_mm.utils.nested import exists, get_path, paths
from nepa_mm.utils.text import joined


def merge_options(cfg: Config, options: Mapping[str, Any], reads: Iterable[str] | None = None,
                  unread: Mapping[str, str] | None = None) -> None:
    """Merge ``--cfg-options`` into a config; reject options that would have no effect.

    Args:
        cfg (Config): Changed in place, after all options were checked.
        options (dict): Values by dotted key: names in dicts, indices in lists. A dict is merged
            into the existing one, unless it holds ``_delete_=True``; any other value replaces the
            existing one.
        reads (Iterable[str], optional): Top-level keys that the tool reads. Defaults to None: the
            keys that a Runner reads.
        unread (dict[str, str], optional): Keys that the tool ignores, including everything below
            them; the value says what to do instead. Defaults to None.

    Raises:
        ValueError: Nothing reads a key, or its parent does not exist. The message names the nearest
            key that is read.
    """
    if not options:
        return
    before, after = cfg, copy(cfg)
    options = {tuple(key.split('.')): value for key, value in options.items()}
    for names in options:
        for key, instead in (unread or {}).items():
            if names[:key.count('.') + 1] == tuple(key.split('.')):
                raise ValueError(f'{".".join(names)} has no effect here: {instead}.')
    # outer keys before inner ones, and `_delete_` before its neighbours
    for names in sorted(options, key=lambda names: len(names) - 1.5 * (names[-1] == '_delete_')):
        after[names[0]] = _put(after._cfg_dict, names, options[names])[names[0]]
    if ('custom_imports',) in {names[:1] for names in options}:     # fromfile imported the file's
        try:
            import_modules_from_strings(**after.custom_imports)
        except ImportError as error:
            raise ValueError(f'custom_imports: {error}.') from error
    of_runner = runner_keys(after)
    reads = set(reads or of_runner)
    for names in options:
        if names[0] in of_runner - reads:
            raise ValueError(f'this tool does not read {names[0]}, got {".".join(names)}; it reads '
                             f'{", ".join(sorted(reads))}.')
        if names[0] not in reads:
            raise ValueError(_not_read(before, after, names, reads))
        _check(before, after, names, reads)
    for names in options:
        cfg[names[0]] = after[names[0]]


def _put(node, names, value, path=()):
    """Return a copy of a dict or list with the value set at a relative path."""
    name, *below = names
    here = '.'.join(path)
    if name == '_delete_' and not below:
        if not path or not isinstance(value, bool):
            raise ValueError('KEY._delete_=True empties the dict at KEY before others fill it, got '
                             f'{".".join((*path, name))}={value!r}.')
        return ConfigDict() if value else node
    if isinstance(node, (list, tuple)):
        if not name.isdigit() or int(name) >= len(node):
            raise ValueError(
                f'{here} is a {type(node).__name__} of {len(node)}, which has no {name!r}; '
                + (f'use an index from 0 to {len(node) - 1}' if node else f'set {here} itself')
                + f', got {here}.{".".join(names)}.')
        children = list(node)
        name = int(name)
        old = children[name]
    elif isinstance(node, dict):
        if name.isdigit() and name not in node:
            raise ValueError(f'{here} is a dict, which has names, not indices, got '
                             f'{here}.{".".join(names)}; its keys are {", ".join(node)}.')
        children, old = node.copy(), node.get(name, ConfigDict())
    else:
        raise ValueError(f'{here} is {node!r}, which has nothing below it, got '
                         f'{here}.{".".join(names)}; set {here} itself.')
    if below:
        children[name] = _put(old, below, value, (*path, names[0]))
    else:
        children[name] = _merge(old, value)
    return type(node)(children) if isinstance(node, (list, tuple)) else children


def _merge(old, new):
    """Merge a dict into an existing dict; replace anything else."""
    if not isinstance(new, dict):
        return ConfigDict(value=new)['value']   # converts dicts in lists, too
    new = dict(new)
    if new.pop('_delete_', False) or not isinstance(old, dict):
        old = ConfigDict()
    return ConfigDict({**old, **{key: _merge(old.get(key), value) for key, value in new.items()}})


def _check(before, after, names, reads):
    """Reject a key that its reader does not accept; keys of the file are assumed to be read."""
    for depth in range(1, len(names)):
        path, name = names[:depth], names[depth]
        if name == '_delete_' or not isinstance(get_path(after, path), dict):
            continue
        same_reader = exists(before, path) and type_at(before, path) == type_at(after, path)
        if name == 'type' and not same_reader:
            _check_type(before, after, path)
        if same_reader and exists(before, (*path, name)):
            continue
        keys = accepted_keys(after, path)
        if path == ('default_hooks',):
            _check_hook(before, after, name)
        elif keys is not None and name not in keys:
            meant = repair_path(after, names, reads)
            raise ValueError(_nothing_reads(names, [meant]) if meant else _nothing_reads(
                (*path, name), nearest_paths(after, (*path, name), reads)))
    value = get_path(after, names) if exists(after, names) else None
    old = get_path(before, names) if exists(before, names) else None
    if isinstance(value, str) and isinstance(old, (bool, int, float)):
        what = 'True or False' if isinstance(old, bool) else 'a number'
        raise ValueError(f'{".".join(names)} must be {what} (the file has {old}), got {value!r}.')
    for path in paths(value, names):
        if len(path) == len(names) + 1:
            _check(before, after, path, reads)


def _check_hook(before, after, name):
    """Reject a new hook without a type."""
    hook = after.default_hooks[name]
    if not (hook is None and name in DEFAULT_HOOKS or isinstance(hook, dict) and hook.get('type')):
        known = [key for key in {*DEFAULT_HOOKS, *before.get('default_hooks', ())} if key != name]
        raise ValueError(
            f'default_hooks.{name} needs a type; the nearest key that is read is '
            f'default_hooks.{max(known, key=lambda key: similarity(name, key))}, or else set '
            f'default_hooks.{name}.type.')


def _check_type(before, after, path):
    """Reject a new ``type`` that does not exist or does not accept the file's arguments."""
    node, place = get_path(after, path), '.'.join(path)
    if exists(before, path) and find_classes(before, get_path(before, path), type_at(before, path)):
        if not find_classes(after, node):
            known = {name for registry in registries(after, node)
                     if look_up(registry, type_at(before, path)) is not None
                     for name in [*registry.module_dict, *registry.parent.module_dict]}
            raise ValueError(f'there is no {node.type!r} for {place}.type; the nearest is '
                             f'{max(known, key=lambda name: similarity(node.type, name))}.')
    keys = accepted_keys(after, path)
    wrong = [key for key in node if keys is not None and key not in keys
             and exists(before, (*path, key))]
    if wrong:
        raise ValueError(f'{place}.type={node.type} does not accept {", ".join(wrong)} of the '
                         f'file; empty it first with {place}._delete_=True.')


def _not_read(before, after, names, reads):
    """Return the message for a path whose top-level key nothing reads."""
    if names[0] not in before:
        return _nothing_reads(names, nearest_paths(after, names, reads))
    found = [(*path, *names[1:]) for path in value_paths(before, names[0], reads)]
    return (f'{names[0]} is read by the config file only, before options are merged; use '
            f'{_dotted(found or nearest_paths(after, names, reads, repair=False))}.')


def _nothing_reads(names, instead):
    """Return the message for a path that nothing reads, and the paths to use instead."""
    return (f'nothing reads {".".join(names)}; the nearest key{"s" * (len(instead) > 1)} that '
            f'{"are" if len(instead) > 1 else "is"} read: {_dotted(instead)}.')


def _dotted(found):
    return joined(map('.'.join, found), most=6)
