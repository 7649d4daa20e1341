"""The same numbers from timm's Eva, and the options that it does not have."""
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from safetensors.torch import save_file

import nepa_mm
from nepa_mm import NEPAViT
from nepa_mm.apis.input_spec import timm_config
from nepa_mm.checkpoints.huggingface import check_and_complete, to_published
from nepa_mm.checkpoints.huggingface_config import DEFAULTS, model_cfg
from nepa_mm.models.timm_eva import eva_args, from_timm, to_timm

from .test_convert import SMALL, build, convert, write_published
from .test_parity import assert_agrees
from .tiny_runs import refused

OPTIONS = [
    dict(qk_norm=True), dict(is_causal=False), dict(layerscale_value=None, qkv_bias=False),
    dict(qk_norm=True, qk_norm_affine=True, qk_norm_bias=True, num_attention_heads=3),
    dict(use_gated_mlp=True, hidden_act='silu', num_channels=1, patch_size=[7, 14]),
    dict(intermediate_size=115, rope_theta=1000., layer_norm_eps=1e-6)]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_outputs(options):
    config = SMALL | dict(add_pooling_layer=True) | options
    ours, cfg = build(config, 5), model_cfg(config, 5)
    eva = to_timm(cfg, ours.state_dict())
    for size in [(56, 56), (28, 70)]:
        image = torch.randn(2, config.get('num_channels', 3), *size)
        assert_agrees(eva(image), ours(image), 'logits')

    back = from_timm(eva.state_dict())
    if config.get('qk_norm'):
        cfg = copy.deepcopy(cfg)
        cfg['backbone']['qk_norm'] = 'affine_bias'
    assert not check_and_complete(back, cfg)
    again = MODELS.build(cfg).eval()
    again.load_state_dict(back)
    assert_agrees(again(image), ours(image), 'back again')


@pytest.mark.parametrize('causal', [True, False])
def test_tokens(causal):
    """The pretraining backbone, and that causality reaches the other methods of the model."""
    config = SMALL | dict(is_causal=causal)
    ours = build(config, None)
    eva = to_timm(model_cfg(config), ours.state_dict())
    image = torch.randn(1, 3, 42, 56)
    tokens = ours.backbone(image)[0]
    assert_agrees(eva(image), tokens, 'tokens')
    features = eva.forward_intermediates(image, indices=1, norm=True, intermediates_only=True,
                                         output_fmt='NLC')
    assert_agrees(features[-1], tokens[:, 1:], 'intermediate features')
    changed = image.clone()
    changed[..., -14:, -14:] = 0
    assert torch.allclose(eva(changed)[:, :-1], tokens[:, :-1], atol=1e-4) == causal


def test_refusals():
    for name, value in dict(out_type='last_token', act_cfg=dict(type='SiLU'), drop_rate=0.1,
                            out_indices=(3, 5), rope_theta=None, use_abs_pos_emb=True,
                            num_register_tokens=4, scan='snake').items():
        with pytest.raises(ValueError, match=f'{name}=.* cannot be expressed'):
            eva_args({'arch': 'tiny', name: value})
    model = build(SMALL, 3)
    with pytest.raises(ValueError, match='not those of the config: .*blocks.1'):
        to_timm(model_cfg(SMALL | dict(num_hidden_layers=1, add_pooling_layer=True), 3),
                model.state_dict())


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    """A published folder of a classifier with weights of non-trivial scale, and the network."""
    monkeypatch.chdir(tmp_path)
    config = DEFAULTS | SMALL | dict(
        add_pooling_layer=True, is_causal=False, qk_norm=True, image_size=56, rope_theta=50.,
        layer_norm_eps=1e-5, id2label={'0': 'cat', '1': 'a dog', '2': 'x'})
    write_published(Path('published'), config, to_published(build(config, 3).state_dict()))
    convert(['published', 'in timm', '--to', 'timm'])
    return nepa_mm.load('published')


