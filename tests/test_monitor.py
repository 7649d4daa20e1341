"""The monitors against numpy, their judgement of made-up networks, speed with a made-up clock."""
import itertools
import json
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from nepa_mm.engine.hooks import NEPAMonitorHook, ThroughputHook, throughput
from nepa_mm.engine.hooks.nepa_monitor import effective_rank, prediction_statistics
from nepa_mm.models.nepa import NEPAHead

from .conftest import TINY, smooth_images

RUNS = itertools.count()
NAMES = ('next_cosine', 'copy_cosine', 'lift', 'embedding_std', 'embedding_rank', 'output_std',
         'output_rank')


def run(model, work_dir, *hooks, images=None, batch_size=4, epochs=2, **kwargs):
    """Train on 20 images, 5 iterations an epoch; every iteration is logged."""
    images = smooth_images(20, size=56) if images is None else images
    kwargs = dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1),
                                     clip_grad=dict(max_norm=1.))) | kwargs
    runner = Runner(
        model, str(work_dir), experiment_name=f'monitor_{next(RUNS)}',
        train_dataloader=DataLoader(
            [dict(inputs=image, data_samples=0) for image in images], batch_size),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=None),
        custom_hooks=list(hooks), default_scope='mmpretrain', randomness=dict(seed=0), **kwargs)
    runner.train()
    return runner


def nepa(**head):
    return MODELS.build(dict(
        type='NEPA', head=dict(type='NEPAHead', **head),
        backbone=dict(type='NEPAViT', arch=TINY, layer_scale_init_value=0.1)))


def log_of(work_dir):
    path, = work_dir.glob('*/*.log')
    return path.read_text()


def scalars_of(work_dir):
    path, = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


# The values

def numpy_statistics(h, z, shift):
    """Written anew from the definitions, in fp64."""
    h, z = (x.double().numpy() for x in (h, z))
    h, z = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, z))
    h, shift = h[:, 1:], max(shift, 1)
    following, current = [], []
    for image in range(len(z)):
        for patch in range(z.shape[1] - shift):
            following.append(h[image, patch] @ z[image, patch + shift])
            current.append(h[image, patch] @ z[image, patch])
    result = dict(next_cosine=np.mean(following), copy_cosine=np.mean(current),
                  lift=np.mean(following) - np.mean(current))
    for name, x in dict(embedding=z, output=h).items():
        x = x.reshape(-1, x.shape[-1])
        share = np.linalg.svd(x, compute_uv=False)
        share = share / share.sum()
        result[f'{name}_std'] = x.std(axis=0).mean() / (1 / np.sqrt(x.shape[1]))
        result[f'{name}_rank'] = np.exp(-sum(p * np.log(p) for p in share if p > 0))
    return result


@pytest.mark.parametrize('shift', [0, 1, 2])
def test_statistics_against_numpy(shift):
    torch.manual_seed(0)
    z = torch.randn(3, 10, 16) + 0.5
    h = torch.randn(3, 11 - shift, 16) - 0.2
    h[:, 1:] += z[:, :10 - shift]
    result = {name: value.item() for name, value in prediction_statistics(h, z, shift).items()}
    assert tuple(result) == NAMES
    assert result == pytest.approx(numpy_statistics(h, z, shift), rel=1e-5)


def test_a_sample_of_the_rows_leaves_the_random_state_alone():
    torch.manual_seed(0)
    h, z = torch.randn(8, 64, 8), torch.randn(8, 64, 8)
    before = torch.get_rng_state()
    sample, everything = (prediction_statistics(h, z, num_rows=n) for n in (128, 512))
    assert torch.equal(before, torch.get_rng_state())
    assert sample['lift'] == everything['lift']
    assert sample['embedding_rank'] != everything['embedding_rank']
    assert sample['embedding_rank'] == pytest.approx(everything['embedding_rank'].item(), rel=0.1)
    assert effective_rank(z.flatten(0, 1)[:5]) <= 5


def test_effective_rank_of_known_sets():
    directions = torch.linalg.qr(torch.randn(16, 16))[0][:5]
    scale = torch.tensor([[1.], [1000.], [0.01]])
    rows = (directions[:, None] * scale).flatten(0, 1)
    assert effective_rank(rows).item() == pytest.approx(5)      # length does not count
    assert effective_rank(directions[:1] * scale).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.full((3, 4), float('nan'))).isnan()


def test_logged_values_are_those_of_the_training_step(tmp_path):
    """Every second iteration, of the first 3 of 4 images, from the tensors that gave the loss."""
    model, stored = nepa(), []
    loss = model.head.loss
    model.head.loss = lambda h, z: stored.append((h.detach(), z.detach())) or loss(h, z)
    runner = run(model, tmp_path, dict(type='NEPAMonitorHook', interval=2, num_images=3))
    assert len(stored) == 10
    logged = {name: runner.message_hub.get_scalar(f'train/{name}').data[0] for name in NAMES}
    for index, (h, z) in enumerate(stored[1::2]):
        expected = numpy_statistics(h[:3], z[:3], 1)
        assert {name: logged[name][index] for name in NAMES} == pytest.approx(expected, rel=1e-4)
    assert all(len(values) == 5 for values in logged.values())
    backbone = model.backbone
    assert not backbone.patch_embed._forward_hooks and not backbone.norm._forward_hooks


