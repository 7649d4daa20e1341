"""Two processes that share one network compute what two copies of it compute."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.loading import select_weights
from nepa_mm.engine.fsdp_runner import shard

from .conftest import REPO
from .tiny_runs import options, run_script, run_train, save_image, save_pretraining

SHARDED = ['runner_type=FSDPRunner', 'model.backbone.with_cp=True']


def save_config():
    """Two epochs of four iterations, or two updates, with all that our pretraining configs use."""
    for index in range(4, 16):
        save_image(Path(f'data/imagenet/train/n00000000/{index}.JPEG'))
    cfg = Config.fromfile(save_pretraining())
    cfg.train_cfg.max_epochs = 2
    # eps: rounding errors of gradients near 0 would make whole steps
    cfg.optim_wrapper = dict(
        type='BF16OptimWrapper', bf16_on_cpu=True, accumulative_counts=2,
        constructor='LayerDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5),
        optimizer=dict(type='AdamW', lr=0.01, eps=1e-4, weight_decay=0.05, fused=True),
        clip_grad=dict(max_norm=0.1))
    cfg.param_scheduler = dict(type='LayerDecayCosineLR', warmup=1, end=4, by_epoch=True,
                               convert_to_iter_based=True)
    cfg.custom_hooks = [dict(type='ModelEMAHook', momentum=0.1),
                        dict(type='NEPAMonitorHook', interval=1)]
    cfg.default_hooks.update(
        runtime_info=dict(type='DeferredRuntimeInfoHook'),
        checkpoint=dict(type='AtomicCheckpointHook', interval=1),
        resume=dict(type='ExactResumeHook'), guard=dict(type='NonFiniteGuardHook'),
        run_check=dict(type='RunCheckHook', odd='warn'))    # half of a run is meant
    cfg.randomness = dict(seed=0, diff_rank_seed=True)
    cfg.dump('fsdp.py')
    return 'fsdp.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """All runs of two processes: the first half of one by the tools, the rest by the worker."""
    folder = tmp_path_factory.mktemp('fsdp')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = save_config()
    code, output = run_script('dist_train.sh', config, 2, '--work-dir', 'resumed', *options(
        *SHARDED, 'train_cfg.max_epochs=1'), cwd=folder)
    assert code == 0, output
    assert re.search(r'2 processes share ([\d,]+) parameters; this one holds', output)
    code, output = run_script(
        'launch.py', 2, REPO / 'tests' / 'fsdp_worker.py', config, *SHARDED, cwd=folder)
    assert code == 0, output
    return folder


@pytest.fixture
def report(folder):
    return json.loads((folder / 'report.json').read_text())


def load(folder, name):
    return read_checkpoint(folder / name / 'epoch_2.pth')


def largest_difference(one, two):
    """Between nested dicts of tensors and whatever, with equal keys."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        return max((largest_difference(one[key], two[key]) for key in one), default=0)
    if not isinstance(one, torch.Tensor):
        assert one == two
        return 0
    assert type(one) is type(two) is torch.Tensor and one.shape == two.shape
    return (one.double() - two.double()).abs().max().item()


def parts(checkpoint):
    return {key: checkpoint[key] for key in ('state_dict', 'ema_state_dict', 'optimizer')}


def test_as_two_copies(folder, report):
    """Weights, average, optimizer state, parameter groups, clipped and guarded gradient norms."""
    plain, sharded = load(folder, 'plain'), load(folder, 'sharded')
    # updates are steps of 1e-2; where weights differ by their rounding, some are another in bf16
    assert largest_difference(parts(plain), parts(sharded)) < 1e-4
    raw = {key: plain['ema_state_dict'][f'module.{key}'] for key in plain['state_dict']}
    assert largest_difference(plain['state_dict'], raw) > 1e-3      # the average is another
    for norms in report['norms'], report['logged']:
        assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert report['norms'][0] == pytest.approx(report['logged'][0], rel=1e-5)
    assert min(report['norms'][0]) > 0.1    # what is clipped at


def test_everything_is_shared(report):
    assert report['kinds']['FSDPBlock'] == 3 and report['kinds']['FSDPNEPA'] == 1
    for what in ('weights', 'average', 'first_moment'):
        one, two = (shares[what] for shares in report['shares'])
        assert one + two == 1 and one == pytest.approx(0.5, abs=0.01)


def test_resume_is_exact(folder):
    assert largest_difference(parts(load(folder, 'sharded')), parts(load(folder, 'resumed'))) == 0


def test_checkpoints_are_complete(folder, monkeypatch):
    """For a backbone of its own, and for a run of one process that goes on."""
    checkpoint = load(folder, 'sharded')
    monkeypatch.chdir(folder)
    cfg = Config.fromfile('fsdp.py').model.backbone
    for weights in ('ema', 'raw'):
        backbone = MODELS.build(dict(cfg, init_cfg=dict(
            type='Pretrained', checkpoint='sharded/epoch_2.pth', prefix='backbone.',
            weights=weights)))
        backbone.init_weights()
        expected = select_weights(checkpoint, weights)
        assert backbone.state_dict().keys() == {k.removeprefix('backbone.') for k in expected}
        assert all(torch.equal(v, expected[f'backbone.{k}'])
                   for k, v in backbone.state_dict().items())
    runner = run_train(['fsdp.py', '--work-dir', 'alone', '--resume', 'sharded/epoch_2.pth',
                        *options(*SHARDED, 'train_cfg.max_epochs=3',
                                 'train_dataloader.batch_size=4')])
    assert runner.iter == 12
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert 'FSDPRunner runs one process and does not shard.' in log


def test_a_step_that_is_not_finite_is_skipped_by_all(report):
    assert report['skipped'] == [1, 1] and report['finite']


def test_what_cannot_be_is_said(report, monkeypatch):
    errors = report['errors']
    assert 'remove model_wrapper_cfg' in errors['wrapper']
    assert errors['average'].strip().endswith('from the first update on: remove begin_iter.')
    assert errors['probe'].strip().endswith('checkpoints to tools/analysis_tools/knn.py.')
    with pytest.raises(ValueError, match='shards the blocks of a NEPAViT, but Linear has none'):
        shard(torch.nn.Linear(1, 1))
    monkeypatch.setitem(sys.modules, 'torch.distributed.fsdp', None)
    with pytest.raises(ValueError, match='FSDPRunner needs torch >= 2.6, this is '):
        shard(torch.nn.Linear(1, 1))
