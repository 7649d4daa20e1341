"""Segmentation: the patch rule's geometry, the configs, and runs on a made-up ADE20K tree."""
import logging
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.apis import MMSegInferencer
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

from nepa_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from nepa_mm.engine.optim_wrapper import BF16OptimWrapper
from nepa_mm.models.segmentors import PATCH_RULES
from nepa_mm.models.vit import NEPAViT

from .conftest import REPO, Copies
from .conftest import TINY as THREE_BLOCKS
from .tiny_runs import options, run_script, run_test, run_train

CONFIGS = REPO / 'configs' / 'segmentation'
BASE = CONFIGS / 'nepa_vit-b_upernet_160k_ade20k-512x512.py'
LARGE = CONFIGS / 'nepa_vit-l_upernet_160k_ade20k-512x512.py'
LINEAR = CONFIGS / 'nepa_vit-b_linear_40k_ade20k-512x512.py'
TINY = dict(THREE_BLOCKS, num_layers=4)
CROP = 56       # pixels, in the runs
SIZES = [(56, 56), (56, 70), (60, 100), (13, 5), (14, 90), (43, 29)]

# the network of the runs: blocks and pipeline of the config, in small
SMALL = [
    'model.backbone.arch=tiny', 'model.backbone.init_cfg=None', 'model.neck.embed_dim=192',
    'model.decode_head.in_channels=[192,192,192,192]', 'model.decode_head.channels=16',
    'model.auxiliary_head.in_channels=192', 'model.auxiliary_head.channels=16',
    f'model.data_preprocessor.size=({CROP},{CROP})', f'model.test_cfg.crop_size=({CROP},{CROP})',
    'model.test_cfg.stride=(38,38)',
    f'train_dataloader.dataset.pipeline.2.scale=(224,{CROP})',
    f'train_dataloader.dataset.pipeline.3.crop_size=({CROP},{CROP})',
    'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0', f'val_dataloader.dataset.pipeline.1.scale=(224,{CROP})',
    f'test_dataloader.dataset.pipeline.1.scale=(224,{CROP})',
    'optim_wrapper.optimizer.lr=0.003', 'train_cfg.max_iters=20', 'train_cfg.val_interval=20',
    'param_scheduler.0.end=5', 'param_scheduler.1.begin=5', 'param_scheduler.1.end=20',
    'default_hooks.checkpoint.interval=10', 'default_hooks.logger.interval=5']


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture
def ade(tmp_path, monkeypatch):
    """A made-up ADE20K tree in the configs' place: brightness tells the four labels apart."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    root = Path('data/ade/ADEChallengeData2016')
    for split, num in dict(training=4, validation=2).items():
        for index in range(num):
            label = np.kron(rng.permutation(4).reshape(2, 2), np.ones((40, 45))).astype(np.uint8)
            pixels = np.repeat(80 * label[..., None], 3, axis=2)
            for kind, array, suffix in (('images', pixels, 'jpg'), ('annotations', label, 'png')):
                path = root / kind / split / f'ADE_{index:08d}.{suffix}'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return tmp_path


def small_cfg(path=BASE, **backbone):
    """The segmentor of a config with the test's four-block backbone and a thin decoder."""
    cfg = config(path).model
    cfg.backbone.update(arch=TINY, out_indices=[0, 1, 2, 3], init_cfg=None, **backbone)
    cfg.neck.embed_dim = 32
    cfg.decode_head.update(in_channels=[32] * 4, channels=8)
    cfg.auxiliary_head.update(in_channels=32, channels=8)
    return cfg


@cache
def read(path):
    return Config.fromfile(path)


def config(path=BASE):
    """A fresh copy of a config; reading one takes a second."""
    return deepcopy(read(path))


def build(cfg):
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(Config(dict(model=cfg)).model))


def test_images_and_labels_are_copied_without_waiting():
    """With the meta device for a GPU."""
    prepare = build(small_cfg()).data_preprocessor.to('meta')
    data = dict(inputs=[torch.zeros(3, 56, 56, dtype=torch.uint8)] * 2, data_samples=[
        SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 56, 56))) for _ in range(2)])
    with Copies() as copies:
        prepare(data, training=True)
    assert copies.waits == [False] * 4