def test_monitoring_does_not_change_the_run(tmp_path):
    losses = []
    for index, hooks in enumerate(([], [dict(type='NEPAMonitorHook', interval=1)])):
        torch.manual_seed(0)
        runner = run(nepa(), tmp_path / str(index), *hooks)
        losses.append(runner.message_hub.get_scalar('train/loss').data[0].tolist())
    assert losses[0] == losses[1]


def test_log_and_backends(tmp_path):
    """Text log, scalars.json, TensorBoard and W&B (whose package is made up here)."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    with mock.patch.dict(sys.modules, wandb=mock.MagicMock()):
        runner = run(nepa(), tmp_path, dict(type='NEPAMonitorHook', interval=5),
                     dict(type='ThroughputHook', interval=5, peak_tflops=1.),
                     visualizer=dict(type='Visualizer', vis_backends=[
                         dict(type=f'{name}VisBackend') for name in (
                             'Local', 'Tensorboard', 'Wandb')]))
        sent = {name for call in sys.modules['wandb'].log.call_args_list for name in call.args[0]}
    names = {*NAMES, 'grad_norm', 'images_per_second', 'data_wait', 'mfu'}
    last = scalars_of(tmp_path)[-1]
    assert names <= set(last) and names <= sent
    assert last['lift'] == runner.message_hub.get_scalar('train/lift').current()
    line = [line for line in log_of(tmp_path).splitlines() if 'Epoch(train)' in line][-1]
    assert all(f'{name}: ' in line for name in names)
    folder, = tmp_path.glob('*/vis_data')
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert names <= set(events.Tags()['scalars'])
    assert events.Scalars('lift')[-1].value == pytest.approx(last['lift'])


# The judgement

class MadeUp(BaseModel):
    """A 'network' whose outputs are known: healthy, copying or collapsed."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.head, self.backbone = kind, NEPAHead(), nn.Module()
        self.backbone.patch_embed, self.backbone.norm = self.PatchEmbed(), nn.Identity()
        self.backbone.without_registers = lambda tokens: tokens
        self.backbone.patch_embed.collapsed = kind == 'collapsed'
        self.weight = nn.Parameter(torch.zeros(()))

    class PatchEmbed(nn.Module):
        def forward(self, z):
            return (0.05 * z + 1 if self.collapsed else z), (4, 4)

    def forward(self, inputs, data_samples=None, mode='loss'):
        z, _ = self.backbone.patch_embed(inputs)
        h = torch.cat((z[:, :1], z[:, :-1]), dim=1) if self.kind == 'copying' else z
        h = self.backbone.norm(h + 0.3 * h.std() * torch.randn_like(h) + self.weight)
        return dict(loss=self.head.loss(h, z))


def run_made_up(kind, work_dir, **kwargs):
    torch.manual_seed(0)
    hook = dict(type='NEPAMonitorHook', interval=1, **(dict(copy_grace=0) | kwargs))
    return run(MadeUp(kind), work_dir, hook, images=torch.randn(20, 16, 32))


@pytest.mark.parametrize('kind, message', [
    ('collapsed', 'Collapse at iteration 1: the embeddings of all patches point the same way'),
    ('copying', 'Copying at iteration 3: the outputs resemble the patch just read'),
    ('healthy', None)])
def test_warnings(tmp_path, kind, message):
    """Once, and in a copying network only after a fifth of the 10 iterations."""
    runner = run_made_up(kind, tmp_path)
    lines = [line for line in log_of(tmp_path).splitlines() if ' at iteration ' in line]
    if message is None:
        assert not lines
        return
    assert len(lines) == 1 and message in lines[0] and 'WARNING' in lines[0]
    evidence, index = dict(collapsed=('embedding_std', 0), copying=('copy_cosine', 2))[kind]
    value = runner.message_hub.get_scalar(f'train/{evidence}').data[0][index]
    assert f'{evidence} {value:.4f}' in lines[0]


def test_an_interval_that_follows_the_length_of_the_run(tmp_path):
    runner = run(nepa(), tmp_path, dict(type='NEPAMonitorHook', interval=None))
    assert len(runner.message_hub.get_scalar('train/lift').data[0]) == runner.max_iters == 10
    for length, interval in ((99, 1), (450, 4), (10_000, 100), (500_000, 100)):
        hook = NEPAMonitorHook(interval=None)
        hook.before_run(SimpleNamespace(max_iters=length))
        assert hook.interval == interval


def test_short_runs_are_not_judged_as_copies(tmp_path):
    run_made_up('copying', tmp_path, copy_grace=1000)
    assert ' at iteration ' not in log_of(tmp_path)


