"""The config that a checkpoint records, parsed and never executed."""
import ast
from contextlib import suppress

# types of earlier versions, and what they are called now
RENAMED = dict(LoadWholeImage='LoadImageWithPillow', WholeCheckpointHook='AtomicCheckpointHook')
RECORDED = ('default_scope', 'model', 'data_preprocessor', 'train_dataloader', 'test_dataloader')


def recorded_config(meta, path):
    """What a checkpoint's ``meta`` tells of network and images, as far as ``RECORDED`` names it.

    Args:
        meta (dict): With ``model`` and ``input``, dicts, as files of ours have them, or
            ``config_text``, what mmengine records, see :func:`read_checkpoint`.
        path (str): What error messages call the checkpoint.

    Returns:
        dict: Without ``model`` if there is no record.

    Raises:
        ValueError: The record is damaged, or holds more than values: calls, say.
    """
    try:
        config = {name: meta[name] for name in ('model', 'input') if meta.get(name) is not None}
        if not config and 'config_text' in meta:
            config = {ast.unparse(node.targets): node.value for node in
                      ast.parse(meta['config_text']).body if isinstance(node, ast.Assign)}
            config = {name: _values(config[name]) for name in RECORDED if name in config}
            config['model']
        if 'model' in config and not isinstance(config['model']['type'], str):
            raise TypeError
    except (AttributeError, IndexError, KeyError, MemoryError, RecursionError, SyntaxError,
            TypeError, ValueError) as error:
        raise ValueError(f'The config that {path} records is damaged, or is more than values: '
                         'give the config file itself.') from error
    return config


def recorded_model(meta, path):
    """The model of :func:`recorded_config`, None if there is no record."""
    return recorded_config(meta, path).get('model')


def recorded_values(text):
    """What a config text assigns, as far as it is values: {name: value}; nothing is executed."""
    values = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                with suppress(ValueError, TypeError):
                    values[node.targets[0].id] = _values(node.value)
    except (MemoryError, SyntaxError, ValueError, TypeError, RecursionError):
        pass
    return values


def _values(node):
    """A literal, or ``dict(key=value)`` as mmengine writes it, at any depth."""
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
