"""Nested configs: what is at a path, and every dict within."""
from contextlib import suppress

from mmengine.config import Config


def at(node, path):
    """The value at a path of a config.

    Raises:
        KeyError: There is none.
    """
    for name in path:
        if isinstance(node, (list, tuple)) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, (dict, Config)) and name in node:
            node = node[name]
        else:
            raise KeyError('.'.join(path))
    return node


def exists(cfg, path):
    with suppress(KeyError):
        at(cfg, path)
        return True
    return False


def paths(node, path=()):
    """Every path at and below a node."""
    yield path
    children = node.items() if isinstance(node, dict) else (
        enumerate(node) if isinstance(node, (list, tuple)) else ())
    for name, child in children:
        if isinstance(name, str) or not isinstance(node, dict):
            yield from paths(child, (*path, str(name)))


def dicts(node):
    """Every dict in a nested config, outermost first."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for child in node:
        yield from dicts(child)
