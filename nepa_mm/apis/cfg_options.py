"""``--cfg-options KEY=VALUE ...``: changes to a config, all of which have an effect.

Takes the place of mmengine's DictAction, which drops blanks and leaves a list of dicts as text,
and of ``Config.merge_from_dict``, which sets what nothing reads.
"""
import argparse
import ast
import warnings
from copy import copy

from mmengine.config import ConfigDict
from mmengine.utils import import_modules_from_strings

from nepa_mm.apis.config_keys import (
    DEFAULT_HOOKS,
    accepted,
    classes,
    kind,
    look_up,
    registries,
    runner_keys,
)
from nepa_mm.apis.nearest_keys import likeness, nearest, places, repaired
from nepa_mm.utils.nested import at, exists, paths

HELP = (
    'override settings of the config, e.g. train_dataloader.batch_size=64 or '
    'custom_hooks.0.momentum=0.01; a VALUE is a Python literal ("[1, 2]", "(0.9, 0.95)", '
    '"dict(type=\'X\')", None, True, 1e-3, "\'12\'" for text that looks like a number), or a,b,c '
    'for a list, or else text; KEY= is empty text, a dict is merged into the one that is there, '
    'KEY._delete_=True empties that one first; in the shell, quote what holds blanks or brackets')


def add_cfg_options(parser):
    """Give a tool the flag ``--cfg-options``.

    Args:
        parser (ArgumentParser): Afterwards its ``cfg_options`` is a dict, or None.
    """
    parser.add_argument(
        '--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE', help=HELP)


class CfgOptions(argparse.Action):
    """Collect ``KEY=VALUE`` in a dict; the flag may be given several times."""

    def __call__(self, parser, namespace, values, option_string=None):
        options = dict(getattr(namespace, self.dest) or {})
        for item in values:
            key, equals, text = item.partition('=')
            if not equals:
                raise argparse.ArgumentError(
                    self, f'{item!r} is not KEY=VALUE; quote a value with blanks, and put other '
                    'arguments before this flag.')
            if not all(name and name == name.strip() for name in key.split('.')):
                raise argparse.ArgumentError(
                    self, f'{item!r} has no proper key: KEY is names with dots between them, and '
                    'no blanks around =.')
            try:
                value = parse_value(text)
            except ValueError as error:
                raise argparse.ArgumentError(self, f'{key}: {error}') from error
            if key in options and repr(options[key]) != repr(value):
                raise argparse.ArgumentError(
                    self, f'{key} is given twice, as {options[key]!r} and as {value!r}; keep one.')
            options[key] = value
        setattr(namespace, self.dest, options)


def parse_value(text):
    """The value that a text on the command line stands for.

    Args:
        text (str): A Python literal, in which ``dict(...)`` may stand for ``{...}``; or elements
            with commas between them, in brackets or without, for a list (in parentheses a tuple);
            or text, which stays as it is.

    Returns:
        Any: The value.

    Raises:
        ValueError: If brackets do not match, or a dict is no literal.
    """
    inner = text.strip()
    elements = _split(inner)
    if len(elements) > 1 or elements and inner.endswith(','):     # where Python has a tuple
        return [parse_value(element) for element in elements]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # Python's opinions on how text is written
            value = _literal(ast.parse(inner, mode='eval').body)
        if isinstance(value, (str, int, float, list, tuple, dict, type(None))):
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    for number in (int, float):
        try:
            return number(inner)    # 007, inf
        except ValueError:
            pass
    if inner.lower() in ('true', 'false'):
        return inner.lower() == 'true'
    if inner.startswith(('dict(', '{')):
        raise ValueError(f'{text} is no dict of Python literals; quote the text in it, as in '
                         '"dict(type=\'X\')".')
    if inner.startswith(('[', '(')):
        if not elements:
            raise ValueError(f'the brackets of {text} do not match; quote a value with blanks, '
                             'and text that starts with a bracket twice, as "\'...\'".')
        inside = _split(inner[1:-1])
        if inside and inner.endswith(']' if inner[0] == '[' else ')'):
            return (list if inner[0] == '[' else tuple)(map(parse_value, inside))
    return text


def _split(text):
    """The elements between commas that stand in no bracket and no quotes; [] if some do not end."""
    elements, depth, quote, before = [''], 0, '', ','
    for char in text:
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"' and before in '[({,=:':
            quote = char
        else:
            depth += (char in '[({') - (char in '])}')
        if depth < 0:
            return []
        if char == ',' and not depth and not quote:
            elements.append('')
        else:
            elements[-1] += char
        before = before if char == ' ' else char
    if depth or quote:
        return []
    elements = [element.strip() for element in elements]
    return elements if elements[-1] else elements[:-1]


