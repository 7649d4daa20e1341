"""Images of every kind, and what happens to those that cannot be read."""
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS
from PIL import Image

from nepa_mm.engine.hooks.unreadable_images import ReadableSamples
from nepa_mm.utils.errors import UnreadableImageError

from .conftest import REPO
from .tiny_runs import (
    options,
    refused,
    run_train,
    save_classifier,
    save_image,
    save_pretraining,
)

LOADERS = [[dict(type='LoadImageWithPillow'), dict(type='RandomResizedCrop', scale=28,
                                              backend='pillow')],
           [dict(type='LoadRandomResizedCrop', scale=28)]]


def photo(mode='RGB'):
    coarse = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 32)).convert(mode)


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(path, 'JPEG', quality=95, exif=exif)


def animated(kind):
    return lambda path: photo().save(path, kind, save_all=True, append_images=[photo().rotate(180)],
                                     **dict(lossless=True) if kind == 'WEBP' else {})


GREY16 = np.asarray(photo('L')).astype(np.uint16) * 257
ODD = dict(
    rgb=lambda path: photo().save(path, 'JPEG', quality=95),
    progressive=lambda path: photo().save(path, 'JPEG', quality=95, progressive=True),
    cmyk=lambda path: photo('CMYK').save(path, 'JPEG', quality=95),
    grey=lambda path: photo('L').save(path, 'JPEG', quality=95),
    turned=save_turned, gif=animated('GIF'), webp=animated('WEBP'),
    grey16=lambda path: Image.fromarray(GREY16).save(path, 'PNG'),
    palette=lambda path: photo('P').save(path, 'PNG', transparency=3),
    grey_alpha=lambda path: photo('LA').save(path, 'PNG'),
    rgba=lambda path: photo('RGBA').save(path, 'PNG'),
    bit=lambda path: photo('1').save(path, 'PNG'))


@pytest.mark.parametrize('kind', ODD)
def test_odd_images_are_loaded(tmp_path, kind):
    path = str(tmp_path / 'image.JPEG')
    ODD[kind](path)
    results = TRANSFORMS.build(dict(type='LoadImageWithPillow'))(dict(img_path=path))
    pixels = results['img'][..., ::-1]
    assert pixels.dtype == np.uint8 and results['img_shape'] == pixels.shape[:2]
    with Image.open(path) as image:
        expected = np.asarray(image.convert('RGB'))     # the reference
    if kind == 'turned':
        expected = np.rot90(expected, -1)
    if kind == 'grey16':
        expected = np.asarray(photo('L').convert('RGB'))
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize('steps', LOADERS, ids=['whole', 'fast'])
@pytest.mark.parametrize('kind', [*ODD, '1x1'])
def test_odd_images_are_cropped(tmp_path, kind, steps):
    path = str(tmp_path / 'image.JPEG')
    ODD[kind](path) if kind in ODD else photo().resize((1, 1)).save(path)
    results = Compose(steps)(dict(img_path=path))
    assert results['img'].shape == (28, 28, 3) and results['img'].dtype == np.uint8


def save_text(path):
    path.write_text('<html>404</html>')


