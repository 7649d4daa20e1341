"""The moving average: the reference's numbers, and the hook that evaluates and saves it."""
import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.loading import select_weights
from nepa_mm.engine.ema import MultiTensorEMA
from nepa_mm.engine.hooks import ModelEMAHook

RUNS = itertools.count()


def test_average_equals_the_reference():
    run, = json.loads((Path(__file__).parent / 'parity' / 'optim' / 'ema.json').read_text())['runs']
    model = nn.Module()
    model.values = nn.ParameterList(torch.zeros(3) for _ in run['keys'])
    average = MultiTensorEMA(model, momentum=1 - run['decay'])
    for weights, expected in zip(run['parameters_after_step'], run['ema_after_step']):
        for value, key in zip(model.values, run['keys']):
            value.data = torch.tensor(weights[key])
        average.update_parameters(model)
        for value, key in zip(average.module.values, run['keys']):
            torch.testing.assert_close(value, torch.tensor(expected[key]), rtol=1e-6, atol=1e-8)
    assert average.steps == run['steps'] == 6


class Mixed(nn.Module):
    """Parameters and buffers of several types."""

    def __init__(self):
        super().__init__()
        self.fp32 = nn.Parameter(torch.randn(7, 5))
        self.bf16 = nn.Parameter(torch.randn(3).bfloat16())
        self.norm = nn.BatchNorm1d(4)

    def move(self):
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)


@pytest.mark.parametrize('options', [dict(), dict(interval=3), dict(update_buffers=True)])
def test_average_equals_mmengine_bitwise(options):
    torch.manual_seed(0)
    model = Mixed()
    ours = MultiTensorEMA(model, **options)
    theirs = ExponentialMovingAverage(model, momentum=1e-4, **options)
    initial = model.fp32.detach().clone()
    for step in range(8):
        model.move()
        if step == 3:       # other tensors in the place of the old ones
            model.fp32 = nn.Parameter(model.fp32.detach().clone())
            model.norm.running_mean = model.norm.running_mean.clone()
        if step == 5 and not ours.update_buffers:   # must not follow a copy of the model
            ours = copy.deepcopy(ours)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        for (name, ours_value), theirs_value in zip(ours.state_dict().items(),
                                                    theirs.state_dict().values()):
            assert torch.equal(ours_value, theirs_value), name
    assert not torch.equal(ours.module.fp32, initial)
    assert not torch.equal(ours.module.fp32, model.fp32)


# The hook

