"""Folders of one's own: what is found in them, and how they are divided."""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nepa_mm.datasets.classes import skipped_images
from nepa_mm.datasets.folders import ImageFolder
from nepa_mm.datasets.mask_folders import ImageMaskFolder
from nepa_mm.datasets.splits import held_out
from nepa_mm.utils.errors import DataError

from .tiny_runs import save_image


def paths(dataset):
    return [dataset.get_data_info(index)['img_path'] for index in range(len(dataset))]


def test_any_folder(folder, caplog):
    """Nested and flat, every suffix in any case, blanks and umlauts; other and hidden files not."""
    names = ['a.JPG', 'deep/er/ä ö.webp', 'deep/b.tif', 'c d/e.png', 'f.jpeg', 'g.gif']
    for name in names:
        save_image(folder / 'photos' / name)
    for name in ('notes.txt', '._a.jpg', 'Thumbs.db'):
        (folder / 'photos' / name).write_text('none')
    dataset = ImageFolder('photos/', with_label=False)
    assert paths(dataset) == sorted(f'photos/{name}' for name in names)
    assert '6 images in photos (1 .jpg' in dataset.found


@pytest.fixture
def classes(folder):
    for name, num in dict(ant=10, bee=5, cat=2).items():
        for index in range(num):
            save_image(folder / 'data' / name / 'more' / f'{index}.png')
    return folder / 'data'


def test_a_part_of_every_class_is_kept(classes, monkeypatch):
    train, val = (ImageFolder('data', split=split) for split in ('train', 'val'))
    assert not set(paths(train)) & set(paths(val)) and len(train) + len(val) == 17
    assert [list(val.get_gt_labels()).count(label) for label in range(3)] == [2, 1, 1]
    assert train.metainfo['classes'] == val.metainfo['classes'] == ('ant', 'bee', 'cat')
    assert val.found.endswith(
        '4 of them are for val, chosen by file name; classes: ant 2, bee 1, cat 1')
    for dataset in (train, val):
        assert skipped_images(dataset, 'data') == []
    # the same in another place, and with a file more at most one image changes sides
    os.rename('data', 'moved')
    moved = ImageFolder(str(classes.parent / 'moved'), split='val')
    assert [Path(path).relative_to(classes.parent / 'moved') for path in paths(moved)] == [
        Path(path).relative_to('data') for path in paths(val)]
    save_image(Path('moved/ant/new.png'))
    more = {Path(path).name for path in paths(ImageFolder('moved', split='val')) if 'ant' in path}
    assert len(more & {Path(path).name for path in paths(val) if 'ant' in path}) >= 1


def test_fraction():
    names = [f'IMG_{index:04d}.jpg' for index in range(200)]
    assert len(held_out(names, 0.25)) == 50 and held_out(names[::-1], 0.25) == held_out(names, 0.25)
    assert held_out(names, 0.1) < held_out(names, 0.2)
    assert len(held_out(names[:2], 0.01)) == len(held_out(names[:2], 0.99)) == 1
    assert held_out(names[:1], 0.5) == held_out([], 0.5) == set()
    # not the first ones, nor runs of neighbours, which often show the same
    kept = sorted(names.index(name) for name in held_out(names, 0.25))
    assert kept[0] < 40 and kept[-1] > 160 and np.diff(kept).max() < 30 > 1 < np.diff(kept).max()


def test_folders_train_and_val_come_first(classes):
    for split, num in dict(train=3, val=2).items():
        for name in 'ab':
            for index in range(num):
                save_image(Path('own', split, name, f'{index}.png'))
    assert len(ImageFolder('own', split='train')) == 6
    assert paths(ImageFolder('own', split='val'))[0] == 'own/val/a/0.png'
    assert len(ImageFolder('own', with_label=False)) == 10      # pretraining reads all


@pytest.mark.parametrize('make, error, message', [
    (dict(split='test'), ValueError, "split must be None, 'train' or 'val', got 'test'"),
    (dict(split='val', val_fraction=1), ValueError, 'val_fraction must be above 0 and below 1'),
    (dict(split='val', val_fraction='0.2'), ValueError, "below 1, got '0.2'"),
    (dict(data_root='flat', split='train'), DataError, 'flat has no folders of classes'),
    (dict(data_root='one', split='val'), DataError, "No image is left for split='val' in one"),
    (dict(data_root='half', split='val'), ValueError, 'half has a folder val, but no folder train'),
])
def test_what_cannot_be_divided(classes, make, error, message):
    for name in ('flat/0.png', 'one/a/0.png', 'half/val/a/0.png', 'half/a/0.png'):
        save_image(Path(name))
    with pytest.raises(error, match=message):
        ImageFolder(**{'data_root': 'data', **make})


def test_images_beside_the_classes_are_reported(classes):
    save_image(classes / 'lost.png')
    sentence, = skipped_images(ImageFolder('data', split='train'), 'train_dataloader')
    assert sentence == 'train_dataloader: 1 images below data are skipped, e.g. data/lost.png.'


@pytest.fixture
def scenes(folder):
    for index in range(10):
        save_image(folder / f'scenes/images/{index}{(".JPG", ".png", ".webp")[index % 3]}')
        (folder / 'scenes/masks').mkdir(exist_ok=True)
        Image.fromarray(np.zeros((28, 32), np.uint8)).save(folder / f'scenes/masks/{index}.png')
    return folder / 'scenes'


def test_images_and_masks(scenes):
    meta = dict(metainfo=dict(classes=('a', 'b')))
    train, val = (ImageMaskFolder('scenes', split=split, **meta) for split in ('train', 'val'))
    assert (len(train), len(val)) == (8, 2) and not set(paths(train)) & set(paths(val))
    for dataset in (train, val):
        for info in map(dataset.get_data_info, range(len(dataset))):
            assert Path(info['img_path']).stem == Path(info['seg_map_path']).stem
            assert Path(info['seg_map_path']).is_file()
    for split, num in dict(train=3, val=1).items():
        for index in range(num):
            save_image(Path('own/images', split, f'{index}.jpg'))
    own = ImageMaskFolder('own', split='train', **meta)
    assert len(own) == 3 and own.get_data_info(0)['seg_map_path'] == 'own/masks/train/0.png'