def _literal(node):
    """``ast.literal_eval`` that knows ``dict(...)``."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args:
        if all(keyword.arg for keyword in node.keywords):
            return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and all(node.keys):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return {ast.List: list, ast.Tuple: tuple}[type(node)](map(_literal, node.elts))
    return ast.literal_eval(node)


def merge_options(cfg, options, reads=None, unread=()):
    """Merge ``--cfg-options`` into a config, or refuse those that would have no effect.

    Args:
        cfg (Config): Changed in place, once all options are found to be good.
        options (dict): Values by key. A key goes through dicts by names and through lists by
            indices. A dict is merged into the one that is there, unless it holds
            ``_delete_=True``; anything else replaces what is there.
        reads (Iterable[str], optional): The top-level keys that the tool reads. Defaults to None:
            those that a Runner reads.
        unread (dict[str, str]): Keys, and with them all below, that the tool takes from somewhere
            else; and what to do instead. Defaults to none.

    Raises:
        ValueError: If nothing reads a key, or its place does not exist. The message names the
            nearest key that is read.
    """
    if not options:
        return
    before, after = cfg, copy(cfg)
    options = {tuple(key.split('.')): value for key, value in options.items()}
    for names in options:
        for key, instead in dict(unread).items():
            if names[:key.count('.') + 1] == tuple(key.split('.')):
                raise ValueError(f'{".".join(names)} has no effect here: {instead}.')
    # what is outside before what is inside it, and `_delete_` before its neighbours
    for names in sorted(options, key=lambda names: len(names) - 1.5 * (names[-1] == '_delete_')):
        after[names[0]] = _put(after._cfg_dict, names, options[names])[names[0]]
    if ('custom_imports',) in {names[:1] for names in options}:     # the file's are imported
        _import(after.custom_imports)
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
    """A copy of a dict or list in which the value stands at the place that the names give."""
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
                + (f'take an index from 0 to {len(node) - 1}' if node else f'set {here} itself')
                + f', got {here}.{".".join(names)}.')
        children = list(node)
        name = int(name)
        old = children[name]
    elif isinstance(node, dict):
        if name.isdigit() and name not in node:
            raise ValueError(f'{here} is a dict, which has names and no index, got '
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
    """A dict goes into the dict that is there, everything else takes its place."""
    if not isinstance(new, dict):
        return ConfigDict(value=new)['value']   # with ConfigDicts in lists
    new = dict(new)
    if new.pop('_delete_', False) or not isinstance(old, dict):
        old = ConfigDict()
    return ConfigDict({**old, **{key: _merge(old.get(key), value) for key, value in new.items()}})


def _import(custom_imports):
    try:
        import_modules_from_strings(**custom_imports)
    except ImportError as error:
        raise ValueError(f'custom_imports: {error}.') from error


def _check(before, after, names, reads):
    """Refuse a key that its reader does not know; keys that the file has are taken to be read."""
    for depth in range(1, len(names)):
        path, name = names[:depth], names[depth]
        if name == '_delete_' or not isinstance(at(after, path), dict):
            continue
        same_reader = exists(before, path) and kind(before, path) == kind(after, path)
        if name == 'type' and not same_reader:
            _check_type(before, after, path)
        if same_reader and exists(before, (*path, name)):
            continue
        keys = accepted(after, path)
        if path == ('default_hooks',):
            _check_hook(before, after, name)
        elif keys is not None and name not in keys:
            meant = repaired(after, names, reads)
            raise ValueError(_nobody(names, [meant]) if meant else _nobody(
                (*path, name), nearest(after, (*path, name), reads)))
    value = at(after, names) if exists(after, names) else None
    old = at(before, names) if exists(before, names) else None
    if isinstance(value, str) and isinstance(old, (bool, int, float)):
        what = 'True or False' if isinstance(old, bool) else 'a number'
        raise ValueError(f'{".".join(names)} must be {what}, as {old} in the file, got {value!r}.')
    for path in paths(value, names):
        if len(path) == len(names) + 1:
            _check(before, after, path, reads)


def _check_hook(before, after, name):
    hook = after.default_hooks[name]
    if not (hook is None and name in DEFAULT_HOOKS or isinstance(hook, dict) and hook.get('type')):
        known = [key for key in {*DEFAULT_HOOKS, *before.get('default_hooks', ())} if key != name]
        raise ValueError(
            f'default_hooks.{name} is no hook without a type; the nearest key that is read is '
            f'default_hooks.{max(known, key=lambda key: likeness(name, key))}, or else give '
            f'default_hooks.{name}.type.')


def _check_type(before, after, path):
    """Refuse a new ``type`` that does not exist, or that does not take what the file gives it."""
    node, place = at(after, path), '.'.join(path)
    if exists(before, path) and classes(before, at(before, path), kind(before, path)):
        if not classes(after, node):
            known = {name for registry in registries(after, node)
                     if look_up(registry, kind(before, path)) is not None
                     for name in [*registry.module_dict, *registry.parent.module_dict]}
            raise ValueError(f'there is no {node.type!r} for {place}.type; the nearest is '
                             f'{max(known, key=lambda name: likeness(node.type, name))}.')
    keys = accepted(after, path)
    wrong = [key for key in node if keys is not None and key not in keys
             and exists(before, (*path, key))]
    if wrong:
        raise ValueError(f'{place}.type={node.type} does not take {", ".join(wrong)}, which the '
                         f'file gives; empty it first, by {place}._delete_=True.')


def _not_read(before, after, names, reads):
    """The sentence about a key below a top-level one that nothing reads."""
    if names[0] not in before:
        return _nobody(names, nearest(after, names, reads))
    found = [(*path, *names[1:]) for path in places(before, names[0], reads)]
    return (f'{names[0]} is read by the config file only, before options are merged; use '
            f'{_in_words(found or nearest(after, names, reads, repair=False))}.')


def _nobody(names, instead):
    return (f'nothing reads {".".join(names)}; the nearest key{"s" * (len(instead) > 1)} that '
            f'{"are" if len(instead) > 1 else "is"} read: {_in_words(instead)}.')


def _in_words(found):
    found = ['.'.join(path) for path in found]
    if len(found) > 6:
        found = [*found[:6], f'{len(found) - 6} more']
    return ' and '.join([', '.join(found[:-1]), found[-1]] if len(found) > 1 else found)
