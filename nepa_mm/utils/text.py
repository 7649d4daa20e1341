"""Lists in messages."""
from collections.abc import Iterable


def listed(names: Iterable, most: int = 5) -> str:
    """``'ant, bee, cat'``; only the first ``most`` names of a longer list."""
    names = list(map(str, names))
    rest = len(names) - most
    return ', '.join(names[:most]) + (f' and {rest} more' if rest > 0 else '')


def joined(words: Iterable, most: int = 8) -> str:
    """``[0, 1, 2]`` -> ``'0, 1 and 2'``; only the first ``most`` words of a longer list."""
    words = list(map(str, words))
    rest = len(words) - most
    *words, last = [*words[:most], f'{rest} more'] if rest > 0 else words
    return f'{", ".join(words)} and {last}' if words else last
