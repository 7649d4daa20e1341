"""Losses and gradients that are not finite, and spikes."""
import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .tiny_runs import options, run_script, run_train, save_pretraining

# who leaves out a step: the optimizer, of which the host hears later, or the hook, which waits
WAYS = {
    'fused': dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01, fused=True)),
    'fused, clipped': dict(type='BF16OptimWrapper', clip_grad=dict(max_norm=1.), optimizer=dict(
        type='AdamW', lr=0.01, fused=True)),
    'fused, accumulated': dict(type='BF16OptimWrapper', clip_grad=dict(max_norm=1.),
                               accumulative_counts=2,
                               optimizer=dict(type='Adam', lr=0.01, fused=True)),
    'SGD': dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
    'fused SGD': dict(type='OptimWrapper', optimizer=dict(
        type='SGD', lr=0.1, momentum=0.9, fused=True)),
    'clipped by mmengine': dict(type='OptimWrapper', clip_grad=dict(max_norm=1.), optimizer=dict(
        type='AdamW', lr=0.01, fused=True)),
    'values clipped': dict(type='BF16OptimWrapper', clip_grad=dict(type='value', clip_value=1.),
                           optimizer=dict(type='AdamW', lr=0.01, fused=True))}


@HOOKS.register_module()
class PoisonHook(Hook):
    """Scale the images of iteration ``at``, or the gradients of it, in one process."""

    def __init__(self, at, factor=float('nan'), gradient=False, rank=0):
        self.at, self.factor, self.gradient, self.rank = at, factor, gradient, rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        PoisonHook.last = runner
        if runner.iter + 1 != self.at or dist.get_rank() != self.rank:
            return
        PoisonHook.before = copy.deepcopy(state(runner))
        if self.gradient:
            weight = runner.model.backbone.layers[0].attn.qkv.weight
            handle = weight.register_hook(
                lambda grad: (handle.remove(), grad * self.factor)[1])
        else:
            data_batch['inputs'] = data_batch['inputs'].float() * self.factor


def state(runner):
    """Everything that a step changes."""
    return (runner.model.state_dict(), runner.optim_wrapper.optimizer.state_dict()['state'])


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two iterations an epoch."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(save_pretraining())
    cfg.custom_hooks = [dict(type='NonFiniteGuardHook'), dict(type='PoisonHook', at=3)]
    cfg.train_cfg.max_epochs = 8
    cfg.dump('run.py')
    return 'run.py'


def changed(config, **changes):
    cfg = Config.fromfile(config)
    for name, value in changes.items():
        cfg[name] = value
    cfg.dump(config)
    return config


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('what', ['loss', 'gradient', 'infinite gradient'])
def test_a_step_that_is_not_finite_stops_the_run(config, way, what):
    gradient = what != 'loss'
    config = changed(config, optim_wrapper=WAYS[way])
    step = 4 if way == 'fused, accumulated' else 3
    factor = ['custom_hooks.1.factor=1e40'] if what == 'infinite gradient' else []
    with pytest.raises(FloatingPointError, match=f'in iteration {step} .*rank 0: ') as error:
        run_train([config, *options(f'custom_hooks.1.gradient={gradient}', *factor)])
    assert ('0.JPEG' in str(error.value)) != gradient
    torch.testing.assert_close(state(PoisonHook.last), PoisonHook.before, rtol=0, atol=0)
    # one update late, where the optimizer left it out
    assert PoisonHook.last.iter + 1 == (
        4 if way in ('fused', 'fused, clipped') else 5 if way == 'fused, accumulated' else step)
    assert Path('work_dirs/run/epoch_1.pth').is_file()
    assert not Path('work_dirs/run/epoch_2.pth').exists()


@pytest.mark.parametrize('loop, at, last', [
    ('epochs', 4, 'epoch_1.pth'), ('iterations', 3, 'iter_2.pth')])
def test_no_checkpoint_follows_it(config, loop, at, last):
    """At the end of an epoch, and in the same iteration."""
    by_epoch = loop == 'epochs'
    config = changed(
        config, optim_wrapper=WAYS['fused, clipped'],
        train_cfg=dict(by_epoch=by_epoch, **{f'max_{"epochs" if by_epoch else "iters"}': 8}),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=by_epoch)))
    with pytest.raises(FloatingPointError, match=f'in iteration {at} '):
        run_train([config, *options(f'custom_hooks.1.at={at}')])
    assert max(path.name for path in Path('work_dirs/run').glob('*.pth')) == last


@pytest.mark.parametrize('way', ['fused, clipped', 'SGD'])
def test_so_many_steps_may_be_skipped(config, way):
    config = changed(config, optim_wrapper=WAYS[way],
                     param_scheduler=dict(type='LinearLR', by_epoch=False, end=16))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Seems like `optimizer.step')
        runner = run_train([config, *options('custom_hooks.0.max_skipped=1')])
    assert runner.iter == 16
    assert all(p.isfinite().all() for p in runner.model.parameters())
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert 'in iteration 3 ' in log and 'Step skipped, 1 of 1' in log
    assert not hasattr(runner.optim_wrapper.optimizer, 'found_inf')


def test_processes_skip_and_stop_together(config):
    """A loss of the second one is not finite; both steps are left out, and the first one says."""
    config = changed(config, optim_wrapper=WAYS['fused, clipped'], custom_imports=dict(
        imports=['nepa_mm', 'tests.test_guard']))
    code, output = run_script('dist_train.sh', Path(config).absolute(), 2, *options(
        'train_dataloader.batch_size=1', 'custom_hooks.1.rank=1'), cwd=Path.cwd())
    assert code == 1
    assert 'in iteration 3 ' in output
    assert re.search(r'rank 0: finite loss; rank 1: \S*2.JPEG', output), output
    assert [path.name for path in Path('work_dirs/run').glob('*.pth')] == ['epoch_1.pth']


@pytest.mark.parametrize('way', ['fused, clipped', 'SGD'])
def test_a_spike_is_logged_once(config, way):
    config = changed(config, optim_wrapper=WAYS[way])
    runner = run_train([config, *options('custom_hooks.1.at=12', 'custom_hooks.1.gradient=True',
                                         'custom_hooks.1.factor=1e9', 'randomness.seed=0')])
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert log.count('times its median') == 1 and 'in iteration 12 is more than' in log


def test_settings_are_checked():
    with pytest.raises(ValueError, match='got -1 and 10'):
        HOOKS.build(dict(type='NonFiniteGuardHook', max_skipped=-1))
