"""ImageNet in large files: tar shards (WebDataset) and Parquet (Hugging Face), read in any order.

Samples have numbers, as in a folder of images. So mmengine's samplers give every process the same
order as there, and a run resumes in the middle of an epoch.
"""
import bisect
import hashlib
import json
import os
import tarfile
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode

from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.registry import DATASETS
from mmpretrain.datasets.base_dataset import BaseDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.files import atomic_write

INDEX = '.nepa_mm_index.json'
VERSION = 4     # of what it says about a tar
BLOCK = 512     # bytes of a tar's header, and of the zeros at its end


def pyarrow_parquet():
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError('Parquet files are read by pyarrow; type: pip install pyarrow') from None
    return parquet


class ShardBackend(BaseStorageBackend):
    """Bytes of ``shard://FILE.tar?offset=O&size=S`` and ``shard://FILE.parquet?column=C&row=R``.

    Registered with mmengine for the prefix ``shard``, so that every transform reads them.
    """

    def get(self, filepath):
        """The bytes of one image.

        Raises:
            OSError: The file is missing, or ends too early.
            DataError: The row of a Parquet file cannot be read, or has no bytes.
        """
        file, _, query = filepath.partition('://')[2].rpartition('?')
        file = unquote(file, errors='surrogateescape')
        fields = {key: value[0] for key, value in parse_qs(query).items()}
        if 'row' in fields:
            return read_row(file, fields['column'], int(fields['row']))
        size = int(fields['size'])
        with open(file, 'rb') as opened:
            opened.seek(int(fields['offset']))
            content = opened.read(size)
        if len(content) < size:
            raise OSError(f'{file} ends after {len(content)} of {size} bytes of the image')
        return content

    def get_text(self, filepath, encoding='utf-8'):
        """The same, decoded."""
        return self.get(filepath).decode(encoding)


register_backend('shard', ShardBackend, prefixes='shard')


@lru_cache(maxsize=512)
def open_parquet(file, process):
    """An open Parquet file of this process, and the first row of each of its row groups."""
    opened = pyarrow_parquet().ParquetFile(file, memory_map=True, page_checksum_verification=True)
    starts = [0]
    for group in range(opened.num_row_groups):
        starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
    return opened, starts


def read_row(file, column, row):
    """``column.bytes`` of one row; the row group around it is decoded."""
    with refused(file, f'cannot be read at row {row}'):
        opened, starts = open_parquet(file, os.getpid())
        group = bisect.bisect_right(starts, row) - 1
        table = opened.read_row_group(group, columns=[f'{column}.bytes'])
        content = (table.column(0)[row - starts[group]].as_py() or {}).get('bytes')
        if content is None:
            raise ValueError('it has no bytes')
        return content


def index_tar(file):
    """(name, offset, size, label or None) of each image; labels stand in ``.cls`` files.

    Raises:
        DataError: It is damaged or ends early, which tarfile takes for the end, or holds what
            cannot be read in place.
    """
    images, labels, names = [], {}, set()
    with refused(file, 'is no tar of images and labels'), tarfile.open(file, 'r:') as opened:
        for member in opened:
            name = member.name
            if os.path.basename(name).startswith('.') or member.isdir():    # ._x of macOS
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
        check_end(file, opened.offset)
        if not images:
            raise ValueError('it holds no image')
    return [[*image, label_of(image[0], labels)] for image in images]


def check_end(file, offset):
    """Refuse a tar that has no blocks of zeros, and nothing else, behind its last member."""
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
def refused(file, what):
    """Say of which file an error is, whatever its class: damage reaches all of a parser."""
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'{file} {what}: {reason.rstrip(".")}.') from error


def read_index(file):
    """The tars of an index; none if it is missing or no JSON."""
    stored = None
    with suppress(OSError, ValueError, RecursionError):
        stored = json.loads(file.read_text()) if file.is_file() else None
    return stored if isinstance(stored, dict) else {}


def digest(images):
    """A checksum of the list, against damage."""
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()


def is_sound(entry, stamp):
    """Whether what an index says of a tar belongs to it; anyone may have written it."""
    def is_number(value, most):
        return type(value) is int and 0 <= value <= most

    size = stamp[1]
    return (isinstance(entry, dict) and entry.get('stamp') == stamp
            and isinstance(entry.get('images'), list) and len(entry['images']) > 0
            and all(isinstance(image, list) and len(image) == 4 and isinstance(image[0], str)
                    and is_number(image[1], size) and is_number(image[2], size - image[1])
                    and (image[3] is None or is_number(image[3], 10 ** 9))
                    for image in entry['images'])
            and entry.get('digest') == digest(entry['images']))


def label_of(name, labels):
    """The label of an image: of its name without the suffix, else of all before an earlier dot.

    WebDataset writes ``a.cls`` for ``a.left.jpg`` and ``a.right.jpg``. By its rule a name ends at
    the first dot, which ``2024.01.31.jpg`` does not.
    """
    folder, name = os.path.split(name)
    while '.' in name:
        name = name.rpartition('.')[0]
        key = os.path.join(folder, name)
        if key in labels:
            return labels[key]
    return None


