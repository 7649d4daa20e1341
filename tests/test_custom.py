"""configs/custom: each runs on a folder, and everything follows the settings at its top."""
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from nepa_mm import apis
from nepa_mm.apis.settings import find_settings

from .conftest import REPO
from .tiny_runs import options, refused, run_test, run_train, save_image

CUSTOM = sorted((REPO / 'configs/custom').glob('*.py'))
TINY = ('embed_dims=32', 'num_layers=4', 'num_heads=2', 'image_size=32', 'epochs=2',
        'batch_size=4', 'num_workers=0')
NETWORK = ('patch_size', 'channels', 'mean', 'std', 'embed_dims', 'num_layers', 'num_heads')


def train(name, *settings, work=None):
    given = dict(option.split('=', 1) for option in (*TINY, *settings))
    return run_train([str(REPO / f'configs/custom/{name}.py'),
                      *options(*(f'{key}={value}' for key, value in given.items())),
                      '--work-dir', work or name])


def save_classes(count=5):
    for label, name in enumerate(('cat', 'dög', 'a hen')):
        for index in range(count):
            colour = [0, 0, 0]
            colour[label] = 255
            path = Path('data/classes', name, f'{index}.png')
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (40 + index, 36), tuple(colour)).save(path)


def save_scenes(channels=3):
    for index in range(10):
        mask = np.zeros((40, 44), np.uint8)
        mask[5:25, index:index + 20] = 1
        mask[:2] = 255
        pixels = np.repeat(200 * (mask[..., None] == 1), channels, axis=2).astype(np.uint8)
        for folder in ('images', 'masks'):
            Path('data/scenes', folder).mkdir(parents=True, exist_ok=True)
        if channels == 3:
            suffix = ('jpg', 'webp')[index % 2]
            Image.fromarray(pixels).save(f'data/scenes/images/{index}.{suffix}')
        else:
            Image.fromarray(pixels[..., 0]).save(f'data/scenes/images/{index}.png')
        Image.fromarray(mask).save(f'data/scenes/masks/{index}.png')


def test_settings_are_the_same_in_all_files():
    """A network that is pretrained by one is read by the others."""
    assert {path.stem for path in CUSTOM} == {'pretrain', 'finetune', 'linear', 'upernet'}
    first, *others = [find_settings(path) for path in CUSTOM]
    for settings in others:
        assert [settings[name] for name in NETWORK] == [first[name] for name in NETWORK]
    pretrain = find_settings(REPO / 'configs/custom/pretrain.py')
    for path in CUSTOM:
        checkpoint = find_settings(path).get('pretrained')
        assert checkpoint in (None, f'work_dirs/pretrain/epoch_{pretrain["epochs"]}.pth')


OTHER = dict(
    data_root='x', num_classes=7, classes=['a', 'b', 'c'], val_fraction=0.5, pretrained='y',
    image_size=64, patch_size=16, channels=1, mean=[1.], std=[2.], flip=0.25, embed_dims=64,
    num_layers=8, num_heads=2, epochs=40, batch_size=6, base_lr=0.5, lr=0.5, num_workers=1, block=2,
    decoder_channels=32)


@pytest.mark.parametrize('path', CUSTOM, ids=lambda path: path.stem)
def test_all_follows_the_settings(path, folder):
    """In a copy in any folder; what stays is no number of the settings in the file."""
    Path('my own.py').write_text(path.read_text())
    settings = find_settings('my own.py')
    cfg = apis.load_config('my own.py', {name: OTHER[name] for name in settings})
    arch = dict(embed_dims=64, num_layers=8, num_heads=2, feedforward_channels=256)
    backbone = cfg.model.backbone
    assert {name: backbone.arch[name] for name in arch} == arch
    assert (backbone.patch_size, backbone.in_channels) == (16, 1)
    assert cfg.model.data_preprocessor.mean == [1.] and cfg.model.data_preprocessor.std == [2.]
    assert cfg.param_scheduler.end == cfg.train_cfg.max_epochs == 40
    assert cfg.default_hooks.checkpoint.interval == 8
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size == 6
    loaders = [cfg[name] for name in ('train_dataloader', 'val_dataloader', 'test_dataloader')
               if cfg.get(name)]
    assert len(loaders) == (1 if path.stem == 'pretrain' else 3)
    for loader in loaders:
        assert loader.num_workers == 1 and loader.dataset.data_root == 'x'
        assert loader.dataset.pipeline[0].color_type == 'grayscale'
    if path.stem == 'upernet':
        assert cfg.optim_wrapper.optimizer.lr == 0.5
        assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 3
        assert cfg.model.backbone.out_indices == [1, 3, 5, 7]
        assert cfg.model.neck.rescales == [4, 2, 1, 0.5]
    else:
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.5 * 6 / 256)
    if path.stem in ('finetune', 'linear'):
        assert cfg.model.head.num_classes == 7 and cfg.model.head.in_channels == 64
        assert cfg.train_dataloader.dataset.val_fraction == 0.5
    if path.stem != 'pretrain':
        assert backbone.init_cfg.checkpoint == 'y'
        assert apis.load_config('my own.py', dict(pretrained=None)).model.backbone.init_cfg is None


