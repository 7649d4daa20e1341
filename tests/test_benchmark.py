"""benchmarks/benchmark.py: everybody computes the same loss, and the tables mean what they say."""
import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

import peers
import workloads
from nepa_mm.engine.hooks.throughput import peak_flops
from nepa_mm.models.vit import NEPAViT

from .conftest import REPO, TINY, smooth_images
from .tiny_runs import load_tool

BASES = REPO / 'configs' / '_base_'
benchmark = load_tool('benchmark').main


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The smallest size of the zoo is smaller still, and a matrix product does not take long."""
    monkeypatch.setitem(NEPAViT.arch_zoo, 'tiny', TINY)


def test_peers_compute_our_loss():
    """With our weights, and 257 tokens instead of 256."""
    torch.manual_seed(0)
    models = peers.build_candidates(BASES, 'tiny', False)
    (ours, our_loss), (eager, eager_loss) = models['nepa_mm'], models['eager, unpacked']
    ours.eval()     # RoPE draws in training
    eager.eval()
    with torch.no_grad():
        for source in ours.parameters():
            source.add_(0.1 * torch.randn_like(source))
        eager.cls_token.copy_(ours.backbone.cls_token)
        eager.patch_embed.load_state_dict(ours.backbone.patch_embed.projection.state_dict())
        eager.norm.load_state_dict(ours.backbone.norm.state_dict())
        for mine, theirs in zip(ours.backbone.layers, eager.blocks):
            for i, layer in enumerate((theirs.query, theirs.key, theirs.value)):
                layer.weight.copy_(mine.attn.qkv.weight.chunk(3)[i])
                layer.bias.copy_(mine.attn.qkv.bias.chunk(3)[i])
            for a, b in ((theirs.out, mine.attn.proj), (theirs.fc1, mine.mlp.fc1),
                         (theirs.fc2, mine.mlp.fc2), (theirs.norm1, mine.ln1),
                         (theirs.norm2, mine.ln2)):
                a.load_state_dict(b.state_dict())
            theirs.scale1.copy_(mine.ls1.gamma)
            theirs.scale2.copy_(mine.ls2.gamma)
        images = smooth_images(2)
        expected = our_loss(images)
        torch.testing.assert_close(eager_loss(images), expected, rtol=1e-5, atol=1e-6)
    peer, timm_loss = peers.timm_nepa('tiny', ours.state_dict())
    peer.eval()
    with torch.no_grad():
        torch.testing.assert_close(timm_loss(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['transformers.models.vit_nepa', 'models.vit_nepa'])
def test_vit_nepa_takes_part_where_it_can_be_imported(monkeypatch, name):
    """Hugging Face's or the authors'; a stand-in with the names and the call of both."""
    class Config(dict):
        from_dict = classmethod(lambda cls, fields: cls(fields))

    class Model(torch.nn.Linear):
        def __init__(self, config):
            assert config['qk_norm'] and config['is_causal'] and config['patch_size'] == 14
            super().__init__(config['hidden_size'], 1)

        def forward(self, pixel_values):
            return SimpleNamespace(loss=self.weight.sum() * pixel_values.mean())

    for part in (name.rpartition('.')[0], name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    vars(sys.modules[name]).update(ViTNepaConfig=Config, ViTNepaForPreTraining=Model)
    model, loss = peers.build_candidates(BASES, 'tiny', False)['vit_nepa']
    assert model.in_features == TINY['embed_dims']
    torch.testing.assert_close(loss(torch.ones(2, 3, 28, 28)), model.weight.sum())


@pytest.mark.parametrize('ours', [True, False])
def test_an_update_moves_weights_and_average(ours):
    model = peers.build_nepa(BASES, arch='tiny')
    before = model.backbone.norm.weight.detach().clone()
    update = peers.our_update(BASES, model) if ours else peers.plain_update(model)
    step = peers.build_step(lambda x: model.loss(x)['loss'], update, smooth_images(2, 56), True)
    assert all(seconds > 0 for seconds in step())
    assert not torch.equal(model.backbone.norm.weight, before)
    assert all(p.grad is None for p in model.parameters())


def test_step(tmp_path, capsys):
    rows = benchmark(['step', '--arch', 'tiny', '--batch', '2', '--repeats', '1', '--precision',
                      'bf16', '--json', str(tmp_path / 'step.json')])
    assert {'nepa_mm', 'eager, unpacked', 'timm Eva'} <= {row['implementation'] for row in rows}
    for row in rows:
        seconds = (row['gradients ms'] + row['update ms']) / 1e3
        assert row['images/s'] == pytest.approx(2 / seconds)
        assert row['speed to ours'] == pytest.approx(row['images/s'] / rows[0]['images/s'])
        assert 0 < row['MFU %'] < 100
    saved = json.loads((tmp_path / 'step.json').read_text())
    assert saved['attention'] != 'math'     # which writes the scores of all pairs out
    assert saved['rows'] == rows and saved['torch'] == torch.__version__
    assert (saved['precision'], saved['batch'], saved['repeats']) == ('bf16', 2, 1)
    output = capsys.readouterr()
    bf16, fp32 = (peak_flops(dtype, 'cpu') for dtype in (torch.bfloat16, torch.float32))
    if not 0.5 < bf16 / fp32 < 2:
        assert ('slower than in fp32 on this CPU' in output.err) == (bf16 < fp32)
    table = output.out.splitlines()
    assert len(table) == 2 + len(rows) and len({len(line) for line in table[1:]}) == 1


def test_scaling():
    rows = benchmark(['scaling', '--arch', 'tiny', '--batch', '1', '--repeats', '1',
                      '--batches', '1', '4'])
    assert [row['tokens'] for row in rows[:5]] == [64, 256, 576, 1024, 1600]
    assert {row['batch'] for row in rows} == {1, 4} and {row['depth'] for row in rows} == {3, 4, 24}
    for row in rows:
        assert row['ps/FLOP'] == pytest.approx(row['ms'] / row['GFLOP'])
    by = {(row['tokens'], row['batch'], row['depth']): row['GFLOP'] for row in rows}
    assert by[256, 4, 3] == pytest.approx(4 * by[256, 1, 3])


def test_memory():
    """A block in fp32 keeps about 20 activations: its input, q, k, v, 2 x 4 in the MLP, ..."""
    off, on = benchmark(['memory', '--arch', 'tiny', '--batch', '8'])
    parameters = sum(p.numel() for p in peers.build_nepa(BASES, arch='tiny').parameters())
    assert off['state GB'] == on['state GB'] == 20 * parameters / 1e9
    assert on['activations GB'] < off['activations GB']
    shared = benchmark(['memory', '--arch', 'tiny', '--batch', '8', '--gpus', '4'])[0]
    assert shared['state GB'] == off['state GB'] / 4
    assert shared['activations GB'] == off['activations GB']
    twice = benchmark(['memory', '--arch', 'tiny', '--batch', '16'])[0]['activations GB']
    one = TINY['num_layers'] * 256 * TINY['embed_dims'] * 4 / 1e9
    assert 15 < (twice - off['activations GB']) / 8 / one < 30


def test_train():
    rows = benchmark(['train', '--arch', 'tiny', '--batch', '2', '--repeats', '1',
                      '--iterations', '5'])
    assert [row['loop'] for row in rows] == [
        'Runner at iteration 10', 'Runner at iteration 500,000', "... with mmengine's own log"]
    for row in rows:
        assert row['more %'] == pytest.approx(100 * row['more ms'] / row['bare loop'])
        low, high = map(float, row['range %'].split(' to '))
        assert low - 0.01 <= row['more %'] <= high + 0.01


def test_the_runner_pauses_for_the_bare_loop(monkeypatch):
    """Its clock stands still meanwhile, and both have the same work and the real hooks."""
    seen = []

    def bare(self):
        return lambda: time.sleep(0.2)

    class Spy(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, **kwargs):
            seen.append((runner.iter, len(runner.message_hub.get_scalar('train/loss').data[0]),
                         {type(hook).__name__ for hook in runner.hooks}))

    from_cfg = Runner.from_cfg

    def with_spy(cfg):
        runner = from_cfg(cfg)
        runner.register_hook(Spy())
        return runner

    monkeypatch.setattr(workloads.Training, 'bare', bare)
    monkeypatch.setattr(workloads.Runner, 'from_cfg', with_spy)
    job = workloads.Training(REPO / 'configs', dict(arch='tiny'), 2, 3, False)
    pairs = job.pairs(1000)
    assert len(pairs) == 3 and all(other >= 0.2 for _, other in pairs)
    first, kept, hooks = seen[0]
    assert first == 1000 // 13 * 13 and len(seen) == 13
    assert kept > first
    assert {'ModelEMAHook', 'NonFiniteGuardHook', 'ExactResumeHook', 'UnreadableImageHook',
            'AtomicCheckpointHook', 'NEPAMonitorHook', 'ThroughputHook'} <= hooks


def test_loader_and_plan(tmp_path):
    """The plan reads what the other two have measured."""
    data = str(tmp_path / 'loader.json')
    rows = benchmark(['loader', '--images', '6', '--workers', '1', '--repeats', '1',
                      '--json', data])
    assert [row['pipeline'] for row in rows] == 2 * [
        'LoadRandomResizedCrop (default)', 'LoadImageWithPillow', 'mmpretrain with Pillow']
    assert all(row['images/s of one core'] > 0 and row['images/s in total'] > 0 for row in rows)
    parts = benchmark(['plan', '--gpus', '8', '--model', 'b', '--images-per-second', '500',
                       '--loader-json', data, '--cores', '2'])
    assert parts[0]['ms/update'] == pytest.approx(4096 / (8 * 500) * 1e3)
    assert parts[1]['ms/update'] == pytest.approx(
        4096 / (8 * 2 * rows[0]['images/s of one core']) * 1e3)


def test_plan_by_hand(capsys, tmp_path):
    rows = benchmark(['plan', '--gpus', '8', '--model', 'l', '--images-per-second', '1000',
                      '--loader-images-per-second', '50', '--cores', '8', '--bandwidth', '100',
                      '--price', '2', '--epochs', '800', '--json', str(tmp_path / 'plan.json')])
    assert [row['part'] for row in rows] == ['compute', 'data', 'all-reduce']
    assert [row['ms/update'] for row in rows] == pytest.approx(
        [512, 1280, 2 * 7 / 8 * 4 * 302_967_808 / 100e9 * 1e3])
    plan = json.loads((tmp_path / 'plan.json').read_text())
    assert plan['bottleneck'] == 'data'
    assert plan['hours'] == pytest.approx(800 * 1_281_167 / (8 * 8 * 50) / 3600, abs=0.01)
    assert plan['cost'] == pytest.approx(plan['hours'] * 8 * 2, abs=0.1)


@pytest.mark.parametrize('line, sentence', [
    ('step --arch huge', 'error: argument --arch: invalid choice'),
    ('step --banana', 'error: unrecognized arguments: --banana.'),
    ('step --batch 0', 'error: argument --batch: 0 is not positive.'),
    ('plan --gpus 8 --model l', 'error: plan needs a measured rate of images/s: give the rate'),
    ('plan --gpus 8 --model l --step-json nothing.json', 'error: There is no file nothing.json.'),
    ('plan --gpus 8 --model l --images-per-second -1 --loader-images-per-second 1',
     'error: rates and bandwidth must be positive.'),
    ('', 'error: the following arguments are required: command')])
def test_bad_input_is_refused_in_one_sentence(capsys, line, sentence):
    with pytest.raises(SystemExit) as stop:
        benchmark(line.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(sentence) and error.count('\n') == 1
