"""Losses and gradients that are not finite, and spikes."""
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .tiny_runs import options, run_train, save_pretraining


@HOOKS.register_module()
class PoisonHook(Hook):
    """Scale the images of iteration ``at``, or the gradients of it."""

    def __init__(self, at, factor=float('nan'), gradient=False):
        self.at, self.factor, self.gradient = at, factor, gradient

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        PoisonHook.last = runner
        if runner.iter + 1 != self.at:
            return
        if self.gradient:
            weight = runner.model.backbone.layers[0].attn.qkv.weight
            handle = weight.register_hook(
                lambda grad: (handle.remove(), grad * self.factor)[1])
        else:
            data_batch['inputs'] = data_batch['inputs'].float() * self.factor


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(save_pretraining())
    cfg.custom_hooks = [dict(type='NonFiniteGuardHook'), dict(type='PoisonHook', at=3)]
    cfg.train_cfg.max_epochs = 8
    cfg.dump('run.py')
    return 'run.py'


@pytest.mark.parametrize('gradient', [False, True])
def test_a_step_that_is_not_finite_stops_the_run(config, gradient):
    with pytest.raises(FloatingPointError, match='in iteration 3 .*rank 0: ') as error:
        run_train([config, *options(f'custom_hooks.1.gradient={gradient}')])
    assert ('0.JPEG' in str(error.value)) != gradient
    assert all(p.isfinite().all() for p in PoisonHook.last.model.parameters())
    assert Path('work_dirs/run/epoch_1.pth').is_file()
    assert not Path('work_dirs/run/epoch_2.pth').exists()


def test_so_many_steps_may_be_skipped(config):
    runner = run_train([config, *options('custom_hooks.0.max_skipped=1')])
    assert runner.iter == 16
    assert all(p.isfinite().all() for p in runner.model.parameters())
    assert 'Step skipped, 1 of 1' in next(Path(runner.log_dir).glob('*.log')).read_text()


def test_a_spike_is_logged_once(config):
    runner = run_train([config, *options('custom_hooks.1.at=12', 'custom_hooks.1.gradient=True',
                                         'custom_hooks.1.factor=1e9')])
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert log.count('times its median') == 1


def test_settings_are_checked():
    with pytest.raises(ValueError, match='got -1 and 10'):
        HOOKS.build(dict(type='NonFiniteGuardHook', max_skipped=-1))