@pytest.mark.parametrize('kind', ['collapsed', 'copying', 'healthy'])
def test_stop(tmp_path, kind):
    if kind == 'healthy':
        assert run_made_up(kind, tmp_path, stop_on_collapse=True).iter == 10
        return
    with pytest.raises(RuntimeError, match=' at iteration '):
        run_made_up(kind, tmp_path, stop_on_collapse=True)


# Speed

@pytest.mark.parametrize('arch, giga', [('base', 134.6), ('large', 474.2)])
def test_flops(arch, giga):
    with torch.device('meta'):
        model = MODELS.build(dict(type='NEPA', backbone=dict(type='NEPAViT', arch=arch),
                                  head=dict(type='NEPAHead')))
    assert throughput.flops_per_image(model, 224, 224) / 1e9 == pytest.approx(giga, abs=0.05)


def test_flops_without_causal_mask_and_with_padding():
    def flops(size, **kwargs):
        model = MODELS.build(dict(type='NEPA', head=dict(type='NEPAHead'), backbone=dict(
            type='NEPAViT', arch=TINY, remainder='pad', **kwargs)))
        return throughput.flops_per_image(model, *size)

    assert flops((56, 56)) == flops((43, 50)) > flops((42, 56))
    # by hand: 3 patches of 588 values, 2 inputs and the class token, 3 blocks of width 32 with an
    # MLP of 64; causal: 6 pairs of tokens
    linear, attention = 3 * 3 * (4 * 32 * 32 + 2 * 32 * 64), 3 * 6 * 2 * 32
    assert flops((14, 42)) == 2 * (3 * (linear + attention) + 2 * 3 * 588 * 32)
    full = 3 * 4 * (4 * 32 * 32 + 2 * 32 * 64), 3 * 16 * 2 * 32     # all 4 tokens, 16 pairs
    assert flops((14, 42), causal=False) == 2 * (3 * sum(full) + 2 * 3 * 588 * 32)
    assert flops((14, 42), gated_mlp=True) - flops((14, 42)) == 2 * 3 * 3 * 3 * 32 * 64


def test_throughput_of_a_made_up_clock(monkeypatch):
    """Per iteration 1 s of waiting and 3 s of work; half an hour of evaluation does not count."""
    clock = SimpleNamespace(now=0.)
    monkeypatch.setattr(throughput.time, 'perf_counter', lambda: clock.now)
    monkeypatch.setattr(throughput, 'get_world_size', lambda: 2)
    model = nepa()
    runner = SimpleNamespace(model=model, iter=0, message_hub=MessageHub('clock'))
    hook = ThroughputHook(interval=4, peak_tflops=1e-6)
    hook.before_train(runner)
    batch = dict(inputs=torch.zeros(8, 3, 28, 28))
    for _ in range(3):
        hook.before_train_epoch(runner)
        for index in range(3):
            clock.now += 1
            hook.before_train_iter(runner, index, batch)
            clock.now += 3
            hook.after_train_iter(runner, index, batch)
            runner.iter += 1
        clock.now += 1800
    logged = {name: runner.message_hub.get_scalar(f'train/{name}').data[0]
              for name in ('images_per_second', 'data_wait', 'mfu')}
    assert len(logged['mfu']) == 2
    # the fourth iteration's wait falls into the first window: 3 iterations' work, 4 waits
    assert logged['images_per_second'] == pytest.approx([2 * 24 / 13, 2 * 32 / 16])
    assert logged['data_wait'] == pytest.approx([4 / 13, 0.25])
    flops = throughput.flops_per_image(model, 28, 28)
    assert logged['mfu'] == pytest.approx([24 / 13 * flops / 1e6, 2 * flops / 1e6])


def test_measured_peak(monkeypatch):
    """The operations of the product that took the least time; the random state stays."""
    clock, seconds = SimpleNamespace(now=0.), iter([3, 2, 4])

    class ProductsTakeTime(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                clock.now += next(seconds)
            return func(*args, **kwargs or {})

    monkeypatch.setattr(throughput.time, 'perf_counter', lambda: clock.now)
    before = torch.get_rng_state()
    with ProductsTakeTime():
        assert throughput.peak_flops(torch.float32, 'cpu', repeats=1) == 2 * 1024 ** 3 / 2
    assert clock.now == 9 and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('hook, options', [
    (NEPAMonitorHook, dict(interval=0)), (NEPAMonitorHook, dict(num_images=0)),
    (ThroughputHook, dict(interval=0)), (ThroughputHook, dict(peak_tflops=0))])
def test_bad_options(hook, options):
    with pytest.raises(ValueError, match='must be positive, got'):
        hook(**options)


@pytest.mark.parametrize('hook', [NEPAMonitorHook, ThroughputHook])
def test_other_models_are_refused(hook):
    with pytest.raises(ValueError, match='NEPA.*got Linear'):
        hook().before_train(SimpleNamespace(model=nn.Linear(1, 1)))
