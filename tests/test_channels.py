"""Images of one channel, of three and of more: training, tools, conversion, and first weights."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from mmpretrain.models.utils.data_preprocessor import SelfSupDataPreprocessor
from PIL import Image

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.datasets.transforms.timm_augment import TimmRandAugment
from nepa_mm.models.data_preprocessor import NEPADataPreprocessor
from nepa_mm.models.vit import NEPAViT

from .conftest import TINY
from .tiny_runs import (
    load_tool,
    run_test,
    run_train,
    save_classifier,
    save_pretraining,
)

predict, visualize, knn, convert, export = (load_tool(name).main for name in (
    'predict', 'visualize', 'knn', 'convert_checkpoint', 'export'))
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit_to(config, channels, color_type):
    """Let a config read files of so many channels, and make the files."""
    suffix = '.png' if channels in (1, 3) else '.npy'
    for old in [file for file in Path('data').rglob('*') if file.is_file()]:
        array = RNG.integers(0, 256, (28, 28, channels), dtype=np.uint8)
        old.unlink()
        if suffix == '.npy':
            np.save(old.with_suffix(suffix), array)
        else:
            Image.fromarray(array.squeeze()).save(old.with_suffix(suffix))
    cfg = Config.fromfile(config)
    cfg.model.backbone.in_channels = channels
    cfg.model.data_preprocessor.update(mean=[127.5] * channels, std=[127.5] * channels, to_rgb=True)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if name in cfg:
            cfg[name].dataset.extensions = [suffix]
            cfg[name].dataset.pipeline[0] = dict(type='LoadImageWithPillow', color_type=color_type)
    cfg.dump(config)
    return str(next(Path('data').rglob(f'*{suffix}')))


@pytest.mark.parametrize('channels, color_type', [
    (1, 'grayscale'), (4, 'unchanged'), (13, 'unchanged')])
def test_whole_way(channels, color_type, capsys):
    """Pretraining, fine-tuning from it, test, k-NN, pictures, conversion and back, export."""
    config = save_pretraining()
    image = fit_to(config, channels, color_type)
    run_train([config, '--work-dir', 'pretrained'])
    visualize([config, 'pretrained/epoch_1.pth', image, '--size', '28'])
    assert Path(f'visualization/{Path(image).stem}.png').is_file()

    config, _ = save_classifier()
    image = fit_to(config, channels, color_type)
    cfg = Config.fromfile(config)
    cfg.model.backbone.fc_norm = True
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='pretrained/epoch_1.pth', prefix='backbone.')
    cfg.train_dataloader.dataset.pipeline = [
        dict(type='LoadRandomResizedCrop', scale=28, color_type=color_type),
        dict(type='PackInputs')]
    cfg.dump(config)
    run_train([config, '--work-dir', 'tuned'])
    metrics = run_test([config, 'tuned/epoch_1.pth', '--show-dir', 'shown'])
    assert len(list(Path('shown').glob('*.png'))) == 8
    assert set(metrics) == {'accuracy/top1', 'accuracy/top5'}
    assert set(knn([config, 'tuned/epoch_1.pth', '-k', '1'])) == {'top1', 'top5'}
    predict([image, '--model', config, '--checkpoint', 'tuned/epoch_1.pth'])
    assert Path(f'predictions/{Path(image).stem}.png').is_file()

    convert(['tuned/epoch_1.pth', 'theirs', '--to', 'hf'])
    assert json.loads(Path('theirs/config.json').read_text())['num_channels'] == channels
    convert(['theirs', 'back.safetensors'])
    weights = read_checkpoint('tuned/epoch_1.pth')['state_dict']
    back = read_checkpoint('back.safetensors')['state_dict']
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert Config.fromfile('back.py').model.backbone.in_channels == channels
    assert run_test([config, 'back.safetensors']) == metrics
    export([config, 'tuned/epoch_1.pth', '--format', 'torch-export', '--size', '28', '28',
            '--out', 'out.pt2'])
    program = torch.export.load('out.pt2').module()
    assert program(torch.zeros(2, channels, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize('channels', [1, 6])
def test_3_channel_weights(channels):
    """A grey image gives the same in the adapted network as in three equal channels."""
    config = save_pretraining()
    fit_to(config, 3, 'color')
    run_train([config, '--work-dir', 'old'])
    Path('old/epoch_1.pth').rename('old.pth')
    cfg = Config.fromfile(config)
    old = MODELS.build(cfg.model)
    old.load_state_dict(read_checkpoint('old.pth')['state_dict'])
    fit_to(config, channels, 'grayscale' if channels == 1 else 'unchanged')
    cfg = Config.fromfile(config)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='old.pth', prefix='backbone.',
                                       adapt_input_conv=True)
    cfg.optim_wrapper.optimizer.lr = 0.
    cfg.dump(config)
    new = run_train([config, '--work-dir', 'new']).model.eval()
    grey = torch.randn(2, 1, 28, 42)
    expected = old.eval()(grey.expand(-1, 3, -1, -1), mode='tensor')
    found = new(grey.expand(-1, channels, -1, -1), mode='tensor')
    torch.testing.assert_close(found, expected)
    w3 = old.backbone.patch_embed.projection.weight
    wanted = (w3.sum(1, keepdim=True) if channels == 1 else torch.cat([w3, w3], 1) / 2)
    torch.testing.assert_close(new.backbone.patch_embed.projection.weight, wanted, rtol=0, atol=0)


def test_not_adapted_unless_asked():
    torch.save(NEPAViT(TINY).state_dict(), 'old.pth')
    network = NEPAViT(TINY, in_channels=4, init_cfg=dict(type='Pretrained', checkpoint='old.pth'))
    with pytest.raises(ValueError, match=r'\(32, 3, 14, 14\), but \(32, 4, 14, 14\) is needed; '
                       r'adapt_input_conv=True in init_cfg adapts weights for 3 channels\.$'):
        network.init_weights()
    torch.save(network.state_dict(), 'four.pth')
    other = NEPAViT(TINY, in_channels=1, init_cfg=dict(
        type='Pretrained', checkpoint='four.pth', adapt_input_conv=True))
    with pytest.raises(ValueError, match='four.pth has weights for 4 channels; adapt_input_conv'):
        other.init_weights()


def refusal(tool, args, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(args)
    sentence = capsys.readouterr().err
    assert stop.value.code == 2 and sentence.count('\n') == 1, sentence
    return sentence


@pytest.mark.parametrize('change, words', [
    ({'model.backbone.in_channels': 1}, 'mean of the data_preprocessor has 3 values, but the '
     "backbone's in_channels=1"),
    ({'model.backbone.in_channels': 1, 'model.data_preprocessor.mean': [127.5],
      'model.data_preprocessor.std': [127.5]}, "train_dataloader reads 3 channels "
     "(color_type='color'), but the backbone's in_channels=1; set color_type of its "
     "LoadImageWithPillow to 'grayscale'"),
    ({'model.backbone.in_channels': 4, 'model.data_preprocessor.mean': [1.] * 4,
      'model.data_preprocessor.std': [1.] * 4, 'train_dataloader.dataset.pipeline.0.color_type':
      'unchanged', 'train_dataloader.dataset.pipeline.1.backend': 'pillow'},
     "Resize with backend='pillow' supports 1 and 3 channels"),
    ({'train_dataloader.dataset.pipeline.0.color_type': 'gray'}, 'color_type must be one of')])
def test_before_the_first_step(change, words, capsys):
    config = save_pretraining()
    fit_to(config, 3, 'color')
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(change)
    cfg.dump(config)
    assert words in refusal(run_train, [config, '--work-dir', 'work'], capsys)
    assert not Path('work').exists()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('array, words', [
    (np.zeros((28, 28, 5), np.uint8), 'has 5 channels, but the network in_channels=4.'),
    (np.zeros((4, 28, 28), np.uint8), 'has 28 channels, but the network in_channels=4.'),
    (np.zeros((28, 28), np.uint8), 'A batch needs images of one shape, but the pipeline makes'),
    (np.full((28, 28, 4), np.nan), 'has pixels that are not finite (nan or infinite).')])
def test_odd_file_among_many(array, words, workers, capsys):
    config, _ = save_classifier()
    fit_to(config, 4, 'unchanged')
    np.save('data/val/e/6.npy', array)
    sentence = refusal(run_train, [config, '--work-dir', 'work', '--cfg-options',
                                   f'train_dataloader.num_workers={workers}'], capsys)
    assert words in sentence and 'data/val/e/6.npy' in sentence


@pytest.mark.parametrize('size', [20, 7])
def test_no_whole_number_of_patches(size, capsys):
    sentence = refusal(run_train, [save_pretraining(), '--work-dir', 'work', '--cfg-options',
                                   f'train_dataloader.dataset.pipeline.1.scale=({size},{size})'],
                       capsys)
    assert f'The image of {size}x{size} pixels is' in sentence
    assert not Path('work').exists()


def test_other_channels_at_the_first_layer():
    network = NEPAViT(TINY, in_channels=4)
    with pytest.raises(ValueError, match='The image has 3 channels, but the network in_channels=4'):
        network(torch.zeros(1, 3, 28, 28))


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b''.join(n.to_bytes(4, 'big') for n in array.shape)
    return head + array.tobytes()


@pytest.fixture
def mnist():
    """Files as the real data set has them, of ten images."""
    Path('mnist').mkdir()
    images, labels = RNG.integers(0, 256, (10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)
    for split in ('train', 't10k'):
        Path(f'mnist/{split}-images-idx3-ubyte').write_bytes(idx(images))
        Path(f'mnist/{split}-labels-idx1-ubyte').write_bytes(idx(labels))
    return images


@pytest.mark.parametrize('kind', ['MNIST', 'FashionMNIST'])
@pytest.mark.parametrize('in_channels', [1, 3])
def test_grey_data_sets(mnist, kind, in_channels):
    """One channel for in_channels=1; three equal ones by a mean of three values."""
    config = save_pretraining()
    cfg = Config.fromfile(config)
    cfg.train_dataloader.dataset = dict(
        type=kind, data_root='mnist', split='train',
        pipeline=[dict(type='RandomResizedCrop', scale=28, backend='pillow'),
                  dict(type='RandomFlip', prob=0.5), dict(type='TimmRandAugment'),
                  dict(type='PackInputs')])
    cfg.model.backbone.in_channels = in_channels
    cfg.model.data_preprocessor.update(
        mean=[127.5] * in_channels, std=[127.5] * in_channels, to_rgb=True)
    cfg.dump(config)
    runner = run_train([config, '--work-dir', 'work'])
    assert runner.iter == 5
    sample = DATASETS.build(dict(cfg.train_dataloader.dataset,
                                 pipeline=[dict(type='PackInputs')]))[3]
    found = runner.model.data_preprocessor(dict(inputs=sample['inputs'][None]))['inputs']
    expected = (torch.from_numpy(mnist[3]).float() - 127.5) / 127.5
    assert torch.equal(found, expected.expand(1, in_channels, 28, 28))


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('values', [1, 3])
@pytest.mark.parametrize('views', [None, 2])
def test_as_mmpretrains_preprocessor(channels, values, views):
    args = dict(mean=[float(i + 100) for i in range(values)],
                std=[float(i + 50) for i in range(values)])
    args['to_rgb'] = channels == 3      # of one channel the parent class fails
    batch = torch.randint(0, 256, (2, channels, 28, 28), dtype=torch.uint8)
    inputs = batch if views is None else [batch, 255 - batch]
    expected = SelfSupDataPreprocessor(**args)(dict(inputs=inputs, data_samples=[1, 2]))
    found = NEPADataPreprocessor(**args)(dict(inputs=inputs, data_samples=[1, 2]))
    for one, other in zip(*([x['inputs']] if views is None else x['inputs']
                            for x in (found, expected))):
        assert torch.equal(one, other)


def test_four_channels_are_not_reversed():
    batch = torch.randint(0, 256, (2, 4, 28, 28), dtype=torch.uint8)
    mean, std = torch.arange(4.), torch.arange(1., 5.)
    found = NEPADataPreprocessor(mean=mean.tolist(), std=std.tolist(), to_rgb=True)(
        dict(inputs=batch))['inputs']
    assert torch.equal(found, (batch - mean.view(4, 1, 1)) / std.view(4, 1, 1))
    with pytest.raises(ValueError, match='have 3 values, but the images 4 channels'):
        NEPADataPreprocessor(mean=[1.] * 3, std=[1.] * 3)(dict(inputs=batch))
    with pytest.raises(ValueError, match='one value each, or one for each channel'):
        NEPADataPreprocessor(mean=[1.] * 3, std=[1.])


def test_augmented_grey_is_what_equal_channels_become():
    grey = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
    for seed in range(200):
        found = []
        for img in (grey, grey[..., None], np.dstack([grey] * 3)):
            np.random.seed(seed)
            random.seed(seed)
            result = TimmRandAugment('rand-m5-mstd0.5-inc1')(dict(img=img))['img']
            assert result.shape == img.shape and result.dtype == np.uint8
            found.append(result if result.ndim == 2 else result[..., 0])
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    with pytest.raises(ValueError, match='1 or 3 channels, got 4'):
        TimmRandAugment()(dict(img=np.zeros((9, 9, 4), np.uint8)))