def save_truncated(path):
    save_image(path, (64, 48))
    os.truncate(path, path.stat().st_size // 2)


def save_bomb(path):
    """A header that claims 65,535 x 65,535 pixels."""
    save_image(path)
    content = bytearray(path.read_bytes())
    at = content.index(b'\xff\xc0') + 5
    content[at:at + 4] = b'\xff' * 4
    path.write_bytes(content)


def save_directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def save_dead_link(path):
    path.unlink(missing_ok=True)
    path.symlink_to('nowhere')


BAD = dict(text=save_text, truncated=save_truncated, bomb=save_bomb, directory=save_directory,
           empty=lambda path: path.write_bytes(b''), dead_link=save_dead_link)


@pytest.mark.parametrize('steps', LOADERS, ids=['whole', 'fast'])
@pytest.mark.parametrize('kind', BAD)
def test_bad_images_are_refused_in_one_sentence(tmp_path, kind, steps):
    path = tmp_path / 'image.jpg'
    BAD[kind](path)
    with pytest.raises(UnreadableImageError) as error:
        Compose(steps)(dict(img_path=str(path)))
    sentence = str(error.value)
    assert sentence.startswith(f'The image {path} cannot be read: ') and sentence.endswith('.')
    assert '\n' not in sentence and '0x' not in sentence


# Replacement

@HOOKS.register_module()
class SeenHook(Hook):
    """Files and pixels of every sample, and a stop after iteration ``stop_at``."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def before_train(self, runner):
        runner.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for image, sample in zip(data_batch['inputs'], data_batch['data_samples']):
            runner.seen.append((Path(sample.img_path).name, image.numpy().tobytes()))
        SeenHook.last = runner
        if runner.iter + 1 == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Sixteen images without labels, two of which are bad, for three epochs."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(save_pretraining())
    for index in range(16):
        save_image(Path(f'data/imagenet/train/n0/{index:02d}.JPEG'))
    save_text(Path('data/imagenet/train/n0/03.JPEG'))
    save_truncated(Path('data/imagenet/train/n0/08.JPEG'))
    cfg.train_dataloader.dataset.data_prefix = 'train/n0'
    cfg.train_dataloader.update(batch_size=4, sampler=dict(type='DefaultSampler', shuffle=True))
    cfg.train_dataloader.dataset.pipeline[:2] = [*LOADERS[0], dict(type='RandomFlip', prob=0.5)]
    cfg.default_hooks.update(resume=dict(type='ExactResumeHook'),
                             unreadable=dict(type='UnreadableImageHook', max_share=0.2))
    cfg.randomness = dict(seed=1, diff_rank_seed=True)
    cfg.custom_hooks = [dict(type='SeenHook')]
    cfg.train_cfg.max_epochs = 3
    cfg.dump('run.py')
    return 'run.py'


def log_of(runner):
    return next(Path(runner.log_dir).glob('*.log')).read_text()


def test_replacements_are_the_same_for_any_workers_and_after_resume(config):
    straight = run_train([config, '--work-dir', 'a'])
    names = [name for name, _ in straight.seen]
    assert len(names) == 48 and not {'03.JPEG', '08.JPEG'} & set(names)
    lists = [sorted(names[i:i + 16]) for i in (0, 16, 32)]
    assert lists[0] != lists[1] or lists[1] != lists[2]         # other ones in other epochs
    log = log_of(straight)
    assert log.count('03.JPEG cannot be read') == log.count('08.JPEG cannot be read') == 1
    for epoch, level in ((1, 'WARNING'), (2, 'INFO'), (3, 'INFO')):
        assert f'{level} - Epoch {epoch}: 2 of 16 samples were replaced' in log
    workers = options('train_dataloader.num_workers=2')
    assert run_train([config, '--work-dir', 'b', *workers]).seen == straight.seen
    with pytest.raises(KeyboardInterrupt):
        run_train([config, '--work-dir', 'c', *options('custom_hooks.0.stop_at=5')])
    resumed = run_train([config, '--work-dir', 'c'])
    assert resumed.seen == straight.seen[16:]


def test_too_many_are_an_error(config):
    with refused('^2 of 16 samples of an epoch cannot be read, '
                 'and max_share of .* allows 0.1 of them'):
        run_train([config, *options('default_hooks.unreadable.max_share=0.1')])
    assert '03.JPEG cannot be read' in log_of(SeenHook.last)
    with refused('^1 of 16 samples of an epoch cannot be read'):     # at once, not after the epoch
        run_train([config, '--no-resume', *options('default_hooks.unreadable.max_share=0')])
    for path in Path('data/imagenet/train/n0').iterdir():
        save_text(path)
    with refused('^100 samples in a row cannot be read'):
        run_train([config, '--no-resume'])


def test_by_default_more_than_one_in_a_hundred(config):
    hook = HOOKS.build(dict(type='UnreadableImageHook'))
    assert hook.max_share == 0.01 and not hook.replace_labelled
    with pytest.raises(ValueError, match='between 0 and 1, got 1.5'):
        HOOKS.build(dict(type='UnreadableImageHook', max_share=1.5))


def test_wrapped_data_sets(config):
    cfg = Config.fromfile(config)
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2,
                                        dataset=cfg.train_dataloader.dataset)
    cfg.train_cfg.max_epochs = 1
    cfg.dump('repeated.py')
    assert '4 of 32 samples were replaced' in log_of(run_train(['repeated.py']))


def test_labels_are_not_replaced_silently(tmp_path, monkeypatch):
    """By default an error that names the file; if it is asked for, image and label change."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(save_classifier()[0])
    save_truncated(Path('data/val/b/1.jpg'))
    cfg.train_dataloader.dataset.pipeline[:2] = LOADERS[0]
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.default_hooks.unreadable = dict(type='UnreadableImageHook', max_share=0.2)
    cfg.dump('run.py')
    with refused('b/1.jpg cannot be read.* Its label 1 is not'):
        run_train(['run.py'])
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.prepare_data = ReadableSamples(dataset, replace_labelled=True)
    replaced = []
    for _ in range(20):
        sample = pickle.loads(pickle.dumps(dataset))[1]['data_samples']     # as spawned workers do
        assert list(sample.unreadable) == [dataset.get_data_info(1)['img_path']]
        assert 'abcde'[sample.gt_label] == Path(sample.img_path).parent.name
        replaced.append(sample.img_path)
    assert len(set(replaced)) > 4
    runner = run_train(['run.py', *options('default_hooks.unreadable.replace_labelled=True')])
    assert '1 of 8 samples were replaced' in log_of(runner)


@pytest.mark.parametrize('path, replaced', [('pretrain/nepa_vit-b', True),
                                            ('pretrain/nepa_vit-s_imagenette', True),
                                            ('classification/nepa_vit-b_ft_in1k', False)])
def test_our_configs(path, replaced):
    cfg = Config.fromfile(REPO / 'configs' / f'{path}.py')
    hook = HOOKS.build(cfg.default_hooks.unreadable)
    assert hook.replace_labelled == replaced
    assert cfg.train_dataloader.dataset.pipeline[0].type == (
        'LoadRandomResizedCrop' if replaced else 'LoadImageWithPillow')
