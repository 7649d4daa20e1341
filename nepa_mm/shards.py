"""ImageNet in large files: tar shards (WebDataset) and Parquet (Hugging Face), read in any order.

Samples have numbers, as in a folder of images. So mmengine's samplers give every process the same
order as there, and a run resumes in the middle of an epoch.
"""
import bisect
import json
import os
import tarfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode

from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.registry import DATASETS
from mmpretrain.datasets.base_dataset import BaseDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

from .checkpoint import written_whole
from .reading import IMAGE_SUFFIXES

INDEX = '.nepa_mm_index.json'
VERSION = 3     # of what it says about a tar


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
            OSError: The file is missing or ends too early.
        """
        file, _, query = filepath.partition('://')[2].rpartition('?')
        file, fields = unquote(file), {key: value[0] for key, value in parse_qs(query).items()}
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
    opened = pyarrow_parquet().ParquetFile(file, memory_map=True)
    starts = [0]
    for group in range(opened.num_row_groups):
        starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
    return opened, starts


def read_row(file, column, row):
    """``column.bytes`` of one row; the row group around it is decoded."""
    opened, starts = open_parquet(file, os.getpid())
    group = bisect.bisect_right(starts, row) - 1
    table = opened.read_row_group(group, columns=[f'{column}.bytes'])
    return table.column(0)[row - starts[group]].as_py()['bytes']


def index_tar(file):
    """(name, offset, size, label or None) of each image; labels stand in ``.cls`` files."""
    images, labels, names = [], {}, set()
    with tarfile.open(file, 'r:') as opened:
        for member in opened:
            if os.path.basename(member.name).startswith('.'):   # of macOS, beside each file
                continue
            if member.name in names:
                raise ValueError(f'{member.name} is there twice')
            names.add(member.name)
            if member.name.lower().endswith(IMAGE_SUFFIXES):
                images.append((member.name, member.offset_data, member.size))
            elif member.name.endswith('.cls'):
                labels[member.name[:-4]] = int(opened.extractfile(member).read())
    return [[*image, label_of(image[0], labels)] for image in images]


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
    Hugging Face Hub), so tar shards are faster.

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
        ValueError: A file cannot be read, or an image has no label.
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
                       if file.suffix in ('.tar', '.parquet'))
        if not files:
            raise FileNotFoundError(f'{self.data_root} has no .tar and no .parquet files with '
                                    f'{self.split!r} in their names.')
        samples = []
        for file, found in self._tars(root, [f for f in files if f.suffix == '.tar']):
            samples += [(file, dict(offset=offset, size=size, name=name), label)
                        for name, offset, size, label in found]
        for file in [f for f in files if f.suffix == '.parquet']:
            samples += [(file, dict(column=self.image_column, row=row), label)
                        for row, label in enumerate(self._labels(file))]
        if not samples:
            raise ValueError(f'{files[0]} holds no image, nor do {len(files) - 1} more files.')
        return [self._sample(*sample) for sample in samples]

    def _sample(self, file, place, label):
        sample = dict(img_path=f'shard://{quote(str(file))}?{urlencode(place)}')
        if self.with_label:
            if label is None:
                raise ValueError(f'{place.get("name", place)} in {file} has no label.')
            sample['gt_label'] = label
        return sample

    def _tars(self, root, files):
        """Each tar with its index, as stored where the file is still the same."""
        stored = {}
        with suppress(OSError, ValueError):     # not there, or damaged
            stored = json.loads((root / INDEX).read_text())
        index = {}
        for file in files:
            name, state = str(file.relative_to(root)), file.stat()
            stamp = [VERSION, state.st_size, state.st_mtime_ns]
            entry = stored.get(name)
            if not entry or entry['stamp'] != stamp:
                try:
                    entry = dict(stamp=stamp, images=index_tar(file))
                except (tarfile.TarError, ValueError) as error:
                    raise ValueError(f'{file} is no tar of images and labels: {error}.') from error
            index[name] = entry
        if any(stored.get(name) != entry for name, entry in index.items()):
            # in a folder for reading only every start makes the index again
            with suppress(OSError), written_whole(root / INDEX, overwrite=True) as temporary:
                temporary.write_text(json.dumps(stored | index))
        return [(root / name, entry['images']) for name, entry in index.items()]

    def _labels(self, file):
        parquet = pyarrow_parquet()
        columns = [self.label_column] if self.with_label else []
        try:
            opened = parquet.ParquetFile(file)
            if self.image_column not in opened.schema_arrow.names:
                raise ValueError(f'it has the columns {opened.schema_arrow.names}')
            labels = opened.read(columns=columns)
            return (labels.column(0).to_pylist() if self.with_label
                    else [None] * opened.metadata.num_rows)
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f'{file} is no Parquet file with the columns {self.image_column} and '
                             f'{self.label_column}: {error}.') from error
