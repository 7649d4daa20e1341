"""The objective: pairing, stop-gradient, the last patch, masking, first loss value."""
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from nepa_mm.models.nepa import NEPA, NEPAHead, next_embedding_loss

from .conftest import TINY, smooth_images


def nepa(backbone={}, head={}, **kwargs):
    torch.manual_seed(0)
    return NEPA(backbone=dict(type='NEPAViT', arch=TINY, layer_scale_init_value=1.,
                              rope_rescale=None) | backbone,
                head=dict(type='NEPAHead') | head, **kwargs)


def test_registered_in_both_scopes():
    for scope in ('mmpretrain', 'mmseg', 'mmengine'):
        cfg = dict(type='NEPAViT', arch=TINY, _scope_=scope)
        assert MODELS.build(cfg).num_layers == 3
    model = MODELS.build(dict(
        type='NEPA', _scope_='mmpretrain', backbone=dict(type='NEPAViT', arch=TINY),
        head=dict(type='NEPAHead'),
        data_preprocessor=dict(type='SelfSupDataPreprocessor', mean=[127.5] * 3,
                               std=[127.5] * 3)))
    data = dict(inputs=torch.full((2, 3, 28, 28), 255.), data_samples=[])
    data = model.data_preprocessor(data)
    assert data['inputs'].min() == data['inputs'].max() == 1


def test_loss_is_minus_the_mean_cosine():
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    torch.testing.assert_close(next_embedding_loss(a, b),
                               -F.cosine_similarity(a, b, dim=-1).mean())
    assert next_embedding_loss(a, 3 * a) == pytest.approx(-1)
    assert next_embedding_loss(a, -a) == pytest.approx(1)
    assert torch.isfinite(next_embedding_loss(torch.zeros(1, 3), a[0, :1, :3]))


def test_loss_in_fp32_under_autocast():
    with torch.autocast('cpu', torch.bfloat16):
        loss = next_embedding_loss(torch.randn(4, 9).bfloat16(), torch.randn(4, 9).bfloat16())
    assert loss.dtype == torch.float32


@pytest.mark.parametrize('shift', [0, 1, 2, 5])
def test_every_output_meets_its_target(shift):
    """Outputs that equal the embedding `shift` ahead give exactly -1, all others do not."""
    z = torch.randn(2, 9, 16)
    h = torch.randn(2, 10, 16)
    if shift:
        h[:, :10 - shift] = z[:, shift - 1:]    # token 0 is the class token, token t patch t
    else:
        h[:, 1:] = z
    assert NEPAHead(shift=shift).loss(h, z) == pytest.approx(-1)
    for other in {0, 1, 2, 5} - {shift}:
        assert NEPAHead(shift=other).loss(h, z) > -0.9


def test_no_gradient_reaches_the_target():
    z = torch.randn(2, 9, 16, requires_grad=True)
    h = torch.randn(2, 10, 16, requires_grad=True)
    NEPAHead().loss(h, z).backward()
    assert z.grad is None and h.grad.abs().sum() > 0
    NEPAHead(stop_gradient=False).loss(h, z).backward()
    assert z.grad.abs().sum() > 0


def test_embedding_learns_as_context_only():
    """With a one-patch image the patch is only a target: its projection gets no gradient."""
    model = nepa()
    model.loss(torch.randn(2, 3, 14, 14))['loss'].backward()
    assert not model.backbone.patch_embed.projection.weight.grad.any()
    assert model.backbone.cls_token.grad.abs().sum() > 0
    model.loss(torch.randn(2, 3, 14, 28))['loss'].backward()
    assert model.backbone.patch_embed.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('backbone', [{}, dict(qk_norm=None), dict(patch_size=7)])
def test_last_patch_is_target_but_no_input(backbone):
    """Reading 257 tokens or 256 gives the same loss to the last bit, and the same gradients."""
    model, image = nepa(backbone), torch.randn(2, 3, 56, 56)
    z, grid = model.backbone.embed(image)
    tokens = []
    model.backbone.layers[0].register_forward_hook(lambda m, args, out: tokens.append(out.shape[1]))
    short = model.loss(image)['loss']
    full = model.head.loss(model.backbone.encode(z, grid)[-1], z)
    assert tokens == [z.shape[1], 1 + z.shape[1]]
    assert torch.equal(short, full)
    short_grads = torch.autograd.grad(short, model.parameters())
    full_grads = torch.autograd.grad(full, model.parameters())
    for a, b in zip(short_grads, full_grads):
        torch.testing.assert_close(a, b)


def test_without_causal_mask_all_patches_are_inputs():
    model = nepa(dict(causal=False))
    tokens = []
    model.backbone.layers[0].register_forward_hook(lambda m, args, out: tokens.append(out.shape[1]))
    model.loss(torch.randn(1, 3, 28, 28))
    assert tokens == [5]


def test_first_loss_is_the_cosine_of_neighbours():
    """LayerScale 1e-5 makes the network nearly the identity: smooth images start near -0.65."""
    torch.manual_seed(0)
    model = NEPA(backbone=dict(type='NEPAViT', arch='small'), head=dict(type='NEPAHead'))
    with torch.no_grad():
        smooth = model.loss(smooth_images(8))['loss'].item()
        noise = model.loss(torch.randn(8, 3, 224, 224))['loss'].item()
    assert -0.75 < smooth < -0.55 and abs(noise) < 0.02


def test_masking_replaces_inputs_and_keeps_targets():
    model = nepa(mask_ratio=0.4)
    z = torch.randn(3, 20, 32)
    masked = model.mask(z)
    replaced = (masked == model.mask_token).all(dim=-1)
    assert replaced.sum(dim=1).tolist() == [8, 8, 8]
    assert torch.equal(masked[~replaced], z[~replaced])
    assert not torch.equal(replaced[0], replaced[1])
    model.loss(torch.randn(2, 3, 56, 56))['loss'].backward()
    assert model.mask_token.grad.abs().sum() > 0
    assert not hasattr(nepa(), 'mask_token')


def test_modes():
    model, image = nepa().eval(), torch.randn(1, 3, 28, 28)
    assert model(image)[0].shape == (1, 5, 32)
    assert model(image, mode='loss')['loss'].ndim == 0


@pytest.mark.parametrize('kwargs, message', [
    (dict(head=dict(shift=-1)), 'shift must be 0 or a positive number of patches, got -1'),
    (dict(mask_ratio=1.), r'mask_ratio must be in \[0, 1\), got 1.0'),
    (dict(intermediate_blocks=(0, -1)), r'among the 2 blocks before the last one, got \(0, -1\)'),
    (dict(intermediate_blocks=(3,)), r'among the 2 blocks before the last one, got \(3,\)'),
    (dict(mask_ratio=-0.4), r'mask_ratio must be in \[0, 1\), got -0.4')])
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nepa(**kwargs)


def test_shift_beyond_the_image():
    with pytest.raises(ValueError, match='shift=5 needs at least 5 patches.* has 4'):
        nepa(head=dict(shift=5)).loss(torch.randn(1, 3, 28, 28))
