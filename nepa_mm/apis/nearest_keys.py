"""Which key may have been meant by one that nothing reads."""
import ast
import re
from contextlib import suppress
from difflib import SequenceMatcher

from nepa_mm.apis.config_keys import accepted
from nepa_mm.utils.nested import at, exists, paths


def likeness(name, other):
    """How well one name may have been meant by another; 0.6 and above is a good guess."""
    score = SequenceMatcher(None, name.lower(), other.lower()).ratio()
    if other.startswith(name) or name.startswith(other):
        score += 0.1
    words = other.split('_')
    return score + (name == ''.join(word[:1] for word in words)) + 0.5 * (other in name.split('_'))


def nearest(cfg, names, reads, repair=True):
    """Paths that are read and may have been meant by one that is not.

    Args:
        cfg (Config): The config.
        names (tuple[str]): The path.
        reads (set[str]): The top-level keys that are read.
        repair (bool): Whether the names may be misspelt. Defaults to True.

    Returns:
        list[tuple[str]]: The same path further inside; or with every name replaced by a similar
            one beside it; or the same or a similar last name elsewhere; or what is beside it.
    """
    there = [path for top in sorted(reads & set(cfg)) for path in paths(cfg[top], (top,))
             if path[:len(names)] != names and path[-1][0] != '_']
    inside = [path for path in there if path[-len(names):] == names]
    if inside:
        return inside
    if repair and (path := repaired(cfg, names, reads)):
        return [path]
    same = [path for path in there if path[-1] == names[-1]]
    if same and names[-1] != 'type' and not names[-1].isdigit():
        return same
    every = {*there, *((*path, key) for path in there for key in accepted(cfg, path) or ()
                       if not key.startswith('_'))}
    best = max(sorted(every), key=lambda path: (
        likeness(names[-1], path[-1]) + 0.1 * likeness('.'.join(names), '.'.join(path))))
    return [best] if likeness(names[-1], best[-1]) >= 0.6 else [
        repaired(cfg, names, reads, least=0.)]


def repaired(cfg, names, reads, least=0.6):
    """The path with every unknown name replaced by the most similar one beside it, or None."""
    path = ()
    for i, name in enumerate(names):
        if not exists(cfg, path):
            return path + names[i:]
        node = at(cfg, path)
        keys = (accepted(cfg, path) if path else reads) or {path[0] for path in paths(node) if path}
        if name not in keys:
            name = max(sorted(key for key in keys if key[:1] != '_'),
                       key=lambda key: likeness(names[i], key), default='')
            if likeness(names[i], name) < least:
                return None
        path += (name,)
    return path


def uses_in_file(cfg):
    """Where a config file and its bases use their own names.

    Args:
        cfg (Config): Read from a file.

    Returns:
        dict[str, set[tuple[str]]]: For every name the paths of the values made from it.
    """
    # the text has all files one after the other, each behind a line with its path
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


def places(cfg, name, reads):
    """Where the value of a name of the config file went, among the keys that are read.

    Args:
        cfg (Config): The config as the file made it.
        name (str): A top-level key that nothing reads.
        reads (set[str]): The top-level keys that are read.

    Returns:
        list[tuple[str]]: Their paths: as the source has it, or those with an equal list or dict.
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
                if at(cfg, path) == value]
        found = same or [path for path in found if type(at(cfg, path)) is type(value)]
    return sorted(found)
