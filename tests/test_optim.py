"""Parameter groups and schedules against the reference's tables; bf16; resuming."""
import itertools
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from nepa_mm.checkpoints.huggingface import to_published
from nepa_mm.engine.optim_wrapper import BF16OptimWrapper
from nepa_mm.engine.schedulers import LayerDecayCosineLR
from nepa_mm.models.nepa import NEPA
from nepa_mm.models.vit import NEPAViT

PARITY = Path(__file__).parent / 'parity' / 'optim'
ARCH = dict(embed_dims=8, num_layers=12, num_heads=2, feedforward_channels=16)
RUNS = itertools.count()
RELEASED = dict(layer_decay_rate=0.65, head_lr=1e-3)


@pytest.fixture
def log(caplog):
    """What mmengine's current logger says."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def read(name):
    return json.loads((PARITY / f'{name}.json').read_text())


def classifier(arch='base', **kwargs):
    """The fine-tuning model without memory for its weights."""
    with torch.device('meta'):
        return MODELS.build(dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='NEPAViT', arch=arch, qk_norm='affine', out_type='avg_featmap',
                          fc_norm=True, frozen_stages=0, causal=False) | kwargs,
            head=dict(type='LinearClsHead', num_classes=1000,
                      in_channels=8 if arch is ARCH else dict(base=768, large=1024)[arch])))


def optim_wrapper(model, lr=6e-3, weight_decay=0.05, paramwise_cfg=RELEASED, **kwargs):
    return build_optim_wrapper(model, dict(
        type='OptimWrapper', constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=lr, weight_decay=weight_decay),
        paramwise_cfg=paramwise_cfg, **kwargs))


def published_table(model, groups):
    """(lr, weight decay, layer_scale) under the published names; None where frozen."""
    group_of = {id(p): i for i, group in enumerate(groups) for p in group['params']}
    numbers = {name: torch.tensor(group_of.get(id(p), -1)).expand(p.shape)
               for name, p in model.named_parameters()}
    return {name: None if number.flatten()[0] < 0 else tuple(
                groups[int(number.flatten()[0])][key]
                for key in ('lr', 'weight_decay', 'depth_from_top'))
            for name, number in to_published(numbers).items()}


# Parameter groups

def test_finetune_groups():
    case, = read('finetune_groups')['cases']
    model = classifier()
    groups = optim_wrapper(model).optimizer.param_groups
    reference = {
        name: row and (row['lr'] * row['llrd']**row['llrd_scale'], row['weight_decay'],
                       row['llrd_scale']) for name, row in case['params'].items()}
    assert published_table(model, groups) == reference
    assert len(groups) == case['groups'] == len({group['name'] for group in groups})


def test_pretrain_groups():
    case, = read('pretrain_groups')['cases']
    with torch.device('meta'):
        model = NEPA(backbone=dict(type='NEPAViT'), head=dict(type='NEPAHead'))
    groups = optim_wrapper(model, lr=4.8e-3, paramwise_cfg=None).optimizer.param_groups
    reference = {name: (row['lr'], row['weight_decay'], 0)
                 for name, row in case['params'].items()}
    assert published_table(model, groups) == reference
    assert len(groups) == case['groups'] == 2


def test_large_groups():
    """The rule for large (facts of the released script: lr 4e-3, decay 0.75)."""
    model = classifier('large')
    groups = optim_wrapper(model, lr=4e-3,
                           paramwise_cfg=dict(layer_decay_rate=0.75, head_lr=1e-3)
                           ).optimizer.param_groups
    table = published_table(model, groups)
    block = 'vit_nepa.encoder.layer.{}.output.dense.weight'
    assert table[block.format(23)] == (4e-3, 0.05, 0)
    assert table[block.format(0)] == (4e-3 * 0.75**23, 0.05, 23)
    assert table['vit_nepa.embeddings.cls_token'] == (4e-3 * 0.75**24, 0.05, 24)
    assert table['fc_norm.weight'] == (4e-3, 0., 0)
    assert table['vit_nepa.layernorm.bias'] == (1e-3, 0., 0)
    assert table['classifier.weight'] == (1e-3, 0.05, 0)
    assert len(groups) == 2 * 24 + 1 + 2    # blocks, class token, head


def test_patch_embedding_is_placed_like_the_class_token():
    model = classifier(frozen_stages=-1)
    table = published_table(model, optim_wrapper(model).optimizer.param_groups)
    assert (table['vit_nepa.embeddings.patch_embeddings.projection.weight']
            == table['vit_nepa.embeddings.cls_token'] == (6e-3 * 0.65**12, 0.05, 12))


def test_segmentor_groups():
    model = MODELS.build(dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor'),
        backbone=dict(type='NEPAViT', arch=ARCH, out_type='featmap', out_indices=[3, 11]),
        decode_head=dict(type='mmseg.FCNHead', in_channels=8, channels=8, num_classes=2,
                         num_convs=1),
        auxiliary_head=dict(type='mmseg.FCNHead', in_channels=8, channels=8, num_classes=2,
                            in_index=0, num_convs=1)))
    groups = optim_wrapper(model, 1e-4, paramwise_cfg=dict(layer_decay_rate=0.65)
                           ).optimizer.param_groups
    lr = {id(p): group['lr'] for group in groups for p in group['params']}
    assert lr[id(model.decode_head.conv_seg.weight)] == 1e-4
    assert lr[id(model.auxiliary_head.conv_seg.bias)] == 1e-4
    assert lr[id(model.backbone.layers[11].ln1.weight)] == 1e-4
    assert lr[id(model.backbone.layers[0].ln1.weight)] == 1e-4 * 0.65**11
    assert len(lr) == len(list(model.parameters()))


def test_wrapped_model_has_the_same_groups():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = classifier(ARCH)
    plain, wrapped = (optim_wrapper(m).optimizer.param_groups for m in (model, Wrapper(model)))
    assert [g['name'] for g in plain] == [g['name'] for g in wrapped]
    assert plain[0]['name'] == 'depth_from_top_12'     # the log's lr is the lowest group's


def test_groups_are_logged(log):
    optim_wrapper(classifier(ARCH))
    assert 'head_no_decay' in log.text and 'depth_from_top_12 ' in log.text
    assert '8,000 parameters in 1 tensors' in log.text


class Stranger(nn.Module):
    """A model with a parameter that no rule places."""

    def __init__(self, name):
        super().__init__()
        self.backbone = NEPAViT(ARCH)
        parent, _, last = name.rpartition('.')
        self.get_submodule(parent).register_parameter(last, nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize('name', ['position', 'backbone.position'])
@pytest.mark.parametrize('rate', [1., 0.65])
def test_unknown_parameter_is_refused(name, rate):
    with pytest.raises(ValueError, match=name):
        optim_wrapper(Stranger(name), paramwise_cfg=dict(layer_decay_rate=rate))


def test_backbone_without_depths_is_refused():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='get_layer_depth, and Linear has none'):
        optim_wrapper(model)


@pytest.mark.parametrize('paramwise_cfg, message', [
    (dict(norm_decay_mult=0.), 'norm_decay_mult'),
    (dict(layer_decay_rate=0.), 'layer_decay_rate must be in'),
    (dict(layer_decay_rate=1.5), 'got 1.5'),
    (dict(head_lr=-1.), 'head_lr must not be negative'),
])
def test_bad_settings_are_refused(paramwise_cfg, message):
    with pytest.raises(ValueError, match=message):
        optim_wrapper(classifier(ARCH), paramwise_cfg=paramwise_cfg)


def test_optimizer_must_state_lr_and_weight_decay():
    with pytest.raises(ValueError, match='must state lr and weight_decay'):
        optim_wrapper(classifier(ARCH), weight_decay=None)


# Schedules

def build_scheduler(wrapper, **kwargs):
    return PARAM_SCHEDULERS.build(
        dict(type='LayerDecayCosineLR', by_epoch=False, end=1000) | kwargs,
        default_args=dict(optimizer=wrapper, epoch_length=10))


def multipliers(wrapper):
    """Multiplier of the base lr per layer_scale, the head apart."""
    groups = wrapper.optimizer.param_groups
    return {g['depth_from_top']: g['lr'] / 6e-3 for g in groups if not g['name'].startswith('head')}


def iterate(wrapper, scheduler, steps):
    """Yield the multipliers at each of the next steps."""
    for _ in range(steps):
        yield multipliers(wrapper)
        wrapper.step()
        scheduler.step()


@pytest.mark.parametrize('number, per_layer_warmup', [(0, True), (1, False)])
def test_schedule_equals_the_reference_also_after_a_resume(number, per_layer_warmup):
    run = read('schedules')['runs'][number]
    assert (run['scheduler'] == 'llrd_cosine_warmup') == per_layer_warmup
    options = dict(warmup_ratio=0.2, per_layer_warmup=per_layer_warmup)
    wrapper = optim_wrapper(classifier(ARCH))
    scheduler = build_scheduler(wrapper, **options)
    ours = list(iterate(wrapper, scheduler, 417))

    saved = json.loads(json.dumps(scheduler.state_dict()))
    saved_wrapper = wrapper.state_dict()
    saved_wrapper['state'] = {}
    wrapper = optim_wrapper(classifier(ARCH))
    scheduler = build_scheduler(wrapper, **options)
    wrapper.load_state_dict(saved_wrapper)
    scheduler.load_state_dict(saved)
    ours += list(iterate(wrapper, scheduler, 1000 - 417))

    for scale, column in run['multiplier_by_llrd_scale'].items():
        for step, expected in zip(run['steps'], column):
            assert abs(ours[step][int(scale)] - expected) < 1e-9, (scale, step)
    assert len(ours) == 1000 and set(ours[0]) == set(range(13))


def test_without_a_warmup_the_first_update_has_the_full_rate():
    for per_layer_warmup in (True, False):
        wrapper = optim_wrapper(classifier(ARCH))
        peaks = [group['lr'] for group in wrapper.optimizer.param_groups]
        build_scheduler(wrapper, warmup_ratio=0, per_layer_warmup=per_layer_warmup)
        assert [group['lr'] for group in wrapper.optimizer.param_groups] == peaks


def test_resuming_a_schedule_of_another_length_warns(log):
    saved = build_scheduler(optim_wrapper(classifier(ARCH))).state_dict()
    scheduler = build_scheduler(optim_wrapper(classifier(ARCH)), end=2000)
    scheduler.load_state_dict(saved)
    assert 'schedule of 1000 updates continues; the 2000' in log.text
    assert scheduler.total_updates == 1000


def test_head_follows_the_top_group():
    wrapper = optim_wrapper(classifier(ARCH))
    scheduler = build_scheduler(wrapper, warmup_ratio=0.2, per_layer_warmup=True)
    for _ in iterate(wrapper, scheduler, 5):
        pass
    head, = {g['lr'] for g in wrapper.optimizer.param_groups if g['name'].startswith('head')}
    assert head == pytest.approx(1e-3 * multipliers(wrapper)[0], rel=1e-12)


def test_rising_decay_is_linear():
    """Paper: the decay rises linearly from 0.35 to 1 over training, one warmup for all."""
    wrapper = optim_wrapper(classifier(ARCH), paramwise_cfg=dict(layer_decay_rate=0.35))
    scheduler = build_scheduler(wrapper, warmup_ratio=0.05, final_decay_rate=1.)
    for step, ours in enumerate(iterate(wrapper, scheduler, 1000)):
        decay = 0.35 + 0.65 * step / 1000
        assert (ours[0] == 0) == (step == 0)
        for scale, value in ours.items():
            assert value == pytest.approx(ours[0] * decay**scale, rel=1e-9)
        assert step != 50 or ours[0] == 1


def test_stock_scheduler_keeps_the_layer_decay():
    wrapper = optim_wrapper(classifier(ARCH), paramwise_cfg=dict(layer_decay_rate=0.65))
    kwargs = dict(by_epoch=False, epoch_length=10)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(type='LinearLR', start_factor=1e-6, begin=0, end=15),
                               default_args=dict(optimizer=wrapper, **kwargs)),
        PARAM_SCHEDULERS.build(dict(type='PolyLR', power=1., begin=15, end=100),
                               default_args=dict(optimizer=wrapper, **kwargs))]
    for _ in range(60):
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
    ours = multipliers(wrapper)
    assert 0.4 < ours[0] < 0.6
    for scale, value in ours.items():
        assert value == pytest.approx(ours[0] * 0.65**scale, rel=1e-9)


def test_plain_optimizer_gets_warmup_and_cosine():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.)
    scheduler = LayerDecayCosineLR(optimizer, warmup=4, end=12, by_epoch=False)
    values = []
    for _ in range(12):
        values.append(optimizer.param_groups[0]['lr'] / 2)
        optimizer.step()
        scheduler.step()
    assert values[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert values[8] == pytest.approx(0.5)
    assert 0 < values[11] < 0.04


@pytest.mark.parametrize('options, message', [
    (dict(by_epoch=True), 'convert_to_iter_based=True'),
    (dict(end=10**9), 'length of the run'),
    (dict(warmup=10, warmup_ratio=0.1), 'not both'),
    (dict(warmup=1000), 'does not fit'),
    (dict(warmup_ratio=1.), 'warmup_ratio must be in'),
    (dict(final_decay_rate=2.), 'final_decay_rate must be in'),
    (dict(final_decay_rate=1., per_layer_warmup=True), 'constant layer decay'),
])
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(optim_wrapper(classifier(ARCH)), **options)


def test_layer_options_need_layer_groups():
    wrapper = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.))
    with pytest.raises(ValueError, match='LayerDecayOptimWrapperConstructor'):
        build_scheduler(wrapper, per_layer_warmup=True)


# Through the Runner

class Toy(BaseModel):
    """A one-block backbone with a mean-square loss."""

    def __init__(self):
        super().__init__()
        self.backbone = NEPAViT(ARCH | dict(num_layers=2), patch_size=2, rope_rescale=None)
        self.dtypes = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out, = self.backbone(inputs)
        self.dtypes.append(self.backbone.layers[0].attn.qkv(out).dtype)
        return dict(loss=out.float().square().mean())


class LRRecorder(Hook):
    """Write down every group's lr, and the values of the log, per iteration."""

    def __init__(self):
        self.lrs, self.logged = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.lrs.append([g['lr'] for g in runner.optim_wrapper.optimizer.param_groups])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        scalars = runner.message_hub.log_scalars
        self.logged.append((scalars['train/base_lr'].current(), scalars['train/lr'].current()))


