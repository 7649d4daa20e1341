"""Offsets of the images in tar shards, checked and stored for the next start."""
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.files import atomic_write

INDEX = '.nepa_mm_index.json'
VERSION = 4     # of the index format
BLOCK = 512     # bytes of a tar header, and of each block of zeros at the end


def index_tars(root: Path, files: list[Path]) -> list[tuple[Path, list[list]]]:
    """Index several tars; reuse stored entries if size and time of the file match.

    Args:
        root (Path): Folder of the stored index, ``.nepa_mm_index.json``. If it is read-only,
            every start builds the index again.
        files (list[Path]): Tars below ``root``.

    Returns:
        list[tuple[Path, list]]: Each file with the result of :func:`index_tar`.

    Raises:
        DataError: See :func:`index_tar`.
    """
    stored, index = _read_index(root / INDEX), {}
    for file in files:
        name, state = str(file.relative_to(root)), file.stat()
        stamp = [VERSION, state.st_size, state.st_mtime_ns]
        entry = stored.get(name)
        if not _is_valid(entry, stamp):
            images = index_tar(file)
            entry = dict(stamp=stamp, digest=_digest(images), images=images)
        index[name] = entry
    if any(stored.get(name) != entry for name, entry in index.items()):
        with suppress(OSError), atomic_write(root / INDEX, overwrite=True) as temporary:
            temporary.write_text(json.dumps(stored | index))
    return [(root / name, entry['images']) for name, entry in index.items()]


def index_tar(file: Path) -> list[list]:
    """List [name, offset, size, label or None] of each image; labels are in ``.cls`` files.

    Raises:
        DataError: The tar is corrupt, truncated (which tarfile does not report), or contains
            members that cannot be read in place.
    """
    images, labels, names = [], {}, set()
    with as_data_error(file, 'is no tar of images and labels'), tarfile.open(file, 'r:') as opened:
        for member in opened:
            name = member.name
            if os.path.basename(name).startswith('.') or member.isdir():    # macOS adds ._x
                continue
            if name in names:
                raise ValueError(f'{name!r} is there twice')
            names.add(name)
            is_image = name.lower().endswith(IMAGE_SUFFIXES)
            if (is_image or name.endswith('.cls')) and (not member.isreg() or member.issparse()):
                raise ValueError(f'{name!r} is no plain file')
            if is_image:
                images.append((name, member.offset_data, member.size))
            elif name.endswith('.cls'):
                content = opened.extractfile(member).read(100).strip()
                if not content.isdigit() or len(content) > 9:
                    raise ValueError(f'{name!r} holds {content!r}, not the number of a class')
                labels[name[:-4]] = int(content)
        _check_end(file, opened.offset)
        if not images:
            raise ValueError('it holds no image')
    return [[*image, _label_of(image[0], labels)] for image in images]


def _check_end(file, offset):
    """Reject a tar unless only blocks of zeros follow its last member."""
    with open(file, 'rb') as opened:
        opened.seek(offset)
        rest = opened.read(BLOCK)
        if len(rest) < BLOCK:
            raise ValueError(f'it ends at byte {offset + len(rest)}, before the end of the archive')
        while rest:
            if rest.strip(b'\0'):
                raise ValueError(f'what follows byte {offset} is damaged, or another archive')
            rest = opened.read(1 << 20)


@contextmanager
def as_data_error(file: str | Path, what: str) -> Iterator[None]:
    """Turn errors into a DataError that names the file.

    FileNotFoundError, PermissionError and ImportError pass through.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:      # corrupt data can raise any class from a parser
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'{file} {what}: {reason.rstrip(".")}.') from error


def _read_index(file):
    """Entries of the index by tar; empty if the file is missing or not a JSON object."""
    stored = None
    with suppress(OSError, ValueError, RecursionError):
        stored = json.loads(file.read_text()) if file.is_file() else None
    return stored if isinstance(stored, dict) else {}


def _digest(images):
    """Checksum of the image list, to detect corruption."""
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()


def _is_valid(entry, stamp):
    """Whether an index entry matches its tar; the index is an untrusted file."""
    def is_number(value, most):
        return type(value) is int and 0 <= value <= most

    size = stamp[1]
    return (isinstance(entry, dict) and entry.get('stamp') == stamp
            and isinstance(entry.get('images'), list) and len(entry['images']) > 0
            and all(isinstance(image, list) and len(image) == 4 and isinstance(image[0], str)
                    and is_number(image[1], size) and is_number(image[2], size - image[1])
                    and (image[3] is None or is_number(image[3], 10 ** 9))
                    for image in entry['images'])
            and entry.get('digest') == _digest(entry['images']))


def _label_of(name, labels):
    """Label of an image, found by its name without suffix, else cut at an earlier dot.

    WebDataset writes ``a.cls`` for ``a.left.jpg`` and ``a.right.jpg``. Its rule, a key ends at the
    first dot, would fail for ``2024.01.31.jpg``.
    """
    folder, name = os.path.split(name)
    while '.' in name:
        name = name.rpartition('.')[0]
        key = os.path.join(folder, name)
        if key in labels:
            return labels[key]
    return None