class Toy(BaseModel):
    """One weight that is pulled towards the data; it predicts itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss':
            return dict(loss=(self.weight - inputs).square().mean())
        return [dict(weight=self.weight.detach().clone())]


class Weight(BaseMetric):
    """Report the weight that was evaluated; raise once where asked."""

    interrupt = False

    def process(self, data_batch, data_samples):
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt
        self.results.append(data_samples[0]['weight'].item())

    def compute_metrics(self, results):
        return dict(weight=results[-1], all=[results[-1]])


def build(work_dir, max_epochs=2, accumulative_counts=1, scope='mmpretrain', **kwargs):
    metric = Weight()
    data = DataLoader([dict(inputs=torch.full((1,), float(i))) for i in range(1, 7)])
    hook = dict(type='ModelEMAHook', momentum=0.25, **kwargs)
    runner = Runner(
        Toy(), str(work_dir), train_dataloader=data, val_dataloader=data, test_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs), val_cfg={}, test_cfg={},
        val_evaluator=Evaluator(metric), test_evaluator=Evaluator(metric),
        default_scope=scope,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9),
                           accumulative_counts=accumulative_counts),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best='weight',
                                           rule='greater')),
        custom_hooks=[hook], experiment_name=f'ema_{next(RUNS)}')
    hook, = [h for h in runner.hooks if isinstance(h, ModelEMAHook)]
    return runner, hook, metric


def history(runner):
    """Record the weight after every iteration."""
    weights, train_step = [], runner.model.train_step

    def recorded(data, optim_wrapper):
        out = train_step(data, optim_wrapper)
        weights.append(runner.model.weight.item())
        return out

    runner.model.train_step = recorded
    return weights


def average_of(weights, momentum=0.25):
    average = weights[0]
    for weight in weights[1:]:
        average += momentum * (weight - average)
    return average


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
def test_both_sets_are_reported_and_saved_apart(tmp_path, scope):
    runner, hook, _ = build(tmp_path, scope=scope, evaluate_on_origin=True)
    weights = history(runner)
    runner.train()
    ema, raw = average_of(weights), weights[-1]
    assert raw != pytest.approx(ema, rel=1e-3)
    assert hook.ema_model.module.weight.item() == pytest.approx(ema, rel=1e-6)
    assert runner.model.weight.item() == raw

    log = runner.message_hub.log_scalars
    assert log['val/weight'].current() == pytest.approx(ema, rel=1e-6)
    assert log['val/weight_raw'].current() == raw
    assert runner.message_hub.get_info('val/all_raw') == [raw]
    text = next(tmp_path.glob('*/*.log')).read_text()
    assert f'weight: {ema:.4f}' in text and f'weight_raw: {raw:.4f}' in text
    assert 'Evaluating the EMA weights.' in text

    for file in ['epoch_2.pth', next(tmp_path.glob('best_weight_*.pth')).name]:
        checkpoint = read_checkpoint(tmp_path / file)
        assert checkpoint['meta']['weights'] == dict(state_dict='ema', ema_state_dict='raw')
        assert select_weights(checkpoint, 'ema')['weight'].item() == pytest.approx(ema, rel=1e-6)
        assert select_weights(checkpoint, 'raw')['weight'].item() == raw


def test_average_moves_with_updates_not_with_micro_steps(tmp_path):
    runner, hook, _ = build(tmp_path, accumulative_counts=4)
    weights = history(runner)
    runner.train()
    updated = weights[3::4]         # 12 iterations
    assert hook.ema_model.steps == len(updated) == 3
    assert hook.ema_model.module.weight.item() == pytest.approx(average_of(updated), rel=1e-6)


def test_resume_is_exact(tmp_path):
    straight, straight_hook, _ = build(tmp_path / 'straight', max_epochs=3)
    straight.train()
    build(tmp_path / 'resumed', max_epochs=2)[0].train()
    resumed, resumed_hook, _ = build(tmp_path / 'resumed', max_epochs=3)
    resumed._resume = True
    resumed.train()
    assert resumed.iter == straight.iter == 18
    assert resumed_hook.ema_model.steps == 18
    assert torch.equal(resumed.model.weight, straight.model.weight)
    assert torch.equal(resumed_hook.ema_model.module.weight,
                       straight_hook.ema_model.module.weight)


@pytest.mark.parametrize('options, value', [
    (dict(evaluate_on_origin=True), dict(weight='ema', weight_raw='raw')),
    (dict(), dict(weight='ema')),
    (dict(evaluate_on_ema=False, evaluate_on_origin=True), dict(weight='raw')),
])
@pytest.mark.parametrize('fresh', [True, False])
def test_testing(tmp_path, options, value, fresh):
    """Of a checkpoint in a new process, and after training in the same one."""
    runner, hook, _ = build(tmp_path, **options)
    weights = history(runner)
    runner.train()
    if fresh:
        runner, _, _ = build(tmp_path, **options)
        runner._load_from = str(tmp_path / 'epoch_2.pth')
    expected = dict(ema=average_of(weights), raw=weights[-1])
    metrics = runner.test()
    del metrics['all']
    metrics.pop('all_raw', None)
    assert metrics == {name: pytest.approx(expected[which], rel=1e-6)
                       for name, which in value.items()}


def test_interrupted_validation(tmp_path):
    """It leaves the average in the model; nothing may be mixed up by that."""
    runner, hook, metric = build(tmp_path, evaluate_on_origin=True)
    weights = history(runner)
    metric.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        runner.train()              # in the first validation
    ema, raw = average_of(weights), weights[-1]
    assert len(weights) == 6 and runner.model.weight.item() == pytest.approx(ema, rel=1e-6)

    runner.save_checkpoint(str(tmp_path), 'interrupted.pth')
    checkpoint = read_checkpoint(tmp_path / 'interrupted.pth')
    assert select_weights(checkpoint, 'ema')['weight'].item() == pytest.approx(ema, rel=1e-6)
    assert select_weights(checkpoint, 'raw')['weight'].item() == raw

    metrics = runner.val()
    assert metrics['weight'] == pytest.approx(ema, rel=1e-6) and metrics['weight_raw'] == raw
    assert runner.model.weight.item() == raw


def test_evaluation_line_is_logged_for_raw_weights(tmp_path, caplog):
    runner, _, _ = build(tmp_path, max_epochs=1, evaluate_on_origin=True)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    runner.train()
    assert caplog.text.index('EMA weights') < caplog.text.index('names end in _raw')


def test_fraction_of_the_run_is_checked():
    """Its effect is tested in test_custom.py."""
    for fraction in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f'run_fraction must be .* got {fraction}'):
            ModelEMAHook(run_fraction=fraction)
    with pytest.raises(ValueError, match='run_fraction or momentum, not both: got 0.1 and 0.01'):
        ModelEMAHook(run_fraction=0.1, momentum=0.01)