def test_pretraining_then_all(folder, caplog):
    """One network through all four files, with mixed images and a broken one."""
    for index, suffix in enumerate(('jpg', 'png', 'webp', 'JPEG', 'tif', 'gif', 'bmp') * 4):
        save_image(Path('data/photos/nested földer', f'{index}.{suffix}'), (40 + index, 50))
    Image.new('CMYK', (50, 40), (90, 10, 0, 0)).save('data/photos/cmyk.jpg')
    Image.new('LA', (50, 40), (90, 10)).save('data/photos/alpha.png')
    Path('data/photos/broken.jpg').write_bytes(b'\xff\xd8\xff\xe0')
    runner = train('pretrain')
    assert len(runner.train_dataloader.dataset) == 31 and runner.max_iters == 16
    assert runner.optim_wrapper.param_groups[0]['initial_lr'] == pytest.approx(4e-3 * 4 / 256)
    ema, = [hook for hook in runner.hooks if type(hook).__name__ == 'ModelEMAHook']
    assert ema.ema_model.momentum == 0.5        # so short a run
    unreadable = runner._hooks[[type(hook).__name__ for hook in runner.hooks].index(
        'UnreadableImageHook')]
    assert unreadable.named == {'data/photos/broken.jpg'}
    save_classes()
    start = 'pretrained=pretrain/epoch_2.pth'
    runner = train('finetune', start)
    assert runner.model.head.num_classes == 3 and len(runner.val_dataloader.dataset) == 3
    metrics = run_test(['finetune/finetune.py', 'finetune/epoch_2.pth', '--work-dir', 'tested'])
    assert metrics['accuracy/top1'] == runner.message_hub.get_scalar('val/accuracy/top1').current()
    train('linear', start, 'epochs=30', 'block=0')
    assert Config.fromfile('linear/linear.py').model.backbone.out_indices == 0
    save_scenes()
    runner = train('upernet', start, 'classes=background,thing', 'epochs=30', 'lr=1e-2')
    assert runner.message_hub.get_scalar('val/mIoU').current() > 60


def test_ema_follows_the_length_of_the_run(folder):
    for index in range(8):
        save_image(Path(f'data/photos/{index}.jpg'))
    for epochs, work in ((20, 'a'), (40, 'b')):
        runner = train('pretrain', f'epochs={epochs}', work=work)
        ema, = [hook for hook in runner.hooks if type(hook).__name__ == 'ModelEMAHook']
        assert ema.ema_model.momentum == pytest.approx(1 / (0.05 * epochs * 2))
    saved = Config.fromfile('b/pretrain.py')
    assert saved.param_scheduler.end == saved.train_cfg.max_epochs == 40
    assert saved.default_hooks.checkpoint.interval == 8


@pytest.mark.parametrize('channels', [1, 5])
def test_other_channels(folder, channels):
    """Grey photos of colour files, and arrays of five channels; pretraining and fine-tuning."""
    rng = np.random.default_rng(0)
    for index in range(12):
        path = Path('data/classes', 'ab'[index % 2], f'{index}')
        path.parent.mkdir(parents=True, exist_ok=True)
        if channels == 1:
            save_image(path.with_suffix('.jpg'), (40, 44))
        else:
            np.save(path, rng.normal(index % 2, 1, (40, 44, channels)).astype(np.float32))
    values = ('channels=5', 'mean=[0.]', 'std=[1.]') if channels == 5 else ('channels=1',)
    runner = train('pretrain', 'data_root=data/classes', *values)
    assert runner.train_dataloader.dataset[0]['inputs'].shape == (channels, 32, 32)
    runner = train('finetune', *values, 'num_classes=2', 'pretrained=pretrain/epoch_2.pth')
    assert runner.val_dataloader.dataset[0]['inputs'].shape == (channels, 32, 32)


def test_grey_segmentation(folder):
    save_scenes(channels=1)
    runner = train('upernet', 'channels=1', 'pretrained=None', 'classes=background,thing')
    assert runner.train_dataloader.dataset[0]['inputs'].shape == (1, 32, 32)


@pytest.mark.parametrize('name, settings, message', [
    ('pretrain', ['data_root=nowhere'], "'nowhere/?' does not exist"),
    ('pretrain', ['image_size=33', 'data_root=data/classes'], '33'),
    ('finetune', ['num_classes=4', 'pretrained=None'], 'num_classes is 4, but .* 3 classes'),
    ('finetune', [], "'work_dirs/pretrain/epoch_60.pth', .* does not exist"),
    ('finetune', ['data_root=data/classes/cat', 'pretrained=None'],
     'has images, but no folders of classes'),
    ('finetune', ['num_clases=3'], 'nothing reads num_clases; the nearest setting of .* is num'),
    ('upernet', ['pretrained=None', 'classes=only,'], 'single logit'),
    ('upernet', ['pretrained=None', 'classes=background,thing'], 'data/scenes/masks/4.png .* 9'),
])
def test_mistakes(folder, name, settings, message):
    save_classes()
    save_scenes()
    Image.new('L', (44, 40), 9).save('data/scenes/masks/4.png')
    with refused(message):
        train(name, *settings)
    assert not Path(name).exists()
