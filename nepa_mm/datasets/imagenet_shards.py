"""ImageNet in tar shards (WebDataset) or Parquet files (Hugging Face), with random access.

Samples are indexed like the images of a folder. mmengine's samplers therefore work as usual, and a
run can resume in the middle of an epoch.
"""
import bisect
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.registry import DATASETS
from mmpretrain.datasets.base_dataset import BaseDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

from nepa_mm.datasets.tar_index import as_data_error, index_tars
from nepa_mm.utils.errors import DataError


def import_parquet() -> ModuleType:
    """Import ``pyarrow.parquet``, or raise an ImportError with the command that installs it."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError('Parquet files are read by pyarrow; run: pip install pyarrow') from None
    return parquet


class ShardBackend(BaseStorageBackend):
    """Reads ``shard://FILE.tar?offset=O&size=S`` and ``shard://FILE.parquet?column=C&row=R``.

    Registered with mmengine for the prefix ``shard``, so all transforms can read such paths.
    """

    def get(self, filepath: str) -> bytes:
        """Return the bytes of one image.

        Raises:
            OSError: The file is missing or truncated.
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

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        """Return the bytes decoded as text; required by the base class."""
        return self.get(filepath).decode(encoding)


register_backend('shard', ShardBackend, prefixes='shard')


@lru_cache(maxsize=512)
def open_parquet(file: str, process: int) -> tuple[Any, list[int]]:
    """Open a Parquet file, and list the first row of each row group.

    ``process`` is the process ID, so forked processes do not share an open file from the cache.
    """
    opened = import_parquet().ParquetFile(file, memory_map=True, page_checksum_verification=True)
    starts = [0]
    for group in range(opened.num_row_groups):
        starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
    return opened, starts


def read_row(file: str, column: str, row: int) -> bytes:
    """Return ``column.bytes`` of one row; decodes the row group that contains it."""
    with as_data_error(file, f'cannot be read at row {row}'):
        opened, starts = open_parquet(file, os.getpid())
        group = bisect.bisect_right(starts, row) - 1
        table = opened.read_row_group(group, columns=[f'{column}.bytes'])
        content = (table.column(0)[row - starts[group]].as_py() or {}).get('bytes')
        if content is None:
            raise ValueError('it has no bytes')
        return content


@DATASETS.register_module()
class ImageNetShards(BaseDataset):
    """ImageNet in ``.tar`` shards as WebDataset writes them, or in ``.parquet`` files.

    Tar: ``KEY.jpg`` is an image and ``KEY.cls`` the number of its class, also for
    ``KEY.left.jpg``. Each image is a sample. The first start writes the offsets of all images to
    ``.nepa_mm_index.json`` in ``data_root``, if writable; later starts read it.

    Parquet: one column holds ``bytes``, another one labels. Each read decodes the full row group
    of the image (100 rows in the files of the Hugging Face Hub), so tar shards are far faster.

    Replaces mmpretrain's ImageNet in any config::

        train_dataloader.dataset.type=ImageNetShards train_dataloader.dataset.data_root=FOLDER

    Args:
        data_root (str): Folder, searched recursively.
        split (str): Files with this string in their names are used, e.g. 'train'; 'val' also
            matches 'validation'. Defaults to 'train'.
        with_label (bool): Whether samples have ``gt_label``. Defaults to True.
        image_column (str): Image column of Parquet files. Defaults to 'image'.
        label_column (str): Label column of Parquet files. Defaults to 'label'.
        **kwargs: ``pipeline`` and other arguments of mmpretrain's BaseDataset.

    Raises:
        FileNotFoundError: No file matches ``split``.
        DataError: A file is corrupt or truncated, or the label of an image is missing or not the
            number of a class. The message names the file.
        ImportError: There are Parquet files, but pyarrow is not installed.
    """

    METAINFO = dict(classes=IMAGENET_CATEGORIES)

    def __init__(self, data_root: str, split: str = 'train', with_label: bool = True,
                 image_column: str = 'image', label_column: str = 'label', **kwargs: Any):
        self.split, self.with_label = split, with_label
        self.image_column, self.label_column = image_column, label_column
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """All samples, ordered by shard name and position in the shard."""
        root = Path(self.data_root).expanduser().resolve()
        files = sorted(file for file in root.rglob(f'*{self.split}*')
                       if file.suffix in ('.tar', '.parquet') and not file.is_dir())
        if not files:
            raise FileNotFoundError(f'{self.data_root} has no .tar and no .parquet files with '
                                    f'{self.split!r} in their names.')
        for file in files:
            if not file.is_file():
                raise DataError(f'{file} is no file, or a dangling link.')
        samples = []
        for file, found in index_tars(root, [f for f in files if f.suffix == '.tar']):
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

    def _labels(self, file):
        """Label of each row, or None."""
        parquet = import_parquet()
        with as_data_error(file, 'is no Parquet file with the columns '
                         f'{self.image_column} and {self.label_column}'):
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
                raise ValueError(f'it claims {rows} rows, but has {sum(groups)} in its row groups '
                                 f'and {len(labels)} labels')
        return labels
