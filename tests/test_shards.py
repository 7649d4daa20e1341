"""Tar and Parquet shards hold the same samples as a folder, in an order of their own."""
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow
import pytest
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.fileio import get
from mmengine.registry import DATASETS, init_default_scope
from pyarrow import parquet

from nepa_mm.datasets import tar_index
from nepa_mm.utils.errors import DataError

from .tiny_runs import run_script, run_train, save_image, save_pretraining

PIPELINE = [dict(type='LoadImageWithPillow'), dict(type='PackInputs')]


def add(opened, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    opened.addfile(member, BytesIO(content))


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Seven JPEGs: (name, bytes, label) each."""
    monkeypatch.chdir(tmp_path)
    init_default_scope('mmpretrain')
    for index in range(7):
        save_image(Path(f'single/n{index}.1.JPEG'), (30 + index, 28))
    return [(path.stem, path.read_bytes(), index)
            for index, path in enumerate(sorted(Path('single').iterdir()))]


def save_tars(images, labels=True):
    Path('tars/more').mkdir(parents=True)
    for file, part in (('tars/in-train-00.tar', images[:4]), ('tars/more/in-train-01.tar',
                                                            images[4:])):
        with tarfile.open(file, 'w') as opened:
            for name, content, label in part:
                if labels:
                    add(opened, f'./{name.split(".")[0]}.cls', str(label).encode())
                add(opened, f'./{name.split(".")[0]}.jpg', content)
                add(opened, f'./{name.split(".")[0]}.json', b'{}')


def save_parquet(images):
    Path('parquet/data').mkdir(parents=True)
    for number, part in enumerate((images[:3], images[3:])):
        table = pyarrow.table(dict(
            image=[dict(bytes=content, path=name) for name, content, _ in part],
            label=[label for *_, label in part]))
        parquet.write_table(table, f'parquet/data/train-0000{number}-of-00002.parquet',
                            row_group_size=2)


def build(root, **kwargs):
    return DATASETS.build(dict(type='ImageNetShards', data_root=root, pipeline=PIPELINE, **kwargs))


@pytest.mark.parametrize('save, root', [(save_tars, 'tars'), (save_parquet, 'parquet')])
def test_samples(images, save, root):
    save(images)
    dataset = build(root)
    assert len(dataset) == 7 and len(dataset.metainfo['classes']) == 1000
    for index, (_, content, label) in enumerate(images):
        info = dataset.get_data_info(index)
        assert get(info['img_path']) == content and info['gt_label'] == label
        sample = dataset[index]
        assert sample['inputs'].shape == (3, 28, 30 + index)
        assert sample['data_samples'].gt_label.item() == label
    assert 'gt_label' not in build(root, with_label=False).get_data_info(0)
    with pytest.raises(FileNotFoundError, match="no .tar and no .parquet files with 'val' in"):
        build(root, split='val')
    assert list(DefaultSampler(dataset, shuffle=False)) == list(range(7))


def test_every_image_of_a_tar_is_a_sample(images):
    """Names with dots, and several images of one sample."""
    names = ['2024.01.30', '2024.01.31', '2024.02.01', 'a.left', 'a.right', './b/2024.01.30', 'c']
    Path('tars').mkdir()
    with tarfile.open('tars/train.tar', 'w') as opened:
        for name, (_, content, label) in zip(names, images):
            add(opened, f'{name}.jpg', content)
            if not name.startswith('a'):
                add(opened, f'{name}.cls', str(label).encode())
        add(opened, 'a.cls', b'3')
        add(opened, 'c.png', images[0][1])
    infos = [build('tars').get_data_info(index) for index in range(8)]
    assert [info['gt_label'] for info in infos] == [0, 1, 2, 3, 3, 5, 6, 6]
    assert [get(info['img_path']) for info in infos] == [
        content for _, content, _ in images] + [images[0][1]]


def test_names_of_a_tar(images):
    """Files of macOS beside each other one are no images; two samples of one name are refused."""
    Path('tars').mkdir()
    _, content, _ = images[0]
    for names, sentence in ((['._a', 'a'], None), (['a', 'a'], "a.jpg' is there twice"),
                            (['._a'], 'holds no image')):
        with tarfile.open('tars/train.tar', 'w') as opened:
            for name in names:
                add(opened, f'{name}.jpg', content)
                add(opened, f'{name}.cls' if name == 'a' else f'{name}.txt', b'1')
        if sentence:
            with pytest.raises(ValueError, match=sentence):
                build('tars')
        else:
            assert len(build('tars')) == 1


def test_the_index_of_tars_is_kept(images, monkeypatch):
    save_tars(images)
    paths = [build('tars').get_data_info(index)['img_path'] for index in range(7)]
    stored = Path('tars', tar_index.INDEX)
    assert set(json.loads(stored.read_text())) == {'in-train-00.tar', 'more/in-train-01.tar'}

    with monkeypatch.context() as patch:        # not read again
        patch.setattr(tar_index, 'index_tar', None)
        assert [build('tars').get_data_info(index)['img_path'] for index in range(7)] == paths
    stored.write_text('{"in-tr')                # a damaged index is made again
    assert len(build('tars')) == 7
    Path('tars/in-train-00.tar').unlink()
    Path('tars/more/in-train-01.tar').rename('tars/in-train-00.tar')
    assert len(build('tars')) == 3              # another file of that name


def test_refusals(images):
    save_tars(images, labels=False)
    with pytest.raises(ValueError, match="n0.jpg' in .*in-train-00.tar has no label"):
        build('tars')
    dataset = build('tars', with_label=False)
    content = Path('tars/in-train-00.tar').read_bytes()
    Path('tars/in-train-00.tar').write_bytes(content[:1000])
    with pytest.raises(ValueError, match='image shard:.*n0.jpg cannot be read: .*ends after'):
        dataset[0]
    Path('tars/in-train-00.tar').write_text('no tar')
    with pytest.raises(ValueError, match='in-train-00.tar is no tar of images and labels'):
        build('tars')
    Path('other').mkdir()
    Path('other/train.parquet').write_text('no parquet')
    with pytest.raises(ValueError, match='train.parquet is no Parquet file with the columns image'):
        build('other')
    save_parquet(images)
    with pytest.raises(ValueError, match='columns picture and label: it has the columns'):
        build('parquet', image_column='picture')


def save_tar(*members, tail=b''):
    Path('tars').mkdir(exist_ok=True)
    with tarfile.open('tars/train.tar', 'w') as opened:
        for name, content in members:
            add(opened, name, content)
    with open('tars/train.tar', 'ab') as file:
        file.write(tail)


def cut(size):
    with open('tars/train.tar', 'r+b') as file:
        file.truncate(size)


@pytest.mark.parametrize('label, sentence', [
    (b'cat', "holds b'cat', not the number of a class"), (b'-1', "holds b'-1', not"),
    (b'', "holds b'', not"), (b'9' * 5000, "holds b'999"), (b'1000', 'no number from 0 to 999'),
    ('\u0663'.encode(), 'not the number')])
def test_wrong_labels(images, label, sentence):
    save_tar(('a.jpg', images[0][1]), ('a.cls', label))
    with pytest.raises(DataError, match='train.tar') as error:
        build('tars')
    assert sentence in str(error.value)


def test_tars_that_end_early(images):
    """At any byte, with and without an index; only the zeros at the end can be spared."""
    members = [(f'{i}.{kind}', b'1') for i in range(3) for kind in ('jpg', 'cls')]
    save_tar(*members)
    assert len(build('tars')) == 3
    for size in range(0, 6 * 1024 + 512, 256):
        save_tar(*members)
        cut(size)
        for _ in range(2):
            with pytest.raises(DataError, match='train.tar is no tar of images'):
                build('tars')
    save_tar(*members)
    cut(6 * 1024 + 512)
    assert len(build('tars')) == 3
    save_tar(*members, tail=b'more')
    with pytest.raises(DataError, match='train.tar .* is damaged, or another archive'):
        build('tars')


def test_odd_members(images):
    link = tarfile.TarInfo('b.jpg')
    link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
    Path('tars').mkdir()
    with tarfile.open('tars/train.tar', 'w') as opened:
        opened.addfile(link)
    with pytest.raises(DataError, match="'b.jpg' is no plain file"):
        build('tars')
    name = b'\xff\xe9'.decode(errors='surrogateescape')     # in Latin-1
    save_tar((f'{name}.jpg', images[0][1]), (f'{name}.cls', b'3'))
    Path('tars/train.tar').rename(f'tars/train-{name}.tar')
    for _ in range(2):
        assert build('tars')[0]['data_samples'].gt_label.item() == 3
    Path('tars/train-2.tar').symlink_to('nowhere')
    with pytest.raises(DataError, match='train-2.tar is no file, or a dangling link'):
        build('tars')


@pytest.mark.parametrize('place', [[0, 10 ** 9], [10 ** 9, 1], [-512, 1], ['0', 1], [True, 1],
                                   [0, None], [0]], ids=str)
def test_hostile_index(images, place):
    """With the right checksum; what it says is not in the file."""
    save_tars(images)
    build('tars')
    stored = Path('tars', tar_index.INDEX)
    index = json.loads(stored.read_text())
    for entry in index.values():
        entry['images'] = [['a.jpg', *place, 1]]
        entry['digest'] = tar_index._digest(entry['images'])
    stored.write_text(json.dumps(index))
    assert len(build('tars')) == 7


@pytest.mark.parametrize('table, sentence', [
    (dict(image=[dict(bytes=b'a', path='a')], label=[None]), 'has no label'),
    (dict(image=[dict(bytes=b'a', path='a')], label=['cat']), "the label 'cat', which is no"),
    (dict(image=[dict(bytes=b'a', path='a')], label=[-1]), 'the label -1, which is no'),
    (dict(image=[b'a'], label=[1]), 'image holds binary, not bytes'),
    (dict(image=['a'], label=[1]), 'image holds string, not bytes'),
    (dict(image=[dict(path='a')], label=[1]), 'not bytes'),
    (dict(picture=[1], label=[1]), 'it has the columns')], ids=str)
def test_odd_tables(images, table, sentence):
    Path('parquet').mkdir()
    parquet.write_table(pyarrow.table(table), 'parquet/train.parquet')
    with pytest.raises(DataError, match='train.parquet') as error:
        build('parquet')
    assert sentence in str(error.value)


def test_rows_without_bytes(images):
    Path('parquet').mkdir()
    parquet.write_table(pyarrow.table(dict(
        image=[dict(bytes=images[0][1], path='a'), dict(bytes=None, path='b'), None],
        label=[1, 1, 1])), 'parquet/train.parquet')
    dataset = build('parquet')
    for row in (1, 2):
        with pytest.raises(DataError, match=f'train.parquet cannot be read at row {row}: it has'):
            dataset[row]


@pytest.mark.parametrize('save, root', [(save_tars, 'tars'), (save_parquet, 'parquet')])
def test_training_with_workers(images, save, root):
    save(images)
    cfg = Config.fromfile(save_pretraining())
    cfg.train_dataloader.update(num_workers=2, persistent_workers=False)
    steps = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset = dict(type='ImageNetShards', data_root=root, pipeline=[
        dict(type='LoadRandomResizedCrop', scale=28), steps[-1]])
    cfg.dump('shards.py')
    assert run_train(['shards.py', '--work-dir', 'work']).iter == 4


@pytest.mark.parametrize('suffix', ['tar', 'parquet'])
def test_damage_as_a_command(images, suffix):
    """One flipped bit in the header of the third member, or in the last bytes of a table."""
    (save_tars if suffix == 'tar' else save_parquet)(images)
    file = next(path for path in sorted(Path().rglob(f'*.{suffix}')))
    content = bytearray(file.read_bytes())
    content[content.index(b'ustar', 1024 + 512) if suffix == 'tar' else -1] ^= 1
    file.write_bytes(content)
    cfg = Config.fromfile(save_pretraining())
    cfg.train_dataloader.num_workers = 2
    cfg.train_dataloader.dataset = dict(
        type='ImageNetShards', data_root=file.parts[0], pipeline=PIPELINE)
    cfg.dump('shards.py')
    code, said = run_script('train.py', 'shards.py', cwd=Path.cwd())
    assert code == 2 and said.count('error: ') == 1 and 'Traceback' not in said, said
    assert file.name in said.splitlines()[-1] and not list(Path().rglob('.nepa_mm_index*'))