class PatchMeans(nn.Module):
    """In place of a backbone: the mean of every patch of 14 pixels."""

    patch_embed = nn.Module()
    patch_embed.patch_size = (14, 14)

    def forward(self, img):
        return [nn.functional.avg_pool2d(img, 14)]


def patch_means(patch_rule, mode='whole'):
    """A segmentor whose logits are the patch means, brought back to the size of the input."""
    head = dict(type='FCNHead', in_channels=3, channels=3, num_convs=0, concat_input=False,
                num_classes=3, dropout_ratio=0., in_index=0)
    segmentor = build(dict(
        type='NEPASegmentor', patch_rule=patch_rule, decode_head=head,
        backbone=dict(type='NEPAViT', arch=TINY),
        test_cfg=dict(mode=mode, crop_size=(CROP, CROP), stride=(38, 38))))
    segmentor.backbone = PatchMeans()
    with torch.no_grad():
        segmentor.decode_head.conv_seg.weight.copy_(torch.eye(3)[..., None, None])
        segmentor.decode_head.conv_seg.bias.zero_()
    return segmentor.eval()


def position_image(height, width):
    """Channels: row, column, zero, in pixels."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return torch.stack((row, column, 0 * row))[None].float()


def sample(label):
    return SegDataSample(gt_sem_seg=PixelData(data=label))


def logits(segmentor, img):
    with torch.no_grad():
        return segmentor.predict(img)[0].seg_logits.data


@pytest.mark.parametrize('patch_rule', PATCH_RULES)
@pytest.mark.parametrize('size', [(100, 150), (113, 90), (512, 683)])
def test_a_logit_is_at_its_pixel(patch_rule, size):
    """Interpolation reproduces a ramp, so the logits of the positions are the positions."""
    img = position_image(*size)
    out = logits(patch_means(patch_rule), img)
    margin = 24     # half a patch, where interpolation has no neighbour, and the unseen rest
    inner = (..., slice(margin, -margin), slice(margin, -margin))
    assert out.shape == img[0].shape
    torch.testing.assert_close(out[inner], img[0][inner], rtol=0, atol=0.02)


def test_patch_rules_see_other_pixels():
    sizes = {rule: patch_means(rule).fitted_size((512, 683)) for rule in PATCH_RULES}
    assert sizes == dict(resize=(518, 686), pad=(518, 686), crop=(504, 672))
    assert patch_means('crop').fitted_size((13, 5)) == (28, 28)

    last = torch.zeros(1, 3, 60, 60)
    last[..., 56:] = 1.     # the columns that 'crop' leaves out
    seen = {rule: logits(patch_means(rule), last).max().item() for rule in PATCH_RULES}
    assert seen['crop'] == 0
    # the centre of the padded patch lies outside, pixel 59 at 3/4 of the way to it
    assert seen['pad'] == pytest.approx(4 / 14 * 3 / 4, abs=1e-3)
    assert seen['resize'] == pytest.approx(4 / 12, abs=0.02)    # 5 patches of 12 pixels


def test_unknown_patch_rule():
    with pytest.raises(ValueError, match="one of .*'resize', 'pad', 'crop'.* got 'stretch'"):
        build(dict(small_cfg(), patch_rule='stretch'))


@pytest.mark.parametrize('patch_rule', PATCH_RULES)
def test_any_size_passes_and_both_modes_agree(patch_rule):
    cfg = small_cfg()
    cfg.update(patch_rule=patch_rule,
               test_cfg=dict(mode='slide', crop_size=(60, 60), stride=(40, 40)))
    segmentor = build(cfg).eval()
    for size in [*SIZES, (60, 60)]:
        img = torch.randn(1, 3, *size)
        segmentor.test_cfg.mode = 'slide'
        slide = logits(segmentor, img)
        segmentor.test_cfg.mode = 'whole'
        whole = logits(segmentor, img)
        assert slide.shape == whole.shape == (150, *size)
        if max(size) <= 60:
            assert torch.equal(slide, whole)
        else:
            assert not torch.equal(slide, whole)


@pytest.mark.parametrize('patch_rule', PATCH_RULES)
def test_loss_reads_the_label_of_the_pixel(patch_rule):
    """Logits that are right where they are give no loss; a margin is ignored or not seen."""
    segmentor = patch_means(patch_rule)
    label = torch.zeros(1, 60, 60, dtype=torch.long)
    label[:, :, 28:] = 1
    img = 1000 * torch.stack((label[0] == 0, label[0] == 1, label[0] == 2)).float()[None]
    loss = segmentor.loss(img, [sample(label.clone())])
    wrong = segmentor.loss(img, [sample(label.flip(2))])
    assert loss['decode.acc_seg'] > 97 and wrong['decode.acc_seg'] < 15
    # a label in the unseen margin cannot change the loss
    label[:, :, 56:] = 2
    changed = segmentor.loss(img, [sample(label)])['decode.loss_ce']
    assert torch.equal(changed, loss['decode.loss_ce']) == (patch_rule == 'crop')


def test_feature_maps_are_the_blocks_outputs():
    backbone = NEPAViT(TINY, causal=False, out_type='featmap', out_indices=(0, 1, 2, 3),
                       final_norm=False, layer_scale_init_value=0.1).eval()
    with torch.no_grad():
        backbone.patch_embed.projection.bias.fill_(1.)
        img = torch.zeros(1, 3, 4 * 14, 6 * 14)
        img[..., 2 * 14:3 * 14, 5 * 14:] = 50.      # patch (2, 5) of 4 x 6
        maps = backbone(img)
        blocks = backbone.encode(*backbone.embed(img), out_indices=(0, 1, 2, 3))
    for feature, tokens in zip(maps, blocks):
        assert feature.shape == (1, 32, 4, 6)
        for row in range(4):
            for column in range(6):
                assert torch.equal(feature[0, :, row, column], tokens[0, 1 + row * 6 + column])
        unlike = (feature - feature[:, :, :1, :1]).norm(dim=1)
        assert divmod(unlike.argmax().item(), 6) == (2, 5)


def test_linear_probe_normalises_the_blocks_and_classifies():
    head = MODELS.build(dict(
        type='LinearSegHead', in_channels=[3, 5], in_index=[0, 1], channels=8, num_classes=2,
        input_transform='resize_concat', norm_cfg=dict(type='BN'), dropout_ratio=0.))
    maps = [100 + 9 * torch.randn(2, 3, 4, 6), 1e-2 * torch.randn(2, 5, 4, 6)]
    normalised = nn.functional.batch_norm(torch.cat(maps, dim=1), None, None, training=True)
    torch.testing.assert_close(head(maps), head.conv_seg(normalised))


def recipe(path):
    cfg = config(path)
    backbone, wrapper = cfg.model.backbone, cfg.optim_wrapper
    return dict(
        blocks=backbone.out_indices, drop_path=backbone.drop_path_rate, causal=backbone.causal,
        lr=wrapper.optimizer.lr, decay=wrapper.paramwise_cfg.layer_decay_rate,
        iters=cfg.train_cfg.max_iters, ends=[s.end for s in cfg.param_scheduler])


def test_recipes():
    assert recipe(BASE) == dict(blocks=[3, 5, 7, 11], drop_path=0.1, causal=False, lr=1e-4,
                                decay=0.65, iters=160000, ends=[1500, 160000])
    assert recipe(LARGE) == dict(blocks=[7, 11, 15, 23], drop_path=0.2, causal=False, lr=2e-5,
                                 decay=0.95, iters=160000, ends=[1500, 160000])
    assert recipe(LINEAR) == dict(blocks=[3, 5, 7, 11], drop_path=0., causal=True, lr=1e-3,
                                  decay=1., iters=40000, ends=[1500, 40000])
    for path in (BASE, LARGE, LINEAR):
        cfg = config(path)
        assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16
        assert cfg.model.data_preprocessor.mean == cfg.model.data_preprocessor.std == [127.5] * 3
        assert cfg.optim_wrapper.type == 'BF16OptimWrapper' and 'fp16' not in cfg
        assert cfg.optim_wrapper.constructor == 'LayerDecayOptimWrapperConstructor'
        assert cfg.train_pipeline[3].crop_size == cfg.model.test_cfg.crop_size == (512, 512)
        assert all(word in path.read_text() for word in (
            'Paper:', 'Expected:', 'Cost:', 'Command:', 'ot stated in the paper'))


@pytest.mark.parametrize('path', [BASE, LARGE, LINEAR, REPO / 'configs/demo/digits_upernet.py'])
def test_inference_sees_the_images_as_validation_does(path):
    cfg = config(path)      # mmseg's inferencer reads test_pipeline, the Runner the data set's
    reads = [[{key: value for key, value in step.items() if value != 'mmseg'} for step in steps]
             for steps in (cfg.test_pipeline, cfg.val_dataloader.dataset.pipeline)]
    assert reads[0] == reads[1]


@pytest.mark.parametrize('path, millions, trained', [
    (BASE, 162.38, 161.93), (LARGE, 438.72, 438.11), (LINEAR, 85.99, 0.47)])
def test_networks(path, millions, trained):
    with torch.device('meta'):
        parameters = list(MODELS.build(config(path).model).parameters())
    assert sum(p.numel() for p in parameters) / 1e6 == pytest.approx(millions, abs=0.01)
    assert sum(p.numel() for p in parameters if p.requires_grad) / 1e6 == pytest.approx(
        trained, abs=0.01)


@pytest.mark.parametrize('path', [BASE, LARGE])
def test_full_size_logits(path):
    """Shapes only: the whole network on the meta device."""
    with torch.device('meta'):
        segmentor = revert_sync_batchnorm(MODELS.build(config(path).model)).eval()
        for size in [(512, 512), (512, 683), (640, 640)]:
            assert segmentor(torch.empty(1, 3, *size), mode='tensor').shape == (
                1, 150, *(4 * -(-side // 14) for side in size))
            metas = [dict(ori_shape=size, img_shape=size)]
            segmentor.test_cfg.mode = 'whole'
            assert segmentor.inference(torch.empty(1, 3, *size), metas).shape == (1, 150, *size)


def test_layer_decay_is_the_classifiers():
    """Same learning rate and weight decay for every parameter of the backbone."""
    def settings(cfg, model):
        constructor = LayerDecayOptimWrapperConstructor(
            dict(optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05)), cfg)
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: (group['lr'], group['weight_decay'])
                for group in constructor(model).optimizer.param_groups for p in group['params']}

    rate = config().optim_wrapper.paramwise_cfg
    segmentor = settings(rate, build(small_cfg()))
    classifier = settings(rate, MODELS.build(dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
        backbone=dict(type='NEPAViT', arch=TINY, qk_norm='affine', out_type='avg_featmap',
                      fc_norm=True, frozen_stages=0),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=5, in_channels=32))))
    shared = {name for name in segmentor if name.startswith('backbone.')}
    assert shared == {n for n in classifier if n.startswith(('backbone.layers', 'backbone.cls'))}
    assert {n: segmentor[n] for n in shared} == {n: classifier[n] for n in shared}
    assert segmentor['backbone.cls_token'] == pytest.approx((1e-4 * 0.65 ** 4, 0.05))
    assert segmentor['backbone.layers.3.attn.proj.weight'] == pytest.approx((1e-4, 0.05))
    assert segmentor['decode_head.conv_seg.weight'] == pytest.approx((1e-4, 0.05))


@pytest.mark.parametrize('start', ['average', 'raw', 'classifier', 'converted'])
def test_every_checkpoint_loads(start, tmp_path, caplog):
    torch.manual_seed(1)
    source = NEPAViT(TINY, qk_norm='plain' if start in ('average', 'raw') else 'affine')
    state = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    other = {k: v + 1 for k, v in state.items()}
    checkpoint = {
        'average': dict(state_dict=state, ema_state_dict=other, meta={}),
        'raw': dict(state_dict=other, meta={}, ema_state_dict={
            'steps': torch.tensor(3), **{f'module.{k}': v for k, v in state.items()}}),
        'classifier': dict(state_dict={**state, 'backbone.fc_norm.weight': torch.ones(32),
                                       'head.fc.weight': torch.ones(5, 32)}),
        'converted': state,
    }[start]
    torch.save(checkpoint, tmp_path / 'start.pth')
    cfg = small_cfg()
    cfg.backbone.init_cfg = config().model.backbone.init_cfg
    cfg.backbone.init_cfg.checkpoint = str(tmp_path / 'start.pth')
    if start == 'raw':
        cfg.backbone.init_cfg.weights = 'raw'
    segmentor = build(cfg)
    with caplog.at_level(logging.INFO):
        segmentor.init_weights()
    own = segmentor.backbone.state_dict()
    matched = [k for k in own if f'backbone.{k}' in state]
    assert len(matched) == len(own) - 8 * (start in ('average', 'raw'))     # QK-norm's weights
    assert all(torch.equal(own[k], state[f'backbone.{k}']) for k in matched)
    assert all((own[k] == 1).all() for k in set(own) - set(matched))


def test_mixed_precision_is_on():
    """Products in bf16, weights, gradients and loss in fp32."""
    segmentor = build(small_cfg())
    seen = {}
    for name in ('backbone.layers.0.attn.qkv', 'decode_head.conv_seg', 'neck.upsample_2x.0'):
        segmentor.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.dtype}))
    cfg = dict(config().optim_wrapper, bf16_on_cpu=True)
    wrapper = LayerDecayOptimWrapperConstructor(
        {k: v for k, v in cfg.items() if k not in ('constructor', 'paramwise_cfg')},
        cfg['paramwise_cfg'])(segmentor)
    assert isinstance(wrapper, BF16OptimWrapper)
    with wrapper.optim_context(segmentor):
        losses = segmentor.loss(torch.randn(2, 3, 60, 60),
                                [sample(torch.randint(150, (1, 60, 60))) for _ in range(2)])
    loss = losses['decode.loss_ce'] + losses['aux.loss_ce']
    wrapper.update_params(loss)
    assert set(seen.values()) == {torch.bfloat16} and len(seen) == 3
    assert loss.dtype == torch.float32
    assert {p.dtype for p in segmentor.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in segmentor.parameters() if p.grad is not None} <= {torch.float32}


def test_train_evaluate_resume_show(ade):
    runner = run_train([str(BASE), '--work-dir', 'work', *options(*SMALL)])
    assert runner.iter == 20
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in runner.model.modules())
    assert runner.message_hub.get_scalar('val/mIoU').current() >= 0
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 20 and np.isfinite(losses).all()

    Path('work/last_checkpoint').write_text('work/iter_10.pth')     # as if killed then
    Path('work/iter_20.pth').unlink()
    runner = run_train([str(BASE), '--work-dir', 'work', *options(*SMALL)])
    history = runner.message_hub.get_scalar('train/loss').data[0]
    assert runner.iter == 20 and len(history) == 20
    assert (history == losses).all()        # the same crops, flips, distortions and drop path

    checkpoint = 'work/iter_20.pth'
    metrics = run_test([str(BASE), checkpoint, '--show-dir', 'shown',
                        *options(*SMALL, 'visualizer.name=shown')])
    assert metrics['mIoU'] > 0
    assert len(list(Path('shown').rglob('*.png'))) == 2

    # --tta is what the config of its own does, at the scales of the config or at others
    scales = {f'tta_pipeline.1.transforms.0.{i}.scale': (4 * side, side)
              for i, side in enumerate((28, 42, 56, 70, 84, 98))}
    tta = run_test([str(BASE), checkpoint, '--tta', *options(
        *(o for o in SMALL if 'pipeline.1' not in o), *(f'{k}={v}' for k, v in scales.items()))])
    own = run_test([str(CONFIGS / f'{BASE.stem}_ms-flip.py'), checkpoint, *options(*(
        o.replace('model.', 'model.module.') for o in SMALL if 'test_dataloader.dataset' not in o),
        *(f'{k.replace("tta_pipeline", "test_dataloader.dataset.pipeline")}={v}'
          for k, v in scales.items()))])
    assert own == tta and tta != metrics

    inferencer = MMSegInferencer(f'work/{BASE.name}', checkpoint, device='cpu')
    image = str(next(Path('data').rglob('validation/*.jpg')))
    assert inferencer(image)['predictions'].shape == (80, 90)


def test_two_processes(ade):
    status, output = run_script(
        'dist_train.sh', BASE, 2, '--work-dir', 'work', *options(
            *(o for o in SMALL if not o.startswith('train_cfg')), 'train_cfg.max_iters=3',
            'train_cfg.val_interval=3', 'default_hooks.run_check.odd=warn'), cwd=ade)
    assert status == 0, output
    assert 'SyncBN needs GPUs' in output and (ade / 'work/iter_3.pth').is_file()
    assert 'mIoU' in output


def test_missing_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_train([str(BASE), *options('model.backbone.init_cfg=None')])
    error = capsys.readouterr().err
    assert 'data/ade/ADEChallengeData2016/images/training' in error
    assert 'annotations/{training,validation}/*.png' in error and error.count('\n') == 1
