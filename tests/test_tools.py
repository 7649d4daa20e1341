"""tools/train.py and tools/test.py: flags, resuming, bad input."""
import json
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image

from nepa_mm.apis import check_data, fill_dataloaders
from nepa_mm.apis.runner import scale_lr

from .conftest import REPO
from .tiny_runs import (
    options,
    refused,
    run_script,
    run_test,
    run_train,
    save_classifier,
    save_pretraining,
    save_segmentor,
)


@HOOKS.register_module()
class CountIterations(Hook):
    """How many iterations this run did, whatever the iteration it started from."""

    def before_train(self, runner):
        runner.done = 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.done += 1


@pytest.fixture
def pretrain(folder):
    cfg = Config.fromfile(save_pretraining())
    cfg.custom_hooks = [dict(type='CountIterations')]
    cfg.dump('pretrain.py')
    return 'pretrain.py'


@pytest.fixture
def classifier(folder):
    return save_classifier()


# ---------------------------------------------------------------- training


def test_work_dir_and_cfg_options(pretrain):
    runner = run_train([pretrain, '--work-dir', 'here', *options('optim_wrapper.optimizer.lr=0.5')])
    assert runner.done == 2
    assert runner.optim_wrapper.get_lr()['lr'] == [0.5]
    assert Path('here/epoch_1.pth').exists() and not Path('work_dirs').exists()
    assert Config.fromfile('here/pretrain.py').optim_wrapper.optimizer.lr == 0.5

    default = run_train([pretrain, *options('train_cfg.max_epochs=1')])
    assert Path(default.work_dir) == Path('work_dirs/pretrain').absolute()


def test_resume(pretrain):
    """Two iterations an epoch; what was done before is not done again."""
    two_epochs = options('train_cfg.max_epochs=2')
    assert run_train([pretrain]).done == 2
    assert run_train([pretrain, *two_epochs]).done == 2
    assert run_train([pretrain, *two_epochs, '--no-resume']).done == 4
    first = 'work_dirs/pretrain/epoch_1.pth'
    assert run_train([pretrain, *two_epochs, '--work-dir', 'b', '--resume', first]).done == 2
    assert run_train([pretrain, *options('resume=False', 'train_cfg.max_epochs=2')]).done == 4
    more = options('resume=False', 'train_cfg.max_epochs=3')
    assert run_train([pretrain, *more, '--resume']).done == 2


def test_load_from_takes_weights_only_until_there_is_something_to_resume(pretrain):
    run_train([pretrain])
    weights = torch.load('work_dirs/pretrain/epoch_1.pth', weights_only=False)['state_dict']
    flags = ['--work-dir', 'tune', *options('load_from=work_dirs/pretrain/epoch_1.pth',
                                            'optim_wrapper.optimizer.lr=0.')]
    tuned = run_train([pretrain, *flags])
    assert tuned.done == 2
    for name, value in tuned.model.state_dict().items():
        assert torch.equal(value.cpu(), weights[name])
    assert run_train([pretrain, *flags, 'train_cfg.max_epochs=2']).done == 2


@pytest.mark.skipif(torch.cuda.is_available() or platform.libc_ver()[0] != 'glibc',
                    reason='GPUs have an allocator of their own; so do other systems')
def test_freed_memory_is_kept():
    """A large tensor takes the pages of the one before, where it otherwise takes new ones."""
    code = (
        'import resource, torch\n'
        'from nepa_mm import apis\n'
        'assert apis.reuse_freed_memory() if {keep} else True\n'
        'for _ in range(3): torch.ones(2 ** 26)\n'     # 256 MB each
        'before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        'for _ in range(3): torch.ones(2 ** 26)\n'
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)')
    faults = [int(subprocess.check_output(
        [sys.executable, '-c', code.format(keep=keep)], cwd=REPO, text=True).split()[-1])
        for keep in (True, False)]
    assert faults[0] < 0.1 * faults[1]


def test_amp_is_bf16(pretrain):
    runner = run_train([pretrain, '--amp'])
    assert type(runner.optim_wrapper).__name__ == 'BF16OptimWrapper'
    former = options('optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.loss_scale=dynamic')
    runner = run_train([pretrain, '--amp', '--no-resume', *former])
    assert type(runner.optim_wrapper).__name__ == 'BF16OptimWrapper'


def test_no_validate(classifier):
    config, _ = classifier
    assert run_train([config, '--no-validate']).val_loop is None
    assert run_train([config]).val_loop is not None


def test_auto_scale_lr(pretrain):
    """2 images x 4 accumulated over a base of 16 is half the learning rate."""
    four = options('optim_wrapper.accumulative_counts=4')
    runner = run_train([pretrain, '--auto-scale-lr', *four])
    assert runner.optim_wrapper.get_lr()['lr'] == [0.05]
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert '8 = 1 processes x 2 images x 4 accumulated, base 16: lr 0.1 -> 0.05' in log

    with refused('auto_scale_lr.base_batch_size, got No'):
        run_train([pretrain, '--auto-scale-lr', *options('auto_scale_lr.base_batch_size=None')])


def test_scale_lr_counts_processes_and_leaves_the_head_lr():
    cfg = Config(dict(
        auto_scale_lr=dict(base_batch_size=1024, enable=True),
        train_dataloader=dict(batch_size=128),
        optim_wrapper=dict(optimizer=dict(lr=4e-3), paramwise_cfg=dict(head_lr=1e-3),
                           accumulative_counts=2)))
    assert len(scale_lr(cfg, world_size=2)) == 1
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2e-3)
    assert cfg.optim_wrapper.paramwise_cfg.head_lr == 1e-3
    assert scale_lr(cfg, world_size=2) == []  # done once: mmengine must not do it again


