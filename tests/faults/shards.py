"""Damage tar and Parquet shards and their index; see that no sample goes missing silently."""
import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow
from mmengine.fileio import get
from mmengine.registry import DATASETS, init_default_scope
from pyarrow import parquet

from nepa_mm.datasets.tar_index import INDEX
from nepa_mm.utils.errors import DataError

from .files import VALUES, HangError, mutate, no_hang

NUM = 12


def content(number):
    """What stands for an image; its pixels are not looked at here."""
    return bytes([number + 1]) * 700


def write(folder):
    """A tar with its index, and a Parquet file, of the same samples."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ('tar', 'parquet'):
        (folder / name).mkdir(parents=True)
    with tarfile.open(folder / 'tar/train.tar', 'w') as opened:
        for number in range(NUM):
            for name, data in ((f'{number:02d}.jpg', content(number)),
                               (f'{number:02d}.cls', str(number).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                opened.addfile(member, BytesIO(data))
    table = pyarrow.table(dict(label=list(range(NUM)), image=[
        dict(bytes=content(number), path=f'{number}.jpg') for number in range(NUM)]))
    parquet.write_table(table, folder / 'parquet/train.parquet', row_group_size=5,
                        write_page_checksum=True)


def samples(root):
    """(bytes, label) of each sample, or the sentence that refuses them."""
    try:
        dataset = DATASETS.build(dict(type='ImageNetShards', data_root=str(root), pipeline=[]))
        infos = [dataset.get_data_info(index) for index in range(len(dataset))]
        return [(get(info['img_path']), info['gt_label']) for info in infos]
    except (DataError, OSError) as error:
        return str(error)


def mutate_index(rng, text):
    """Give a value somewhere in an index another one, or take it away."""
    index = json.loads(text)
    places, todo = [], [index]
    while todo:
        node = todo.pop()
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            todo += [value] if isinstance(value, (dict, list)) else []
    node, key = places[rng.integers(len(places))]
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(index).encode()


def damaged_tar(rng, original):
    """In a header, most of the time: pixels are the image reader's matter."""
    if rng.random() < 0.3:
        return mutate(rng, original)
    with tarfile.open(fileobj=BytesIO(original)) as opened:
        starts = [member.offset for member in opened]
    at = starts[rng.integers(len(starts))] + int(rng.integers(512))
    kind = rng.integers(4)
    if kind == 0:
        return original[:at]
    if kind == 1:
        return original[:at] + bytes([original[at] ^ 1 << rng.integers(8)]) + original[at + 1:]
    if kind == 2:
        return original[:at] + bytes(rng.integers(1, 600)) + original[at:]
    return original[:at] + bytes(512) + original[at + 512:]     # a block that was never written


def shards(rng, num):
    """Yield, for each of ``num`` damages, what is wrong with what is read, or None."""
    init_default_scope('mmpretrain')
    folder, expected = Path('shards'), [(content(number), number) for number in range(NUM)]
    write(folder)
    assert samples(folder / 'tar') == samples(folder / 'parquet') == expected
    files = [folder / 'tar/train.tar', folder / 'parquet/train.parquet', folder / 'tar' / INDEX]
    originals = [file.read_bytes() for file in files]
    for number in range(num):
        tar, table, index = files
        file, original = files[number % 3], originals[number % 3]
        if file != index:
            index.unlink(missing_ok=True)
        if file == tar:
            damaged = damaged_tar(rng, original)
        elif file == index and rng.random() < 0.5:
            damaged = mutate_index(rng, original)
        else:
            damaged = mutate(rng, original)
        file.write_bytes(damaged)
        try:
            with no_hang():
                read = samples(file.parent)
        except (Exception, HangError) as error:
            read = None
            yield f'{file.name} {number}: {type(error).__name__}: {error}'
        if isinstance(read, str):
            named = file.name in read and '\n' not in read and file != index
            yield None if named else f'{file.name} {number}: {read}'
        elif read is not None:
            # of a tar that was read, pixels may differ
            same = [label for _, label in read] == list(range(NUM)) if file == tar else (
                read == expected)
            yield None if same else f'{file.name} {number}: other samples, {len(read)}'
        file.write_bytes(original)
