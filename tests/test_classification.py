"""The classification configs: recipe against the reference's tables, heads and labels."""
import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS
from mmengine.runner import Runner
from mmpretrain.apis import ImageClassificationInferencer

from nepa_mm.checkpoints.huggingface import match_names
from nepa_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from nepa_mm.models.heads import AttentiveClsHead

from .conftest import REPO, TINY


def load(name):
    return Config.fromfile(REPO / 'configs' / 'classification' / f'{name}.py')


def shrink(cfg, images, work_dir):
    """The config on 8 + 8 made-up images of two classes with a tiny network from scratch."""
    cfg.work_dir, cfg.log_level = str(work_dir), 'WARNING'
    cfg.model.backbone.update(arch=TINY, init_cfg=None,
                              frozen_stages=min(cfg.model.backbone.frozen_stages, 3))
    cfg.model.head.update(in_channels=32, num_classes=2)
    if cfg.model.head.type == 'AttentiveClsHead':
        cfg.model.head.num_heads = 2
    if cfg.model.get('neck'):
        cfg.model.neck.input_features = 32
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(images)
        if loader.dataset.type == 'ImageNet':
            loader.dataset.metainfo = dict(classes=['a', 'b'])
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 1
    for hook in cfg.custom_hooks:
        hook.momentum = 0.9
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.topk = (1, 2)
    return cfg


def groups_of(name):
    """Parameter groups that a config's optimiser would get, on a model without memory."""
    cfg = load(name)
    cfg.model.backbone.init_cfg = None
    with torch.device('meta'):
        model = MODELS.build(dict(cfg.model, _scope_='mmpretrain'))
    wrapper = dict(cfg.optim_wrapper)
    constructor = LayerDecayOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=wrapper['optimizer']), wrapper['paramwise_cfg'])
    groups = []
    constructor.add_params(groups, model)
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: g for g in groups for p in g['params']}, cfg


def test_groups_of_base_equal_the_reference():
    """The reference's table, name by name: lr, weight decay, exponent, what is frozen."""
    path = REPO / 'tests' / 'parity' / 'optim' / 'finetune_groups.json'
    table = json.loads(path.read_text())['cases'][0]
    groups, _ = groups_of('nepa_vit-b_ft_in1k')
    names = {published: ours for ours, parts in match_names(table['params'], 'mm').items()
             for published in parts}
    seen = set()
    for published, expected in table['params'].items():
        ours = names[published]
        if expected is None:
            assert ours not in groups, published
            continue
        seen.add(ours)
        group = groups[ours]
        scale = expected['llrd_scale']
        assert group['depth_from_top'] == scale, published
        assert group['lr'] == pytest.approx(expected['lr'] * expected['llrd'] ** scale, rel=1e-12)
        assert group['weight_decay'] == expected['weight_decay'], published
    assert seen == set(groups)


def test_groups_of_large():
    groups, cfg = groups_of('nepa_vit-l_ft_in1k')
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(4e-3)
    for i in range(24):
        assert groups[f'backbone.layers.{i}.attn.qkv.weight']['lr'] == pytest.approx(
            4e-3 * 0.75 ** (23 - i))
    assert groups['backbone.cls_token']['lr'] == pytest.approx(4e-3 * 0.75 ** 24)
    assert groups['backbone.fc_norm.weight']['lr'] == pytest.approx(4e-3)
    for name in ('head.fc.weight', 'backbone.norm.weight'):
        assert groups[name]['lr'] == 1e-3


@pytest.mark.parametrize('name, lr, decay, end, schedule', [
    ('nepa_vit-b_ft_in1k', 6e-3, 0.65, 100, dict(warmup_ratio=0.2, per_layer_warmup=True)),
    ('nepa_vit-l_ft_in1k', 4e-3, 0.75, 100, dict(warmup_ratio=0.3, per_layer_warmup=True)),
    ('nepa_vit-b_ft-paper_in1k', 4e-3, 0.35, 100, dict(warmup=5, final_decay_rate=1.0)),
    ('nepa_vit-l_ft-paper_in1k', 4e-3, 0.60, 50, dict(warmup=5, final_decay_rate=1.0))])
def test_recipes(name, lr, decay, end, schedule):
    cfg = load(name)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr)
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == decay
    assert cfg.param_scheduler.end == cfg.train_cfg.max_epochs == end
    assert {k: cfg.param_scheduler[k] for k in schedule} == schedule
    assert cfg.optim_wrapper.clip_grad.max_norm == 1 and cfg.optim_wrapper.optimizer.eps == 1e-8
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 1024
    backbone = cfg.model.backbone
    paper = 'paper' in name
    assert backbone.drop_path_rate == (0.2 if 'vit-l' in name else 0.1)
    assert (backbone.out_type, backbone.fc_norm) == (
        ('last_token', False) if paper else ('avg_featmap', True))
    assert not backbone.causal and backbone.frozen_stages == 0 and backbone.rope_rescale == 2
    assert load(name.replace('_in1k', '-causal_in1k')).model.backbone.causal


