"""Access to nested configs by path."""
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from mmengine.config import Config


def get_path(node: Any, path: Sequence[str]) -> Any:
    """Return the value at a path of a config. Digits index lists and tuples.

    Raises:
        KeyError: The path does not exist.
    """
    for name in path:
        if isinstance(node, (list, tuple)) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, (dict, Config)) and name in node:
            node = node[name]
        else:
            raise KeyError('.'.join(path))
    return node


def exists(cfg: Any, path: Sequence[str]) -> bool:
    """Whether a config has a value at a path."""
    with suppress(KeyError):
        get_path(cfg, path)
        return True
    return False


def paths(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of a node and of everything below it."""
    yield path
    children = node.items() if isinstance(node, dict) else (
        enumerate(node) if isinstance(node, (list, tuple)) else ())
    for name, child in children:
        if isinstance(name, str) or not isinstance(node, dict):
            yield from paths(child, (*path, str(name)))


def iter_dicts(node: Any) -> Iterator[dict]:
    """Yield every dict of a nested config, outermost first."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for child in node:
        yield from iter_dicts(child)