def run(work_dir, scheduler, max_epochs=3, accumulative_counts=1, stop_after=None, resume=False,
        decay=0.5, batches=6):
    """Train Toy for some epochs of ``batches`` iterations; return runner and recorder."""
    torch.manual_seed(0)
    data = [dict(inputs=torch.randn(3, 4, 4)) for _ in range(2 * batches)]
    recorder = LRRecorder()

    class Stop(Hook):
        def after_train_epoch(self, runner):
            runner.train_loop.stop_training = runner.epoch + 1 == stop_after

    runner = Runner(
        Toy(), str(work_dir), DataLoader(data, batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs), resume=resume,
        optim_wrapper=ConfigDict(
            type='BF16OptimWrapper', constructor='LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay_rate=decay), clip_grad=dict(max_norm=1.),
            accumulative_counts=accumulative_counts),
        param_scheduler=scheduler,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=[recorder, Stop()], experiment_name=f'optim_{next(RUNS)}')
    runner.train()
    return runner, recorder


def test_epochs_in_the_config(tmp_path):
    """Pretraining's form: warmup in epochs, length of an epoch known at run time only."""
    scheduler = dict(type='LayerDecayCosineLR', warmup=1, by_epoch=True,
                     convert_to_iter_based=True)
    runner, recorder = run(tmp_path, scheduler, decay=1.)
    lrs = [lr[0] for lr in recorder.lrs]
    assert lrs[:7] == pytest.approx([1e-2 * s / 6 for s in range(7)], abs=1e-12)
    assert lrs[12] == pytest.approx(5e-3) and len(lrs) == 18
    assert [base for base, _ in recorder.logged] == lrs


