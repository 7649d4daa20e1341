"""NEPAViT: shapes, causality, positions, options, initialisation and refusals."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nepa_mm.models.layers import RotaryEmbedding, rotate
from nepa_mm.models.vit import NEPAViT

from .conftest import TINY


def vit(**kwargs):
    torch.manual_seed(0)
    return NEPAViT(**(dict(arch=TINY, layer_scale_init_value=1.) | kwargs)).eval()


def test_arch_sizes():
    """Parameter counts of the released models (reference code, executed)."""
    with torch.device('meta'):
        base = NEPAViT(arch='base')
        large = NEPAViT(arch='large', qk_norm='affine')
        tiny, small = NEPAViT(arch='t'), NEPAViT(arch='SMALL')
    count = [sum(p.numel() for p in model.parameters()) for model in (base, large)]
    assert count == [85_527_552, 302_967_808]
    assert (tiny.embed_dims, small.embed_dims) == (192, 384)


@pytest.mark.parametrize('size', [(56, 56), (42, 70), (14, 140)])
def test_out_types(size):
    image, gh, gw = torch.randn(2, 3, *size), size[0] // 14, size[1] // 14
    raw, = vit()(image)
    assert raw.shape == (2, 1 + gh * gw, 32)
    torch.testing.assert_close(vit(out_type='cls_token')(image)[0], raw[:, 0])
    torch.testing.assert_close(vit(out_type='last_token')(image)[0], raw[:, -1])
    torch.testing.assert_close(vit(out_type='avg_featmap')(image)[0], raw[:, 1:].mean(1))
    normed, = vit(out_type='avg_featmap', fc_norm=True)(image)
    torch.testing.assert_close(normed, F.layer_norm(raw[:, 1:].mean(1), (32,), eps=1e-12))
    first, last = vit(out_type='featmap', out_indices=(0, -1))(image)
    assert first.shape == last.shape == (2, 32, gh, gw)
    torch.testing.assert_close(last[:, :, gh - 1, 0], raw[:, 1 + (gh - 1) * gw])


def test_no_final_norm():
    image, model = torch.randn(2, 3, 28, 28), vit(final_norm=False)
    out = []
    model.layers[-1].register_forward_hook(lambda module, args, output: out.append(output))
    assert torch.equal(model(image)[0], out[0])
    assert not any(name.startswith('norm') for name, _ in model.named_parameters())


def test_patch_embedding_is_the_convolution():
    model, image = vit(patch_size=(4, 8)), torch.randn(2, 3, 12, 32)
    z, grid = model.embed(image)
    expected = model.patch_embed.projection(image)
    assert grid == expected.shape[2:]
    torch.testing.assert_close(z, expected.flatten(2).transpose(1, 2))


def test_remainder():
    image = torch.randn(1, 3, 45, 30)
    with pytest.raises(ValueError, match='45x30 pixels is not a multiple of the patch of 14x14'):
        vit().embed(image)
    z, grid = vit(remainder='drop').embed(image)
    assert grid == (3, 2) and torch.equal(z, vit().embed(image[:, :, :42, :28])[0])
    z, grid = vit(remainder='pad').embed(image)
    assert grid == (4, 3)
    assert torch.equal(z, vit().embed(F.pad(image, (0, 12, 0, 11)))[0])
    for remainder in ('error', 'drop'):
        with pytest.raises(ValueError, match='13x20 pixels is smaller than one patch'):
            vit(remainder=remainder).embed(torch.randn(1, 3, 13, 20))
    assert vit(remainder='pad').embed(torch.randn(1, 3, 3, 20))[1] == (1, 2)


@pytest.mark.parametrize('options', [
    {}, dict(qk_norm=None), dict(gated_mlp=True, act_cfg=dict(type='SiLU')),
    dict(layer_scale_init_value=None)])
def test_no_leak_from_the_future(options):
    """Changing patch k leaves every output before k as it was, to the bit."""
    model, image = vit(**options), torch.randn(2, 3, 56, 56)
    before, = model(image)
    for k in range(16):
        changed, (row, col) = image.clone(), divmod(k, 4)
        changed[:, :, row * 14:row * 14 + 14, col * 14:col * 14 + 14] += 1
        after, = model(changed)
        assert torch.equal(before[:, :1 + k], after[:, :1 + k])
        assert not torch.equal(before[:, 1 + k], after[:, 1 + k])


def test_bidirectional_sees_the_future():
    model, image = vit(causal=False), torch.randn(1, 3, 28, 28)
    changed = image.clone()
    changed[:, :, 14:, 14:] += 1
    assert not torch.equal(model(image)[0][:, 0], model(changed)[0][:, 0])


def test_rope_against_its_definition():
    """Angles written out token by token, and relative: q.k depends on the distance only."""
    rope, grid = RotaryEmbedding(head_dims=8, theta=100.).eval(), (3, 5)
    sin, cos = rope(grid, num_prefix=1, device='cpu')
    assert torch.equal(sin[0], torch.zeros(8)) and torch.equal(cos[0], torch.ones(8))
    for row in range(3):
        for col in range(5):
            y, x = 2 * (row + 0.5) / 3 - 1, 2 * (col + 0.5) / 5 - 1
            freqs = [100. ** (-k * 4 / 8) for k in range(2)]
            angles = [2 * math.pi * c * f for c in (y, x) for f in freqs] * 2
            token = 1 + row * 5 + col
            expected = torch.tensor(angles, dtype=torch.float64)
            torch.testing.assert_close(sin[token].double(), expected.sin(), atol=1e-6, rtol=0)
            torch.testing.assert_close(cos[token].double(), expected.cos(), atol=1e-6, rtol=0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 16, 8)
    scores = rotate(q, sin, cos) @ rotate(k, sin, cos).transpose(-1, -2)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[0, 0, 9, 10])     # one to the right
    torch.testing.assert_close(scores[0, 0, 1, 7], scores[0, 0, 8, 14])     # one down, one right


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_rotation_against_its_formula(dtype):
    """Values and gradients, of queries whose channels lie apart, too."""
    sin, cos = RotaryEmbedding(head_dims=8).eval()((2, 3), num_prefix=1, device='cpu')
    x = torch.randn(2, 7, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    a, b = x.chunk(2, dim=-1)
    expected = x * cos + torch.cat((-b, a), dim=-1) * sin
    weight = torch.randn_like(expected)
    turned = rotate(x, sin, cos)
    with torch.no_grad():
        assert torch.equal(rotate(x, sin, cos), turned)
    torch.testing.assert_close(turned, expected)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (turned, expected))
    # theirs is rounded to bf16 twice before the sum
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 if dtype.itemsize == 8 else 0.05)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: rotate(x, sin, cos), x)


def test_rope_augmentation():
    """One draw for both axes, log-uniform in [1/2, 2], in training only."""
    torch.manual_seed(0)
    rope = RotaryEmbedding(head_dims=8, rescale=2.)
    draws = torch.cat([rope.draw('cpu')[2] for _ in range(4000)])
    assert 0.5 <= draws.min() < 0.51 and 1.98 < draws.max() <= 2
    logs = draws.log2()
    assert abs(logs.mean()) < 0.05 and abs(logs.std() - 1 / math.sqrt(3)) < 0.02
    shifts, jitters = zip(*(RotaryEmbedding(8, shift=0.5, jitter=4., rescale=None).draw('cpu')[:2]
                            for _ in range(1000)))
    shifts, jitters = torch.stack(shifts), torch.stack(jitters)     # one draw per axis
    assert shifts.min() < -0.49 and shifts.max() > 0.49 and shifts.abs().max() <= 0.5
    assert jitters.min() < 0.26 and jitters.max() > 3.9 and jitters.log().abs().max() <= math.log(4)
    assert (shifts[:, 0] != shifts[:, 1]).all() and (jitters[:, 0] != jitters[:, 1]).all()
    fixed = rope.eval()((4, 4), 0, 'cpu')[0]
    assert torch.equal(fixed, rope((4, 4), 0, 'cpu')[0])
    assert not torch.equal(fixed, rope.train()((4, 4), 0, 'cpu')[0])
    off = RotaryEmbedding(head_dims=8, rescale=None).train()
    assert torch.equal(off((4, 4), 0, 'cpu')[0], fixed)


def test_options_change_the_network():
    names = {n for n, _ in vit(qk_norm='affine_bias', gated_mlp=True).named_parameters()}
    assert {'layers.0.attn.q_norm.weight', 'layers.0.attn.k_norm.bias',
            'layers.0.mlp.fc1_g.weight', 'layers.0.ls1.gamma'} <= names
    names = {n for n, _ in vit(qk_norm=None, layer_scale_init_value=None,
                               qkv_bias=False).named_parameters()}
    assert not any('_norm' in n or '.ls' in n or n.endswith('qkv.bias') for n in names)


def test_dropout_and_drop_path_act_in_training_only():
    image = torch.randn(4, 3, 28, 28)
    for option in ('drop_rate', 'attn_drop_rate', 'drop_path_rate'):
        model = vit(rope_rescale=None, **{option: 0.5})
        assert torch.equal(model(image)[0], vit()(image)[0]), option
        model.train()
        assert not torch.equal(model(image)[0], model(image)[0]), option


def test_drop_path_rates_of_the_reference():
    path = Path(__file__).parent / 'parity' / 'optim' / 'drop_path.json'
    expected = json.loads(path.read_text())['base']
    with torch.device('meta'):
        model = NEPAViT(arch='base', drop_path_rate=expected['drop_path_prob'])
    rates = [layer.drop_path.drop_prob for layer in model.layers]
    assert rates == expected['attention_branch'] == expected['mlp_branch']


def test_initialisation():
    model = NEPAViT(arch='tiny', gated_mlp=True, qk_norm='affine')
    for name, p in model.named_parameters():
        if name == 'cls_token' or name.endswith('weight') and p.ndim > 1:
            assert abs(p.std() - 0.02) < 0.003 and abs(p.mean()) < 0.005, name
            assert p.abs().max() < 2, name
        elif 'gamma' in name:
            assert torch.equal(p, torch.full_like(p, 1e-5)), name
        elif name.endswith('bias'):
            assert not p.any(), name
        else:
            assert torch.equal(p, torch.ones_like(p)), name


def test_init_weights_keeps_the_initialisation():
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('frozen, trained', [
    (-1, {'cls_token', 'patch_embed', 'layers.0', 'layers.1', 'layers.2', 'norm', 'fc_norm'}),
    (0, {'cls_token', 'layers.0', 'layers.1', 'layers.2', 'norm', 'fc_norm'}),
    (2, {'layers.2', 'norm', 'fc_norm'}),
    (3, set())])
def test_frozen_stages(frozen, trained):
    model = vit(frozen_stages=frozen, out_type='avg_featmap', fc_norm=True, drop_path_rate=0.5)
    parts = {'.'.join(n.split('.')[:2 if n.startswith('layers') else 1])
             for n, p in model.named_parameters() if p.requires_grad}
    assert parts == trained
    model.train()
    assert model.layers[2].training == (frozen < 3)
    if frozen == 3:     # a frozen network gives the same features at every pass
        image = torch.randn(2, 3, 28, 28)
        assert torch.equal(model(image)[0], model(image)[0])


def test_checkpointing_computes_blocks_again_for_the_same_gradients():
    image, gradients = torch.randn(2, 3, 28, 28), []
    for with_cp in (False, True):
        model, calls = vit(with_cp=with_cp, rope_rescale=None).train(), []
        model.layers[1].attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(image)[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == 1 + with_cp
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_layer_depth():
    model = vit(out_type='avg_featmap', fc_norm=True)
    depths = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')
              for name, _ in model.named_parameters()}
    assert {total for _, total in depths.values()} == {5}
    assert depths['cls_token'][0] == depths['patch_embed.projection.weight'][0] == 0
    assert [depths[f'layers.{i}.attn.qkv.weight'][0] for i in range(3)] == [1, 2, 3]
    assert depths['norm.weight'][0] == depths['fc_norm.bias'][0] == 4
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (4, 5)
    with pytest.raises(ValueError, match='backbone.decoder is no parameter of NEPAViT'):
        model.get_layer_depth('backbone.decoder', 'backbone.')


@pytest.mark.parametrize('kwargs, message', [
    (dict(arch='giant'), "arch must be one of .* got 'giant'"),
    (dict(arch=dict(embed_dims=32)), 'arch as a dict needs the keys'),
    (dict(arch=TINY | dict(num_heads=3)), 'multiple of num_heads, got 32 and 3'),
    (dict(arch=TINY | dict(num_heads=16)), 'multiple of 4, got 2'),
    (dict(qk_norm='rms'), "qk_norm must be one of .* got 'rms'"),
    (dict(out_type='mean'), "out_type must be one of .* got 'mean'"),
    (dict(out_indices=[3]), r'out_indices must be in \[-3, 2\] for 3 blocks, got 3'),
    (dict(frozen_stages=4), r'frozen_stages must be in \[-1, 3\], got 4'),
    (dict(scan='hilbert'), "scan must be one of .* got 'hilbert'"),
    (dict(num_register_tokens=-1), 'num_register_tokens must be 0 or .* got -1'),
    (dict(remainder='crop'), "remainder must be one of .* got 'crop'"),
    (dict(drop_path_rate=-0.1), r'drop_path_rate must be in \[0, 1\), got -0.1'),
    (dict(drop_rate=1.), r'drop_rate must be in \[0, 1\), got 1.0'),
    (dict(rope_rescale=-2.), 'needs x >= 1 or None, got -2.0'),
    (dict(fc_norm=True, out_type='featmap'), "fc_norm .* got 'featmap'")])
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vit(**kwargs)
