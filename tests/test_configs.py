"""Every pretraining config: the network that it names, its recipe, and two updates of it."""
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmpretrain.datasets import CIFAR10

from .conftest import REPO, TINY

PRETRAIN = sorted((REPO / 'configs' / 'pretrain').glob('*.py'))
PARAMETERS = {      # million; B and L as executed in the reference code
    'nepa_vit-b': 85.53, 'nepa_vit-l': 302.97, 'nepa_vit-b_swiglu': 113.88,
    'nepa_vit-l_swiglu': 403.73, 'nepa_vit-g_fsdp': 1010.96, 'nepa_vit-s': 21.53,
    'nepa_vit-s_imagenette': 21.60, 'nepa_vit-s_200e_imagenette-224': 21.60,
    'nepa_vit-t_cifar10': 5.35}
SMALL_DATA = ('imagenette', 'cifar10')      # recipes for one GPU


def shrink(cfg, images, work_dir):
    """The config on 8 made-up images with a tiny network: one epoch of two updates."""
    cfg.work_dir = str(work_dir)
    cfg.model.backbone.arch = TINY
    cfg.train_dataloader.dataset.data_root = str(images)
    if cfg.train_dataloader.dataset.type == 'ImageNet':
        cfg.train_dataloader.dataset.metainfo = dict(classes=['a', 'b'])
    counts = cfg.optim_wrapper.accumulative_counts = min(cfg.optim_wrapper.accumulative_counts, 2)
    cfg.train_dataloader.update(batch_size=4 // counts, num_workers=0, persistent_workers=False)
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.run_check.odd = 'warn'    # about the schedule and the average
    cfg.log_level = 'WARNING'
    return cfg


def save_cifar10(root, monkeypatch):
    """Eight images in the files of CIFAR-10; mmpretrain compares the checksums of the real ones."""
    rng, folder = np.random.default_rng(0), root / CIFAR10.base_folder
    folder.mkdir()
    sums = {}
    for index, (name, _) in enumerate((*CIFAR10.train_list, *CIFAR10.test_list)):
        num = 4 if index < 2 else 0
        content = pickle.dumps(dict(data=rng.integers(0, 256, (num, 3072), dtype=np.uint8),
                                    labels=[3] * num))
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps(dict(label_names=[str(label) for label in range(10)]))
    (folder / CIFAR10.meta['filename']).write_bytes(meta)
    monkeypatch.setattr(CIFAR10, 'meta', dict(CIFAR10.meta, md5=hashlib.md5(meta).hexdigest()))
    for files in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, files,
                            [[name, sums[name]] for name, _ in getattr(CIFAR10, files)])


def test_all_are_listed():
    assert {path.stem for path in PRETRAIN} == set(PARAMETERS)


@pytest.mark.parametrize('path', PRETRAIN, ids=lambda path: path.stem)
def test_network(path):
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[path.stem], abs=0.01)


@pytest.mark.parametrize('path', PRETRAIN, ids=lambda path: path.stem)
def test_recipe(path):
    """What every run shares with the reference: facts of Table 4 and of the released code."""
    cfg = Config.fromfile(path)
    optimizer = cfg.optim_wrapper.optimizer
    batch = cfg.auto_scale_lr.base_batch_size
    assert optimizer.lr == pytest.approx(3e-4 * batch / 256)
    gpus = 1 if any(name in path.stem for name in SMALL_DATA) else 8
    assert gpus * cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts == batch
    assert (*optimizer.betas, optimizer.eps, optimizer.weight_decay) == (0.9, 0.95, 1e-8, 0.05)
    assert cfg.optim_wrapper.type == 'BF16OptimWrapper' and 'loss_scale' not in cfg.optim_wrapper
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0
    assert cfg.param_scheduler.warmup == (10 if '200e' in path.stem else 40)
    assert cfg.param_scheduler.end == cfg.train_cfg.max_epochs
    assert cfg.model.data_preprocessor.mean == cfg.model.data_preprocessor.std == [127.5] * 3
    crop, flip, pack = cfg.train_dataloader.dataset.pipeline
    files = 'cifar10' not in path.stem      # else the data set holds its pixels
    assert crop == dict(
        scale=224 if '224' in path.stem or batch == 4096 else 160 if files else 32,
        crop_ratio_range=(0.08 if files else 0.2, 1.0), interpolation='bilinear',
        **dict(type='LoadRandomResizedCrop') if files else dict(
            type='RandomResizedCrop', backend='pillow'))
    assert (flip, pack) == (dict(type='RandomFlip', prob=0.5), dict(type='PackInputs'))
    assert cfg.resume and cfg.randomness.seed == 1337
    docstring = Path(path).read_text().split('"""')[1]
    assert all(word in docstring for word in ('Paper:', 'Expected:', 'Cost:', 'Command:'))


@pytest.mark.parametrize('path', PRETRAIN, ids=lambda path: path.stem)
def test_two_updates_move_weights_and_average(path, image_folder, tmp_path, monkeypatch):
    """The first update has lr 0; the second moves the weights, and the EMA weights less."""
    if 'cifar10' in path.stem:
        save_cifar10(image_folder, monkeypatch)
    cfg = shrink(Config.fromfile(path), image_folder, tmp_path / 'work')
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    assert runner.iter == 2 * cfg.optim_wrapper.accumulative_counts
    loss = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(loss) == runner.iter and all(-1 <= value <= 1 for value in loss)
    checkpoint = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)
    assert checkpoint['meta']['weights'] == dict(state_dict='ema', ema_state_dict='raw')
    moved, moved_less = 0, 0
    for name, value in before.items():
        raw, ema = checkpoint['ema_state_dict'][f'module.{name}'], checkpoint['state_dict'][name]
        assert torch.equal(raw, runner.model.state_dict()[name])
        moved += (raw - value).abs().sum()
        moved_less += (ema - value).abs().sum()
    momentum = cfg.custom_hooks[0].get('momentum', 0.5)     # 0.5 for a fraction of two updates
    assert moved > min(100, 0.9 / momentum) * moved_less > 0
