"""Every recipe that fine-tunes or segments, on its real pipeline at tiny size."""
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from . import test_classification
from .conftest import REPO, TINY
from .tiny_runs import run_test, run_train

CLASSIFICATION = sorted((REPO / 'configs' / 'classification').glob('*.py'))
ABLATIONS = sorted((REPO / 'configs' / 'classification' / 'ablations').glob('*.py'))
SEGMENTATION = sorted((REPO / 'configs' / 'segmentation').glob('*0k_ade20k-512x512.py'))
SIZE = 28       # pixels, of the crops
EPOCHS, STEPS = 10, 320


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """An ImageNet-like folder of two classes, red and green, 64 + 4 images of each."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp('images')
    for split, num in dict(train=64, val=4).items():
        for label, colour in dict(a=(220, 60, 60), b=(60, 220, 60)).items():
            (root / split / label).mkdir(parents=True)
            for index in range(num):
                pixels = rng.normal(colour, 30, (33, 37, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / label / f'{index}.png')
    return root


def shrink_classifier(path, images, epochs=EPOCHS):
    """The recipe with other sizes, lengths and first weights, and an average that keeps up."""
    cfg = test_classification.shrink(Config.fromfile(path), images, 'work')
    crop = cfg.train_dataloader.dataset.pipeline[1].scale
    size = cfg.model.backbone.img_size = 2 * cfg.model.backbone.get('patch_size', 14)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        for step in loader.dataset.pipeline:
            for key in {'scale', 'crop_size'} & set(step):
                old = step[key]
                step[key] = old * size // crop if isinstance(old, int) else (size, size)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.param_scheduler.end = cfg.default_hooks.checkpoint.interval = epochs
    if 'warmup' in cfg.param_scheduler:
        cfg.param_scheduler.warmup = 1
    for hook in cfg.custom_hooks:
        if hook.type == 'ModelEMAHook':
            hook.momentum = 0.02
    return cfg


def train(cfg, name, steps=STEPS):
    """Run tools/train.py on a config; returns the Runner and the losses of its steps."""
    cfg.log_level = 'WARNING'
    cfg.dump(f'{name}.py')
    runner = run_train([f'{name}.py', '--work-dir', 'work'])
    losses, rates = (
        runner.message_hub.get_scalar(f'train/{key}').data[0] for key in ('loss', 'lr'))
    assert runner.iter == len(losses) == len(rates) == steps
    assert np.isfinite(losses).all()
    # the schedule goes up, and to its end, where a cosine is a parabola
    end = 1e-3 * (STEPS / steps) ** 2
    assert rates[0] < 0.1 * rates.max() and rates[-1] < end * rates.max()
    assert 3 < rates.argmax() < 0.6 * steps
    groups = runner.optim_wrapper.param_groups
    assert max(group['lr'] for group in groups) < end * max(group['initial_lr'] for group in groups)
    return runner, losses


@pytest.mark.parametrize('path', CLASSIFICATION, ids=lambda path: path.stem)
def test_classification_recipe(path, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = shrink_classifier(path, images)
    docstring = path.read_text().split('"""')[1]
    assert all(word in docstring for word in ('Paper:', 'Expected:', 'Cost:', 'Command:'))
    mixed, has_ema = (kind in str(cfg) for kind in ('TimmBatchAugment', 'ModelEMAHook'))
    runner, losses = train(cfg, path.stem)
    if mixed:   # and smoothed labels leave half a nat of the 0.69 at the start
        assert losses[-96:].mean() < losses[:32].mean() - 0.03
    else:
        assert np.median(losses[-32:]) < 0.3 * losses[:8].mean()    # a probe's high rate spikes
    scalars = runner.message_hub.log_scalars
    assert scalars['val/accuracy/top1'].current() == 100
    assert ('val/accuracy/top1_raw' in scalars) == has_ema      # raw and average, apart
    if has_ema:     # the best checkpoint is the one whose average is best
        assert scalars['val/accuracy/top1_raw'].current() == 100
        hook, = (hook for hook in runner.hooks if type(hook).__name__ == 'ModelEMAHook')
        average, raw = hook.ema_model.module.state_dict(), runner.model.state_dict()
        assert any(not torch.equal(value, raw[key]) for key, value in average.items())
        for name in (f'epoch_{EPOCHS}', f'best_accuracy_top1_epoch_{EPOCHS}'):
            checkpoint = torch.load(f'work/{name}.pth', weights_only=False)
            assert checkpoint['meta']['weights'] == dict(state_dict='ema', ema_state_dict='raw')
            for key, value in average.items():
                assert torch.equal(checkpoint['state_dict'][key], value)
    metrics = run_test([f'{path.stem}.py', f'work/epoch_{EPOCHS}.pth', '--work-dir', 'tested'])
    assert metrics['accuracy/top1'] == 100


