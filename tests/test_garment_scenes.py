"""Scenes of clothes: what the writer draws, and what the configs train on it."""
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmpretrain.datasets import FashionMNIST
from PIL import Image

from make_garment_scenes import garment_scene, write_garment_scenes
from nepa_mm.datasets import FashionMNISTSubset

from .conftest import REPO
from .tiny_runs import load_tool, options, refused, run_train

CONFIGS = REPO / 'configs' / 'fashion_mnist'
needs_mmseg = pytest.mark.skipif(not find_spec('mmseg'), reason='needs mmseg')


@pytest.fixture
def data(folder):
    """Four files like Fashion-MNIST's: 20 bright blocks a split, of width 8 + class."""
    images = np.zeros((20, 28, 28), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for image, label in zip(images, labels):
        image[4:24, 10 - label // 2:18 + (label + 1) // 2] = 150 + 10 * label
    for split in ('train', 't10k'):
        for name, array in (('images-idx3', images), ('labels-idx1', labels)):
            head = (0x800 + array.ndim, *array.shape)
            path = Path(f'fashion/{split}-{name}-ubyte')
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(np.array(head, '>i4').tobytes() + array.tobytes())
    return 'fashion'


@pytest.mark.parametrize('extra', [{}, dict(test_mode=False), dict(test_mode=True)])
def test_splits_read_their_own_files(extra, data):
    """mmpretrain's class reads the training images for split='test' without test_mode."""
    labels = Path(data, 't10k-labels-idx1-ubyte')
    labels.write_bytes(labels.read_bytes()[:8] + bytes([9] * 20))
    found = {split: {int(sample['gt_label']) for sample in FashionMNISTSubset(
        data_root=data, split=split, pipeline=[], **extra)} for split in ('train', 'test')}
    assert found == dict(train=set(range(10)), test={9})


@pytest.mark.parametrize('name', ['finetune', 'finetune_mae', 'linear', 'attentive'])
def test_classifiers_are_scored_on_test_images(name, data):
    labels = Path(data, 't10k-labels-idx1-ubyte')
    labels.write_bytes(labels.read_bytes()[:8] + bytes([9] * 20))
    cfg = Config.fromfile(CONFIGS / f'fashion_{name}.py').val_dataloader.dataset
    dataset = DATASETS.build({**cfg, 'data_root': data})
    assert {int(dataset.get_data_info(i)['gt_label']) for i in range(20)} == {9}


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def test_scenes(data):
    """ADE20K's layout; labels lie on the garments; a scene depends on its number alone."""
    write_garment_scenes('a', 4, 2, data=data)
    write_garment_scenes('b', 2, 2, data=data)
    write_garment_scenes('c', 1, 1, seed=1, data=data)
    for part, num in (('training', 4), ('validation', 2)):
        images = sorted(Path('a/images', part).iterdir())
        assert [path.name for path in images] == [f'{i:05d}.jpg' for i in range(num)]
        for path in images:
            image, label = read(path), read(f'a/annotations/{part}/{path.stem}.png')
            assert image.shape == label.shape == (56, 56) and label.max() <= 11
            assert image[label == 1].mean() < 60
            for value in set(np.unique(label)) - {0, 1}:
                brightness = 150 + 10 * (value - 2)
                assert abs(np.median(image[label == value]) - brightness) < 10
    first = 'images/training/00000.jpg'
    assert Path('a', first).read_bytes() == Path('b', first).read_bytes()
    assert Path('a', first).read_bytes() != Path('c', first).read_bytes()


def test_training_scenes_show_training_images(data):
    labels = Path(data, 't10k-labels-idx1-ubyte')
    labels.write_bytes(labels.read_bytes()[:8] + bytes([9] * 20))
    write_garment_scenes('a', 4, 4, data=data)
    found = {part: {value for path in Path('a/annotations', part).iterdir()
                    for value in np.unique(read(path))} for part in ('training', 'validation')}
    assert found['validation'] == {0, 1, 11} and len(found['training']) > 3


def test_four_garments_that_stay_inside():
    """Also the largest ones, which fill their image."""
    full = [dict(img=torch.full((28, 28), 255, dtype=torch.uint8), gt_label=label)
            for label in range(10)]
    for seed in range(20):
        label = garment_scene(np.random.default_rng(seed), full)[1]
        sizes = [(label == value).sum() for value in range(2, 12)]
        assert 1 <= np.count_nonzero(sizes) <= 4
        assert 4 * (20 - 2) ** 2 - 4 * 2 * 28 < sum(sizes) <= 56 * 56


def test_command(data):
    """It writes twice, but not among files of others, and never without images."""
    tool = load_tool('make_garment_scenes').main
    for _ in range(2):
        tool(['--data', data, '--out', 'new', '--train', '2', '--val', '1'])
    assert len(list(Path('new').rglob('*.png'))) == 3
    Path('mine').mkdir()
    Path('mine/a.txt').touch()
    with refused('mine exists already'):
        tool(['--data', data, '--out', 'mine', '--train', '1', '--val', '1'])
    assert [path.name for path in Path('mine').iterdir()] == ['a.txt']


@needs_mmseg
@pytest.mark.parametrize('name, settings, trained', [
    ('segment_linear', (), 'decode_head'),
    ('segment_linear', ('frozen_stages=-1', 'block=0'), 'backbone.patch_embed'),
    ('upernet', (), 'backbone.patch_embed')])
def test_configs_train(name, settings, trained, data):
    """One step on two of four scenes, and a validation."""
    write_garment_scenes('scenes', 4, 3, data=data)
    small = ('num_scenes=2', 'pretrained=None', 'iters=2', *settings,
             'param_scheduler.0.end=1', 'train_dataloader.batch_size=2')
    roots = [f'{part}_dataloader.dataset.data_root=scenes' for part in ('train', 'val', 'test')]
    runner = run_train([str(CONFIGS / f'fashion_{name}.py'), '--work-dir', 'run',
                        *options(*small, *roots)])
    assert runner.iter == 2 and len(runner.train_dataloader.dataset) == 2
    assert 0 <= runner.message_hub.get_scalar('val/mIoU').current() <= 100
    groups = [n for n, p in runner.model.named_parameters() if p.requires_grad]
    assert any(n.startswith(trained) for n in groups)
    frozen = 'frozen_stages=-1' not in settings and name == 'segment_linear'
    assert frozen == (not any(n.startswith('backbone') for n in groups))


@pytest.mark.parametrize('name', ['segment_linear', 'upernet'])
def test_classes_and_settings(name):
    cfg = Config.fromfile(CONFIGS / f'fashion_{name}.py')
    letters = [re.sub('[^a-z]', '', text.lower()) for text in FashionMNIST.METAINFO['classes']]
    classes = cfg.val_dataloader.dataset.metainfo.classes
    assert [re.sub('[^a-z]', '', text.lower()) for text in classes[1:]] == letters
    assert cfg.model.backbone.causal == (name == 'segment_linear')
    wanted = Config.fromfile(CONFIGS / 'fashion_pretrain.py').model.backbone
    found = cfg.model.backbone
    assert {**wanted.arch, '_delete_': True} == {**found.arch, '_delete_': True}
    for key in ('patch_size', 'in_channels', 'layer_scale_init_value'):
        assert wanted[key] == found[key]