@pytest.mark.parametrize('name, size, resized', [
    ('nepa_vit-b_ft_in1k', (300, 500), (256, 426)), ('nepa_vit-b_ft_in1k', (500, 300), (426, 256)),
    ('nepa_vit-l_ft_in1k', (300, 500), (235, 235))])
def test_evaluation_geometry(name, size, resized):
    """Sizes before and after the centre crop; the crop is the centre."""
    rng, pipeline = np.random.default_rng(0), load(name).test_dataloader.dataset.pipeline[1:]
    results = dict(img=rng.integers(0, 256, (*size, 3), dtype=np.uint8), img_shape=size)
    resize, crop = (TRANSFORMS.build(dict(step, _scope_='mmpretrain')) for step in pipeline[:2])
    assert (resize.interpolation, resize.backend) == ('bicubic', 'pillow')
    results = resize(results)
    before = results['img']
    assert before.shape[:2] == resized
    after = crop(results)['img']
    top, left = round((resized[0] - 224) / 2), round((resized[1] - 224) / 2)
    assert np.array_equal(after, before[top:top + 224, left:left + 224])


def test_classifier_starts_at_zero():
    cfg = load('nepa_vit-b_ft_in1k')
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    cfg.model.head.in_channels = 32
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert not model.head.fc.weight.any() and not model.head.fc.bias.any()


@pytest.mark.parametrize('out_indices', [0, 2])
@pytest.mark.parametrize('out_type', ['avg_featmap', 'last_token'])
def test_linear_probe_reads_the_feature_that_is_named(out_type, out_indices):
    cfg = load('nepa_vit-b_linear_in1k')
    cfg.model.backbone.update(arch=TINY, init_cfg=None, frozen_stages=3, out_type=out_type,
                              out_indices=out_indices)
    backbone, image = MODELS.build(cfg.model.backbone).train(), torch.randn(2, 3, 28, 28)
    assert not any(p.requires_grad for p in backbone.parameters())
    tokens, = backbone.encode(*backbone.embed(image), [out_indices])
    expected = tokens[:, 1:].mean(1) if out_type == 'avg_featmap' else tokens[:, -1]
    assert torch.equal(backbone(image)[0], expected)


def test_attentive_head():
    head = AttentiveClsHead(num_classes=3, in_channels=32, num_heads=2).eval()
    tokens = torch.randn(2, 5, 32)
    scores = head((tokens,))
    assert scores.shape == (2, 3)
    shuffled = head((tokens[:, torch.tensor([4, 2, 0, 1, 3])],))
    torch.testing.assert_close(scores, shuffled)    # attention pooling knows no order
    assert not torch.allclose(scores, head((tokens.flip(0),)))
    torch.testing.assert_close(scores, head((10 * tokens,)), rtol=1e-3, atol=1e-4)
    torch.nn.init.normal_(head.pool.latent)         # what it pays attention to is learned
    assert not torch.allclose(scores, head((tokens,)))


@pytest.fixture
def runner(image_folder, tmp_path):
    """A short fine-tuning run of the released recipe."""
    return Runner.from_cfg(shrink(load('nepa_vit-b_ft_in1k'), image_folder, tmp_path / 'work'))


def test_wrong_labels(runner, image_folder):
    runner.cfg.model.head.num_classes = 3
    three = Runner.from_cfg(Config(dict(runner.cfg, experiment_name='three')))
    with pytest.raises(ValueError, match='num_classes is 3, but train_dataloader has 2 classes'):
        three.train()
    listed = image_folder / 'list.txt'
    listed.write_text('class_0/0.jpg 0\nclass_1/0.jpg 7\n')
    dataset = dict(type='CustomDataset', data_root=str(image_folder), data_prefix='train',
                   ann_file='list.txt', pipeline=runner.cfg.train_dataloader.dataset.pipeline)
    runner.cfg.model.head.num_classes = 2
    runner.cfg.train_dataloader.dataset = dataset
    runner.cfg.train_dataloader.batch_size = 2
    other = Runner.from_cfg(Config(dict(runner.cfg, experiment_name='other')))
    with pytest.raises(ValueError, match='Labels of .* must be 0 to 1, .* from 0 to 7'):
        other.train()


def test_inferencer_and_confusion_matrix(runner, image_folder, tmp_path):
    runner.train()
    checkpoint = str(tmp_path / 'work' / 'epoch_1.pth')
    inferencer = ImageClassificationInferencer(runner.cfg, checkpoint, device='cpu',
                                               classes=['a', 'b'])
    result, = inferencer(str(image_folder / 'val' / 'class_0' / '0.jpg'))
    assert result['pred_class'] in ('a', 'b') and result['pred_scores'].sum() == pytest.approx(1)

    cfg = runner.cfg
    cfg.load_from, cfg.resume, cfg.experiment_name, cfg.custom_hooks = (
        checkpoint, False, 'matrix', [])
    cfg.test_evaluator = [dict(type='ConfusionMatrix', num_classes=2)]
    matrix = Runner.from_cfg(cfg).test()['confusion_matrix/result']
    assert matrix.sum() == 8 and matrix.shape == (2, 2)
