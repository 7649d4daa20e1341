"""The same numbers from timm's Eva, and the options that it does not have."""
import copy

import pytest
import torch
from mmengine.registry import MODELS

from nepa_mm.checkpoints.huggingface import check_and_complete
from nepa_mm.checkpoints.huggingface_config import model_cfg
from nepa_mm.models.timm_eva import eva_args, from_timm, to_timm

from .test_convert import SMALL, build
from .test_parity import assert_agrees

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
