"""Configs recorded in checkpoints. They are parsed, never executed."""
import ast
from contextlib import suppress
from typing import Any

# types of earlier versions -> current names
RENAMED = dict(LoadWholeImage='LoadImageWithPillow', WholeCheckpointHook='AtomicCheckpointHook')
RECORDED = ('default_scope', 'model', 'data_preprocessor', 'train_dataloader', 'test_dataloader')
# what a malformed or hostile text raises in ast
PARSE_ERRORS = (MemoryError, RecursionError, SyntaxError, TypeError, ValueError)


def recorded_config(meta: dict, path: str) -> dict:
    """Read the config of network and images that a checkpoint records.

    Args:
        meta (dict): Meta of the checkpoint. Our own files have ``model`` and ``input``, dicts;
            files of mmengine have ``config_text``, see :func:`read_checkpoint`.
        path (str): Name of the checkpoint in error messages.

    Returns:
        dict: ``model`` and ``input``, or the fields in ``RECORDED`` that the config has. Without
        ``model`` if nothing is recorded.

    Raises:
        ValueError: The record is corrupt, or contains more than values, e.g. calls.
    """
    try:
        config = {name: meta[name] for name in ('model', 'input') if meta.get(name) is not None}
        if not config and 'config_text' in meta:
            nodes = _assignments(meta['config_text'])
            config = {name: _values(nodes[name]) for name in RECORDED if name in nodes}
            config['model']
        if 'model' in config and not isinstance(config['model']['type'], str):
            raise TypeError
    except (AttributeError, LookupError, *PARSE_ERRORS) as error:
        raise ValueError(f'The config that {path} records is corrupt, or is more than values: '
                         'give the config file itself.') from error
    return config


def recorded_model(meta: dict, path: str) -> dict | None:
    """The model of :func:`recorded_config`, or None."""
    return recorded_config(meta, path).get('model')


def recorded_values(text: str) -> dict[str, Any]:
    """Return the variables that a config text assigns plain values to; skips everything else."""
    values = {}
    with suppress(*PARSE_ERRORS):
        for name, node in _assignments(text).items():
            with suppress(ValueError, TypeError):
                values[name] = _values(node)
    return values


def _assignments(text):
    """Syntax tree of the value of each assigned variable."""
    return {node.targets[0].id: node.value for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}


def _values(node):
    """Evaluate a literal or ``dict(key=value)``, as mmengine writes it, at any depth."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args:
        return {keyword.arg: _values(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _values(value)
                for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_values(value) for value in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    value = ast.literal_eval(node)
    return RENAMED.get(value, value) if isinstance(value, str) else value
