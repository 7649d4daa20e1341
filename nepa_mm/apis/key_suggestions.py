"""Suggest config keys for one that nothing reads."""
import ast
import re
from collections.abc import Set
from contextlib import suppress
from difflib import SequenceMatcher

from mmengine.config import Config

from nepa_mm.apis.config_keys import accepted_keys
from nepa_mm.utils.nested import exists, get_path, paths


def similarity(name: str, other: str) -> float:
    """Return how likely ``name`` was meant to be ``other``; 0.6 and above is a good guess."""
    score = SequenceMatcher(None, name.lower(), other.lower()).ratio()
    if other.startswith(name) or name.startswith(other):
        score += 0.1
    words = other.split('_')
    return score + (name == ''.join(word[:1] for word in words)) + 0.5 * (other in name.split('_'))


def nearest_paths(cfg: Config, names: tuple[str, ...], reads: Set[str], repair: bool = True
                  ) -> list[tuple[str, ...]]:
    """Suggest paths of a config for one that nothing reads.

    Args:
        cfg (Config): The config.
        names (tuple[str]): The path that is not read.
        reads (set[str]): The top-level keys that are read.
        repair (bool): Whether to try similar names. Defaults to True.

    Returns:
        list[tuple[str]]: The first non-empty of: the same path further inside; the path with
        unknown names replaced by similar siblings; paths with the same last name; the path with
        the most similar last name, or else a sibling.
    """
    there = [path for top in sorted(reads & set(cfg)) for path in paths(cfg[top], (top,))
             if path[:len(names)] != names and path[-1][0] != '_']
    inside = [path for path in there if path[-len(names):] == names]
    if inside:
        return inside
    if repair and (path := repair_path(cfg, names, reads)):
        return [path]
    same = [path for path in there if path[-1] == names[-1]]
    if same and names[-1] != 'type' and not names[-1].isdigit():
        return same
    every = {*there, *((*path, key) for path in there for key in accepted_keys(cfg, path) or ()
                       if not key.startswith('_'))}
    best = max(sorted(every), key=lambda path: (
        similarity(names[-1], path[-1]) + 0.1 * similarity('.'.join(names), '.'.join(path))))
    return [best] if similarity(names[-1], best[-1]) >= 0.6 else [
        repair_path(cfg, names, reads, least=0.)]


def repair_path(cfg: Config, names: tuple[str, ...], reads: Set[str], least: float = 0.6
                ) -> tuple[str, ...] | None:
    """Replace every unknown name of a path by its most similar sibling.

    Return None if the best match of a name scores below ``least``.
    """
    path = ()
    for i, name in enumerate(names):
        if not exists(cfg, path):
            return path + names[i:]
        node = get_path(cfg, path)
        keys = (accepted_keys(cfg, path) if path else reads) or {
            path[0] for path in paths(node) if path}
        if name not in keys:
            name = max(sorted(key for key in keys if key[:1] != '_'),
                       key=lambda key: similarity(names[i], key), default='')
            if similarity(names[i], name) < least:
                return None
        path += (name,)
    return path


def uses_in_file(cfg: Config) -> dict[str, set[tuple[str, ...]]]:
    """Find where a config file and its bases use their own names.

    Args:
        cfg (Config): Read from a file.

    Returns:
        dict[str, set[tuple[str]]]: For every name, the paths of the values built from it.
    """
    # the text concatenates all files, each after a line with its path
    text = re.sub(r'^[^"\'#\n]*\.py$', '', cfg.text, flags=re.MULTILINE)
    uses = {}

    def visit(node, path):
        if isinstance(node, ast.Name) or (
                isinstance(node, ast.Attribute) and ast.unparse(node.value) == '_base_'):
            uses.setdefault(getattr(node, 'id', getattr(node, 'attr', '')), set()).add(path)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict':
            for keyword in node.keywords:
                visit(keyword.value, path + ((keyword.arg,) if keyword.arg else ()))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                visit(value, path + ((str(key.value),) if isinstance(key, ast.Constant) else ()))
        elif isinstance(node, (ast.List, ast.Tuple)):
            starred = any(isinstance(child, ast.Starred) for child in node.elts)
            for i, child in enumerate(node.elts):
                visit(child, path if starred else (*path, str(i)))
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, path)

    with suppress(SyntaxError):
        for node in ast.parse(text).body:
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Name):
                    visit(node.value, (target.id,))
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for name, value in zip(target.elts, node.value.elts):
                        visit(value, (ast.unparse(name),))
    return uses


def value_paths(cfg: Config, name: str, reads: Set[str]) -> list[tuple[str, ...]]:
    """Find where the config file uses the value of a name, among the keys that are read.

    Args:
        cfg (Config): The config before options are merged.
        name (str): A top-level key that nothing reads.
        reads (set[str]): The top-level keys that are read.

    Returns:
        list[tuple[str]]: Sorted paths: those in the source, or those with an equal list or dict.
    """
    uses, value, found, pending = uses_in_file(cfg), cfg[name], [], [(name, ())]
    seen = set()
    while pending:
        local, below = pending.pop(0)
        for path in sorted(uses.get(local, ())):
            path = path + below
            if path in seen or path[0] == local:
                continue
            seen.add(path)
            pending += [(path[0], path[1:])]
            if path[0] in reads and exists(cfg, path):
                found.append(path)
    if isinstance(value, (dict, list, tuple)) and value:
        same = [path for top in reads & set(cfg) for path in paths(cfg[top], (top,))
                if get_path(cfg, path) == value]
        found = same or [path for path in found if type(get_path(cfg, path)) is type(value)]
    return sorted(found)