def test_dataloader_defaults():
    cfg = Config(dict(
        default_scope='mmpretrain',
        train_dataloader=dict(num_workers=2),
        val_dataloader=dict(num_workers=2, persistent_workers=False, collate_fn='mine'),
        test_dataloader=dict(num_workers=0, persistent_workers=True)))
    fill_dataloaders(cfg)
    assert cfg.train_dataloader.persistent_workers is True
    assert cfg.train_dataloader.collate_fn.type == 'default_collate'
    assert cfg.val_dataloader.persistent_workers is False
    assert cfg.val_dataloader.collate_fn == 'mine'
    assert cfg.test_dataloader.persistent_workers is False  # torch refuses it without workers
    seg = Config(dict(default_scope='mmseg', train_dataloader=dict(num_workers=2)))
    fill_dataloaders(seg)
    assert 'collate_fn' not in seg.train_dataloader


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize('flags, message', [
    (options('train_dataloader.dataset.data_root=nowhere'),
     "train_dataloader: 'nowhere/train' does not exist"),
    (options('train_dataloader.dataset.type=ImageNet', 'train_dataloader.dataset.data_root=no/'),
     r"'no/train' does not exist; expected no/train/<wnid>/\*.JPEG and no/val/<wnid>"),
    (options('train_dataloader.dataset.data_root=data/empty'),
     "train_dataloader: 'data/empty/train' holds no image"),
    (options('train_dataloader.dataset.ann_file=list.txt'),
     "'data/imagenet/list.txt' does not exist"),
    (['--resume', 'none.pth'], "The checkpoint 'none.pth', given as --resume"),
    (options('load_from=none.pth'), "The checkpoint 'none.pth', given as load_from"),
    (options('model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=a.b'),
     "The checkpoint 'a.b', given as init_cfg of type 'Pretrained'"),
    (options('model.backbone.arch=giant'), "arch must be one of .*'base'.* got 'giant'"),
    (['--launcher', 'slurm'], '--launcher slurm needs the environment variable SLURM_PROCID'),
])
def test_bad_input_ends_in_one_sentence(pretrain, flags, message):
    Path('data/empty/train').mkdir(parents=True)
    with refused(message):
        run_train([pretrain, *flags])


def test_missing_ade20k_says_its_layout():
    root = 'data/ade/ADEChallengeData2016'
    dataset = dict(type='ADE20KDataset', data_root=root, data_prefix=dict(
        img_path='images/training', seg_map_path='annotations/training'))
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dataset))))
    with pytest.raises(FileNotFoundError) as error:
        check_data(cfg, 'train_dataloader', 'val_dataloader')
    assert f"'{root}/images/training' does not exist" in str(error.value)
    assert (f'{root}/images/{{training,validation}}/*.jpg and '
            f'{root}/annotations/{{training,validation}}/*.png') in str(error.value)


def test_data_sets_without_a_folder_are_left_alone():
    def check(**dataset):
        check_data(Config(dict(val_dataloader=dict(dataset=dataset))), 'val_dataloader')

    check(type='CIFAR10', data_root='nowhere', split='train')
    check(type='Digits')
    check(type='ImageNet', data_root='s3://bucket', split='train')
    with pytest.raises(FileNotFoundError, match="'nowhere"):
        check(type='ImageNet', data_root='nowhere', split='train')


def test_scripts_print_the_sentence_and_no_traceback(folder):
    for script, args in (('train.py', ['no.py']), ('dist_test.sh', ['no.py', 'a.pth', 1])):
        code, output = run_script(script, *args, cwd=folder)
        assert code == 2
        assert 'error: ' in output and 'no.py' in output and 'Traceback' not in output


# ---------------------------------------------------------------- testing


def test_classification(classifier):
    """Always class 4, which four of the eight images are."""
    metrics = run_test([*classifier, '--out', 'pred.pkl', '--show-dir', 'shown'])
    assert metrics == {'accuracy/top1': 50.0, 'accuracy/top5': 100.0}
    with open('pred.pkl', 'rb') as file:
        assert [int(sample['pred_label']) for sample in pickle.load(file)] == [4] * 8
    assert len(list(Path('shown').glob('*.png'))) == 8

    metrics = run_test([*classifier, '--tta', '--out', 'metrics.json', '--out-item', 'metrics',
                    *options('test_evaluator.topk=[1,2]')])
    assert metrics == {'accuracy/top1': 50.0, 'accuracy/top2': 62.5}
    assert json.loads(Path('metrics.json').read_text()) == dict(metrics, weights='raw')


def test_segmentation(folder):
    """Always class 1, which is a quarter of the pixels: IoU 0 and 25 %."""
    segmentor = save_segmentor()
    for flags in ([], ['--tta']):
        maps, shown = (Path(f'{folder}{len(flags)}') for folder in ('maps', 'shown'))
        metrics = run_test([*segmentor, '--out', str(maps), '--show-dir', str(shown), *flags])
        assert (metrics['mIoU'], metrics['aAcc']) == (12.5, 25.0)
        for name in '01':
            label_map = np.array(Image.open(maps / f'{name}.png'))
            assert label_map.shape == (28, 32) and (label_map == 1).all()
        assert len(list(shown.rglob('*.png'))) == 2


def test_bad_input_of_test(pretrain, classifier, folder):
    with refused("'pretrain.py' has no test_dataloader"):
        run_test([pretrain, classifier[1]])
    with refused("The checkpoint 'no.pth', given as CHECKP"):
        run_test([classifier[0], 'no.pth'])
    with refused("test_dataloader: 'data/test' does not exist"):
        run_test([*classifier, *options('test_dataloader.dataset.data_prefix=test')])
    with refused('--show-dir needs default_hooks.visualization'):
        run_test([*classifier, '--show-dir', 'a', *options('default_hooks.visualization=None')])
