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
    """Return the settings of a config file: literals at its top whose names it reads below.

    ``_base_``, imports and the docstring may stand between them. The first other statement ends the
    settings. A file that a run saved has none: its values are derived already.

    Args:
        path (str | Path): The config file. Only Python files have settings.

    Returns:
        dict[str, Any]: Values by name, in the order of the file.
    """
    return {name: ast.literal_eval(node.value) for name, node in _assignments(_parse(path))}


def evaluate_with(cfg: Config, values: Mapping[str, Any]) -> Config:
    """Evaluate a config file again, with other values of its settings.

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
        copy = os.path.join(folder, os.path.basename(path))
        Config._substitute_predefined_vars(path, copy)      # {{ fileDirname }} of the original
        tree = _parse(copy)
        for name, node in _assignments(tree):
            if name in values:
                node.value = ast.parse(repr(values[name]), mode='eval').body
        for node in tree.body:
            if isinstance(node, ast.Assign) and _name(node) == '_base_':
                for base in ast.walk(node.value):
                    if isinstance(base, ast.Constant) and str(base.value).endswith(
                            ('.py', '.json', '.yaml', '.yml')) and '::' not in base.value:
                        base.value = os.path.join(os.path.dirname(path), base.value)
        Path(copy).write_text(ast.unparse(tree), encoding='utf-8')
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


def _parse(path):
    if not str(path).endswith('.py'):
        return ast.Module([], [])
    return ast.parse(Path(path).expanduser().read_text(encoding='utf-8'))


def _name(node):
    target, *more = node.targets
    return target.id if isinstance(target, ast.Name) and not more else None


def _assignments(tree):
    """Return (name, statement) of each setting of a parsed file."""
    read = {node.id for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    found = []
    for node in tree.body:
        if (isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr))
                or isinstance(node, ast.Assign) and _name(node) == '_base_'):
            continue
        if not isinstance(node, ast.Assign) or not _name(node):
            break
        try:
            ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError):
            break
        if _name(node) in read:
            found.append((_name(node), node))
    return found


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