def test_folder_for_create_model(classifier, capsys):
    """timm builds it by name of the folder: logits, features, transform, class names."""
    eva = timm.create_model('local-dir:in timm', pretrained=True).eval()
    for size in [(56, 56), (28, 70), (98, 14)]:
        x = torch.randn(2, 3, *size)
        assert_agrees(eva(x), classifier(x), f'logits of {size}')
        features = nepa_mm.features(classifier, x)
        assert (eva.forward_features(x)[:, 1:].mean(1) - features).abs().max() <= 1e-5
        blocks = eva.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        for block, found in enumerate(blocks[:-1]):
            ours = nepa_mm.features(classifier, x, block, 'map')
            assert (found - ours).abs().max() <= 1e-5 * ours.abs().max()
    cfg = timm.data.resolve_model_data_config(eva)
    image = Image.fromarray(np.random.default_rng(0).integers(
        0, 256, (90, 77, 3), dtype=np.uint8))
    theirs, ours = timm.data.create_transform(**cfg)(image), classifier.transform(image)
    assert theirs.shape == ours.shape == (3, 56, 56)
    assert (theirs - ours).abs().max() < 1e-6
    assert eva.pretrained_cfg['label_names'] == ['cat', 'a dog', 'x']
    # what timm's users do next
    tuned = timm.create_model('local-dir:in timm', pretrained=True, num_classes=7).train()
    tuned(torch.randn(2, 3, 56, 56)).sum().backward()
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, eva.blocks[1].mlp.fc1.weight)
    assert tuned.head.weight.grad.shape == (7, 48)
    grey = timm.create_model('local-dir:in timm', pretrained=True, in_chans=1).eval()
    assert grey(torch.randn(1, 1, 56, 56)).shape == (1, 3)
    maps = timm.create_model('local-dir:in timm', pretrained=True, features_only=True,
                             out_indices=(0, 1)).eval()(x)
    assert torch.equal(maps[0], blocks[0])


@pytest.mark.parametrize('causal', [True, False])
def test_registered_models(tmp_path, causal):
    """Weights in the authors' format and in our names, under the name of a registered model."""
    assert {'nepa_vit', 'nepa_vit_base_patch14_224', 'nepa_vit_large_patch14_224'} <= set(
        timm.list_models('nepa*'))
    for arch in ('base', 'large'):
        name = f'nepa_vit_{arch}_patch14_224'
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id == f'SixAILab/nepa-{arch}-patch14-224' and cfg.num_classes == 0
        with torch.device('meta'):
            eva, ours = timm.create_model(name), NEPAViT(arch, qk_norm='affine_bias')
        assert sum(p.numel() for p in eva.parameters()) == sum(
            p.numel() for p in ours.parameters())
    config = SMALL | dict(is_causal=causal)
    ours = build(config, None)
    small = eva_args(model_cfg(config)['backbone']) | dict(global_pool='avg')
    save_file(to_published(ours.state_dict()), tmp_path / 'published.safetensors')
    save_file(ours.state_dict(), tmp_path / 'ours.safetensors')
    x = torch.randn(2, 3, 42, 70)
    for name in ('published', 'ours'):
        eva = timm.create_model(
            'nepa_vit', pretrained=True, **small,
            pretrained_cfg_overlay=dict(file=str(tmp_path / f'{name}.safetensors'))).eval()
        assert_agrees(eva(x), nepa_mm.features(ours, x), name)


def test_refusals_of_the_tool(classifier, capsys):
    for args, message in (
            (['in timm'], 'exists already'), (['new', '--fold-layer-scale'], 'for --to mm'),
            (['new', '--config', 'own.py'], 'crops a square')):
        config = json.loads(Path('published/config.json').read_text())
        cfg = Config(dict(model=model_cfg(config, 3)))
        cfg.test_dataloader = dict(dataset=dict(pipeline=[
            dict(type='Resize', scale=(40, 30)), dict(type='CenterCrop', crop_size=28)]))
        cfg.model.data_preprocessor = dict(mean=[0.] * 3, std=[1.] * 3, to_rgb=True)
        cfg.dump('own.py')
        with refused(message):
            convert(['published', *args, '--to', 'timm'])
        assert not Path('new').exists()


@pytest.mark.parametrize('crop', [[224, 224], [32, 32], [518, 518]])
@pytest.mark.parametrize('larger', [0, 1, 11, 32, 57])
def test_crop_pct(crop, larger):
    """timm's floor(size / crop_pct) is the resized side, in spite of rounding."""
    spec = dict(resize=crop[0] + larger, crop=crop, interpolation='bicubic', backend='pillow',
                mean=[1.], std=[1.], channel_order='any')
    assert math.floor(crop[0] / timm_config(spec)['crop_pct']) == crop[0] + larger
