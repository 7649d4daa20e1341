"""Reproducible division of a folder of images into training and validation."""
import hashlib
import os
from collections.abc import Collection, Iterable

SPLITS = ('train', 'val')


def held_out(names: Iterable[str], val_fraction: float) -> set[str]:
    """Choose the names that are kept for validation.

    The choice depends on the names only, not on their order, a seed or the machine. A new file
    moves at most one other from one part to the other.

    Args:
        names (Iterable[str]): Names of files, e.g. all of one class.
        val_fraction (float): Fraction to keep, above 0 and below 1. At least one of two names is
            kept, and at least one is left.

    Returns:
        set[str]: The names for validation.
    """
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    num = min(max(round(val_fraction * len(ordered)), 1), max(len(ordered) - 1, 0))
    return set(ordered[:num])


def check_split(split: str | None, val_fraction: float) -> None:
    """Raise ValueError for an unknown ``split`` or a ``val_fraction`` outside (0, 1)."""
    if split not in (None, *SPLITS):
        raise ValueError(f"split must be None, 'train' or 'val', got {split!r}.")
    if not isinstance(val_fraction, (int, float)) or not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction must be above 0 and below 1, got {val_fraction!r}.')


def split_folders(folder: str, found: Collection[str]) -> bool:
    """Return whether a folder is divided already, into ``train`` and ``val``.

    Args:
        folder (str): The folder, for the message.
        found (Collection[str]): Names of the folders in it.

    Raises:
        ValueError: It has ``val`` but not ``train``.
    """
    if 'val' in found and 'train' not in found:
        raise ValueError(f'{folder} has a folder val, but no folder train beside it.')
    return set(SPLITS) <= set(found)
