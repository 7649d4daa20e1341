"""Settings of a config file: literals at its top, from which the file derives the rest."""
import ast
import os
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config

from nepa_mm.utils.text import joined


def find_settings(path: str | os.PathLike) -> dict[str, Any]:
    """Return the settings of a config file and of its bases.

    They are literals at the top of a file whose names the file reads below. ``_base_``, imports and
    the docstring may stand between them. The first other statement ends the settings. A file that a
    run saved has none: its values are derived already.

    Args:
        path (str | Path): The config file. Only Python files have settings.

    Returns:
        dict[str, Any]: Values by name: those of the file before those of its bases.
    """
    tree, found = _parse(path), {}
    for _, base in _bases(path, tree):
        found |= find_settings(base)
    return found | {name: ast.literal_eval(node.value) for name, node in _own_settings(tree)}


def check_inheritance(cfg: Config) -> None:
    """Check that no file of a config tries to change a setting of its bases.

    In mmengine a base is evaluated before its child, with its own values.

    Args:
        cfg (Config): The config, as read from its file.

    Raises:
        ValueError: A literal of a file, which the file does not read, has the name of a setting of
            its bases, and the config would be another one if they had had this value.
    """
    _check_file(cfg, os.path.expanduser(cfg.filename))


def _check_file(cfg, path):
    tree, settings = _parse(path), {}
    for _, base in _bases(path, tree):
        _check_file(cfg, base)
        settings |= find_settings(base)
    for node in tree.body:
        name = _name(node)
        if name not in settings or name in _names_read(tree) or not _is_literal(node):
            continue
        value = ast.literal_eval(node.value)
        if evaluate_with(cfg, {name: value})._cfg_dict != cfg._cfg_dict:
            raise ValueError(
                f'{path} sets {name} = {value!r}, but its base has derived the rest from '
                f'{settings[name]!r}. Remove the line, and give {name} by --cfg-options or set it '
                'in a copy of the base.')


def evaluate_with(cfg: Config, values: Mapping[str, Any]) -> Config:
    """Evaluate a config file again, with other values of its settings and those of its bases.

    Args:
        cfg (Config): The config, as read from its file.
        values (dict[str, Any]): New values of some settings, by name.

    Returns:
        Config: The config that the file yields with these values.

    Raises:
        ValueError: A value is of another kind than the file's, or the file cannot be evaluated with
            it.
    """
    path = os.path.abspath(os.path.expanduser(cfg.filename))
    for name, old in find_settings(path).items():
        if name in values:
            _check_kind(name, old, values[name])
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy_with(path, values, Path(folder))
        try:
            found = Config.fromfile(copy)
        except Exception as error:
            given = joined(f'{name}={value!r}' for name, value in values.items())
            raise ValueError(f'{cfg.filename} cannot be evaluated with {given}: {error}.'
                             ) from error
    return Config(found._cfg_dict, cfg_text=cfg.text, filename=cfg.filename,
                  env_variables=found.env_variables)


def nearest_setting(name: str, settings: Mapping[str, Any]) -> str | None:
    """Return the setting whose name resembles a misspelt one, or None."""
    return next(iter(get_close_matches(name, settings, 1, 0.75)), None)


def _copy_with(path, values, folder):
    """Write a copy of a config file and of its bases with other values; return its path."""
    copy = folder / os.path.basename(path)
    Config._substitute_predefined_vars(path, str(copy))     # {{ fileDirname }} of the original
    tree = _parse(copy)
    for name, node in _own_settings(tree):
        if name in values:
            node.value = ast.parse(repr(values[name]), mode='eval').body
    for number, (leaf, base) in enumerate(_bases(path, tree)):
        below = folder / str(number)
        below.mkdir()
        scope, mark, _ = leaf.value.rpartition('::')
        leaf.value = scope + mark + _copy_with(base, values, below)     # scope::/path is valid
    if tree.body:
        copy.write_text(ast.unparse(tree), encoding='utf-8')
    return str(copy)


def _parse(path):
    if not str(path).endswith('.py'):
        return ast.Module([], [])
    return ast.parse(Path(path).expanduser().read_text(encoding='utf-8'))


def _name(node):
    """The name that a statement assigns to, or None."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        return getattr(node.targets[0], 'id', None)
    return None


def _bases(path, tree):
    """Return (constant, path) of each file in ``_base_``."""
    return [(leaf, Config._get_cfg_path(leaf.value, os.path.expanduser(path))[0])
            for node in tree.body if _name(node) == '_base_'
            for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)
            and str(leaf.value).endswith(('.py', '.json', '.yaml', '.yml'))]


def _names_read(tree):
    return {node.id for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _own_settings(tree):
    """Return (name, statement) of each setting of a parsed file."""
    read, found = _names_read(tree), []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)) or _name(node) == '_base_':
            continue
        if not _name(node) or not _is_literal(node):
            break
        if _name(node) in read:
            found.append((_name(node), node))
    return found


def _is_literal(node):
    try:
        ast.literal_eval(node.value)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def _check_kind(name, old, new):
    """Reject text for a number, a number for text, and one value for a list."""
    kinds = {bool: 'True or False', str: 'text', (list, tuple): 'a list such as a,b,c',
             (int, float): 'a number'}
    for kind, what in kinds.items():
        if isinstance(old, kind):
            if new is None and kind is str:
                return      # pretrained=None
            if not isinstance(new, kind) or isinstance(new, bool) and kind is not bool:
                hint = f'; write {name}="\'{new}\'"' if kind is str else ''
                raise ValueError(f'{name} must be {what} (the file has {old!r}), got {new!r}'
                                 f'{hint}.')
            if isinstance(old, int) and isinstance(new, float):
                raise ValueError(f'{name} must be an integer (the file has {old}), got {new}.')
            return