@pytest.mark.parametrize('path', ABLATIONS, ids=lambda path: path.stem)
def test_ablation(path, images, tmp_path, monkeypatch):
    """They differ from a recipe above in a few keys: three epochs show that these work."""
    monkeypatch.chdir(tmp_path)
    runner, _ = train(shrink_classifier(path, images, epochs=3), path.stem, steps=96)
    top1 = runner.message_hub.get_scalar('val/accuracy/top1').current()
    metrics = run_test([f'{path.stem}.py', 'work/epoch_3.pth', '--work-dir', 'tested'])
    assert metrics['accuracy/top1'] == top1


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """An ADE20K tree of 16 + 4 images; a label's brightness tells it."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp('scenes') / 'ADEChallengeData2016'
    for split, num in dict(training=16, validation=4).items():
        for index in range(num):
            label = np.kron(rng.permutation(4).reshape(2, 2), np.ones((20, 23))).astype(np.uint8)
            pixels = np.repeat(80 * label[..., None], 3, axis=2)
            for kind, array, suffix in (('images', pixels, 'jpg'), ('annotations', label, 'png')):
                path = root / kind / split / f'ADE_{index:08d}.{suffix}'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


def shrink_segmentor(cfg, scenes):
    """Everything of the recipe but its lengths, its sizes and its first weights."""
    model = cfg.model if cfg.model.type == 'NEPASegmentor' else cfg.model.module
    model.backbone.update(arch=dict(TINY, num_layers=4), out_indices=[0, 1, 2, 3], init_cfg=None)
    model.backbone.frozen_stages = min(model.backbone.frozen_stages, 4)
    model.data_preprocessor.size = (SIZE, SIZE)
    model.test_cfg.update(crop_size=(SIZE, SIZE), stride=(19, 19))
    if model.neck:
        model.neck.embed_dim = 32
    for head in (model.decode_head, model.get('auxiliary_head')):
        if head:
            many = isinstance(head.in_channels, list)
            wide = head.type == 'LinearSegHead'     # reads the four blocks side by side
            head.update(in_channels=[32] * 4 if many else 32, channels=128 if wide else 16)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(scenes)
        for step in loader.dataset.pipeline:
            for part in (step, *step.get('transforms', [[]])[0]):
                for key in ('scale', 'crop_size'):
                    if key in part:
                        part[key] = tuple(side * SIZE // 512 for side in part[key])
    cfg.optim_wrapper.optimizer.lr = 1e-2       # thin networks from scratch
    warmup, decay = cfg.param_scheduler
    warmup.end = decay.begin = STEPS // 10
    decay.end = cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = STEPS
    cfg.default_hooks.checkpoint.interval = STEPS
    return cfg


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_segmentation_recipe(path, scenes, tmp_path, monkeypatch):
    """And its config of several scales, if it has one, on what was trained."""
    monkeypatch.chdir(tmp_path)
    runner, losses = train(shrink_segmentor(Config.fromfile(path), scenes), path.stem)
    assert losses[-32:].mean() < 0.3 * losses[:32].mean()
    miou = runner.message_hub.get_scalar('val/mIoU').current()
    assert miou > 50        # 11 if every pixel gets the same class
    checkpoint = f'work/iter_{STEPS}.pth'
    metrics = run_test([f'{path.stem}.py', checkpoint, '--work-dir', 'tested'])
    assert metrics['mIoU'] == pytest.approx(miou, abs=0.01)
    scales = path.with_name(f'{path.stem}_ms-flip.py')
    if scales.is_file():
        shrink_segmentor(Config.fromfile(scales), scenes).dump('scales.py')
        assert run_test(['scales.py', checkpoint, '--work-dir', 'scales'])['mIoU'] > 50