@DATASETS.register_module()
class ImageNetShards(BaseDataset):
    """ImageNet in ``.tar`` shards as WebDataset writes them, or in ``.parquet`` files.

    In a tar ``KEY.jpg`` is an image and ``KEY.cls`` its label as a number, also that of
    ``KEY.left.jpg``; every image is a sample. The places of all images
    are written to ``.nepa_mm_index.json`` beside the shards the first time, if that folder can be
    written to; later starts read it. In Parquet a column holds ``bytes`` and another one labels. A
    read there decodes the whole row group around the image (100 rows in the files of the
    Hugging Face Hub), so tar shards are far faster.

    Takes the place of mmpretrain's ImageNet in any config::

        train_dataloader.dataset.type=ImageNetShards train_dataloader.dataset.data_root=FOLDER

    Args:
        data_root (str): Folder, searched with its subfolders.
        split (str): Files with this in their names are taken, e.g. 'train'; 'val' takes
            'validation', too. Defaults to 'train'.
        with_label (bool): Whether samples have ``gt_label``. Defaults to True.
        image_column (str): Of Parquet files. Defaults to 'image'.
        label_column (str): Of Parquet files. Defaults to 'label'.
        **kwargs: ``pipeline`` and others of mmpretrain's BaseDataset.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: A file is damaged or ends early, or the label of an image is missing or is not
            the number of a class; the sentence names the file.
        ImportError: Parquet files are there and pyarrow is not.
    """

    METAINFO = dict(classes=IMAGENET_CATEGORIES)

    def __init__(self, data_root, split='train', with_label=True, image_column='image',
                 label_column='label', **kwargs):
        self.split, self.with_label = split, with_label
        self.image_column, self.label_column = image_column, label_column
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self):
        """All samples, by the names of the shards and their order within."""
        root = Path(self.data_root).expanduser().resolve()
        files = sorted(file for file in root.rglob(f'*{self.split}*')
                       if file.suffix in ('.tar', '.parquet') and not file.is_dir())
        if not files:
            raise FileNotFoundError(f'{self.data_root} has no .tar and no .parquet files with '
                                    f'{self.split!r} in their names.')
        for file in files:
            if not file.is_file():
                raise DataError(f'{file} is no file, or a link that leads nowhere.')
        samples = []
        for file, found in self._tars(root, [f for f in files if f.suffix == '.tar']):
            samples += [(file, dict(offset=offset, size=size, name=name), label)
                        for name, offset, size, label in found]
        for file in [f for f in files if f.suffix == '.parquet']:
            samples += [(file, dict(column=self.image_column, row=row), label)
                        for row, label in enumerate(self._labels(file))]
        return [self._sample(*sample) for sample in samples]

    def _sample(self, file, place, label):
        path = quote(str(file), errors='surrogateescape')
        sample = dict(img_path=f'shard://{path}?{urlencode(place, errors="surrogateescape")}')
        if self.with_label:
            what = f'{place.get("name", place)!r} in {file}'
            if label is None:
                raise DataError(f'{what} has no label.')
            most = len(self.metainfo.get('classes') or ()) - 1
            if type(label) is not int or label < 0 or 0 <= most < label:
                raise DataError(f'{what} has the label {label!r}, which is no number'
                                f'{f" from 0 to {most}" if most >= 0 else " of a class"}.')
            sample['gt_label'] = label
        return sample

    def _tars(self, root, files):
        """Each tar with its index, as stored where the file is still the same."""
        stored, index = read_index(root / INDEX), {}
        for file in files:
            name, state = str(file.relative_to(root)), file.stat()
            stamp = [VERSION, state.st_size, state.st_mtime_ns]
            entry = stored.get(name)
            if not is_sound(entry, stamp):
                images = index_tar(file)
                entry = dict(stamp=stamp, digest=digest(images), images=images)
            index[name] = entry
        if any(stored.get(name) != entry for name, entry in index.items()):
            # in a folder for reading only every start makes the index again
            with suppress(OSError), atomic_write(root / INDEX, overwrite=True) as temporary:
                temporary.write_text(json.dumps(stored | index))
        return [(root / name, entry['images']) for name, entry in index.items()]

    def _labels(self, file):
        """The label of each row, or None."""
        parquet = pyarrow_parquet()
        with refused(file, f'is no Parquet file with the columns {self.image_column} and '
                     f'{self.label_column}'):
            opened = parquet.ParquetFile(file, page_checksum_verification=True)
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
            wanted = [self.image_column, *([self.label_column] if self.with_label else [])]
            if not all(schema.names.count(name) == 1 for name in wanted):
                raise ValueError(f'it has the columns {schema.names}')
            kind = schema.field(self.image_column).type
            if 'bytes' not in [field.name for field in getattr(kind, 'fields', ())]:
                raise ValueError(f'{self.image_column} holds {kind}, not bytes')
            labels = [None] * rows
            if self.with_label:
                labels = opened.read(columns=[self.label_column]).column(0).to_pylist()
            groups = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            if not rows or {rows} != {sum(groups), len(labels)} or min(groups) < 0:
                raise ValueError(f'it claims {rows} rows, of which {sum(groups)} are in its row '
                                 f'groups and {len(labels)} have a place for a label')
        return labels