@pytest.mark.parametrize('options', [dict(warmup_ratio=0.3, per_layer_warmup=True),
                                     dict(warmup_ratio=0.1, final_decay_rate=1.)])
def test_resume_in_the_middle(tmp_path, options):
    """Lrs, and the weights, of a stopped and resumed run are those of a straight one."""
    scheduler = dict(type='LayerDecayCosineLR', by_epoch=False, **options)
    straight, expected = run(tmp_path / 'straight', scheduler)
    _, first = run(tmp_path / 'resumed', scheduler, stop_after=1)
    resumed, second = run(tmp_path / 'resumed', scheduler, resume=True)
    assert len(first.lrs) == 6 and first.lrs + second.lrs == expected.lrs
    assert len({tuple(row) for row in expected.lrs}) == 18
    assert expected.logged[3][1] < expected.logged[3][0]    # lowest layer and base lr
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters()):
        assert torch.equal(ours, theirs)


def test_schedule_counts_updates_under_accumulation(tmp_path):
    """18 iterations in steps of 4 are 5 updates: the schedule is that of 5 iterations."""
    _, short = run(tmp_path / 'short', dict(
        type='LayerDecayCosineLR', by_epoch=False, warmup_ratio=0.3), max_epochs=1, batches=5)
    _, accumulated = run(tmp_path / 'accumulated', dict(
        type='LayerDecayCosineLR', by_epoch=False, warmup_ratio=0.3), accumulative_counts=4)
    at_update = accumulated.lrs[3::4] + accumulated.lrs[-1:]
    assert at_update == short.lrs and len(short.lrs) == 5


@pytest.mark.parametrize('bf16_on_cpu, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16(log, bf16_on_cpu, dtype):
    if torch.cuda.is_available() and not bf16_on_cpu:
        pytest.skip('fp32 is the rule without an accelerator only')
    model = Toy()
    wrapper = build_optim_wrapper(model, ConfigDict(
        type='BF16OptimWrapper', bf16_on_cpu=bf16_on_cpu, accumulative_counts=2,
        clip_grad=dict(max_norm=1e-3), optimizer=dict(type='SGD', lr=1.)))
    assert isinstance(wrapper, BF16OptimWrapper) and isinstance(wrapper, OptimWrapper)
    assert log.text.count('trains in fp32') == (0 if bf16_on_cpu else 1)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        model.train_step(dict(inputs=torch.randn(2, 3, 4, 4)), wrapper)
        moved = sum((p - b).square().sum() for p, b in zip(model.parameters(), before)) ** 0.5
        assert moved == 0 if step == 0 else moved.item() == pytest.approx(1e-3, rel=1e-2)
    assert model.dtypes == [dtype, dtype]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
