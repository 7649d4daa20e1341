"""Options beside the paper's loss: mse, infonce, and SIGReg instead of the stop-gradient."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nepa_mm.models.losses import SIGReg, patch_infonce_loss
from nepa_mm.models.nepa import NEPA, NEPAHead, next_embedding_loss

from .conftest import TINY
from .tiny_runs import options, refused, run_train, save_pretraining


def nepa(head={}, **kwargs):
    torch.manual_seed(0)
    return NEPA(backbone=dict(type='NEPAViT', arch=TINY, layer_scale_init_value=1.,
                              rope_rescale=None),
                head=dict(type='NEPAHead') | head, **kwargs)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# mse and infonce

@pytest.mark.parametrize('shift, with_cls_token', [(0, True), (1, True), (1, False), (2, True)])
def test_against_loops(shift, with_cls_token):
    """Each prediction against its target; in infonce the image's other targets are negatives."""
    z, h, temperature = torch.randn(2, 5, 8), torch.randn(2, 6, 8), 0.3
    squares, entropies = [], []
    for image in range(2):
        pairs = [(h[image, token], token + shift - 1) for token in range(6)    # patches from 0
                 if token + shift <= 5 and (token > 0 or (with_cls_token and shift > 0))]
        for prediction, own in pairs:
            squares += [(a - b) ** 2 for a, b in zip(prediction, z[image, own])]
            cosines = {other: F.cosine_similarity(prediction, z[image, other], dim=0)
                       for _, other in pairs}
            entropies.append(torch.stack([c / temperature for c in cosines.values()]).logsumexp(0)
                             - cosines[own] / temperature)
    options = dict(shift=shift, with_cls_token=with_cls_token)
    torch.testing.assert_close(NEPAHead(loss='mse', **options).loss(h, z),
                               torch.stack(squares).mean())
    torch.testing.assert_close(
        NEPAHead(loss='infonce', temperature=temperature, **options).loss(h, z),
        torch.stack(entropies).mean())


def test_infonce_stays_within_the_image():
    """Other images of the batch change nothing; equal patches of the image cost their logarithm."""
    h, z = torch.randn(3, 7, 8), torch.randn(3, 6, 8)
    head = NEPAHead(loss='infonce')
    alone = torch.stack([head.loss(h[i:i + 1], z[i:i + 1]) for i in range(3)]).mean()
    torch.testing.assert_close(head.loss(h, z), alone)
    blank = torch.ones(1, 6, 8)
    torch.testing.assert_close(patch_infonce_loss(blank, blank, 0.1), torch.tensor(6.).log())
    perfect = torch.eye(6)[None]
    assert patch_infonce_loss(perfect, perfect, 0.05) < 1e-6


def test_cosine_is_the_default_bit_for_bit():
    h, z = torch.randn(2, 10, 16), torch.randn(2, 9, 16)
    expected = next_embedding_loss(h[:, :9], z)
    assert torch.equal(NEPAHead().loss(h, z), expected)
    assert torch.equal(NEPAHead(loss='cosine').loss(h, z), expected)


@pytest.mark.parametrize('loss', ['mse', 'infonce'])
def test_fp32_and_stop_gradient(loss):
    z = torch.randn(2, 9, 16, requires_grad=True)
    h = torch.randn(2, 10, 16, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        value = NEPAHead(loss=loss).loss(h.bfloat16(), z.bfloat16())
    assert value.dtype == torch.float32
    value.backward()
    assert z.grad is None and h.grad.any()
    NEPAHead(loss=loss, stop_gradient=False).loss(h, z).backward()
    assert z.grad.any()


# SIGReg

def score(samples, **options):
    return SIGReg(loss_weight=1., **options)(samples).item()


def test_against_an_integral_in_numpy():
    """The definition, in fp64, with a fine grid and one direction at a time."""
    x = torch.randn(300, 6) * torch.tensor([1., 2., 0.3, 1., 1., 1.]) + 0.4
    torch.manual_seed(5)
    directions = torch.randn(6, 16).numpy().astype(np.float64)
    t = np.linspace(-5, 5, 4001)
    expected = []
    for a in directions.T:
        projected = x.numpy() @ (a / np.linalg.norm(a))
        phi = np.exp(1j * t[:, None] * projected).mean(axis=1)
        integrand = abs(phi - np.exp(-t ** 2 / 2)) ** 2 * np.exp(-t ** 2 / 2)
        expected.append(np.trapezoid(integrand, t))
    torch.manual_seed(5)
    assert score(x, num_slices=16) == pytest.approx(np.mean(expected), rel=2e-3)


def test_gaussian_is_near_zero_and_everything_else_is_not():
    normal = torch.randn(64, 64, 32)
    assert 0 <= score(normal) < 2e-3
    line = torch.randn(64, 64, 1) * torch.randn(32)
    for name, other in dict(zeros=torch.zeros(64, 64, 32), constant=torch.ones(64, 64, 32),
                            narrow=0.1 * normal, wide=3 * normal, shifted=normal + 2,
                            line=line).items():
        assert score(other) > 0.02, name
    # closed form for equal embeddings at the origin
    expected = np.sqrt(np.pi) * (2 ** 0.5 - 2 + (2 / 3) ** 0.5)
    assert score(torch.zeros(9, 4)) == pytest.approx(expected, rel=1e-3)


def test_order_and_shape_do_not_matter():
    x = torch.randn(4, 9, 16)
    scores = []
    for samples in (x, x.flatten(0, 1), x.flatten(0, 1)[torch.randperm(36)]):
        torch.manual_seed(1)
        scores.append(score(samples))
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


def test_gradient_moves_a_collapsed_embedding_apart():
    x = (0.01 * torch.randn(256, 8) + 1).requires_grad_()
    regularizer, optimizer = SIGReg(loss_weight=1., num_slices=64), torch.optim.Adam([x], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        regularizer(x).backward()
        optimizer.step()
    x = x.detach()
    assert score(x) < 0.01
    assert x.mean().abs() < 0.1 and x.std(dim=0).mean() == pytest.approx(1, abs=0.2)


def test_weight_and_precision():
    x = torch.ones(50, 8)
    torch.manual_seed(1)
    once = score(x)
    torch.manual_seed(1)
    assert SIGReg(loss_weight=3.)(x).item() == pytest.approx(3 * once)
    with torch.autocast('cpu', torch.bfloat16):
        assert SIGReg()(x.bfloat16()).dtype == torch.float32
    assert not SIGReg().state_dict()


def test_in_the_model():
    """Added once, with or without intermediate blocks, and logged apart; off by default."""
    image = torch.randn(2, 3, 28, 42)
    model = nepa(dict(stop_gradient=False), intermediate_blocks=(0,),
                 regularizer=dict(type='SIGReg', loss_weight=2., num_slices=8))
    torch.manual_seed(3)
    losses = model.loss(image)
    torch.manual_seed(3)
    z, _ = model.backbone.embed(image)
    assert torch.equal(losses['loss_regularizer'], model.regularizer(z))
    total, log = model.parse_losses(losses)
    torch.testing.assert_close(
        total, losses['loss'] + losses['loss_intermediate'] + losses['loss_regularizer'])
    assert log['loss'] == losses['loss']
    gradient, = torch.autograd.grad(losses['loss_regularizer'],
                                    model.backbone.patch_embed.projection.weight)
    assert gradient.any()
    plain = nepa()
    state = torch.get_rng_state()
    assert plain.loss(image).keys() == {'loss'}
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize('build, message', [
    (lambda: NEPAHead(loss='l1'), "loss must be 'cosine', 'mse' or 'infonce', got 'l1'"),
    (lambda: NEPAHead(loss='infonce', temperature=0), 'temperature must be positive, got 0'),
    (lambda: SIGReg(num_slices=0), 'num_slices must be at least 1, got 0'),
    (lambda: SIGReg(loss_weight=-1.), 'loss_weight must be positive, got -1.0')])
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def worker(rank, file, x, results):
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank,
                                         world_size=2)
    torch.manual_seed(7 + rank)     # rank 0 decides the directions
    half = x[rank::2].clone().requires_grad_()
    value = SIGReg(num_slices=8)(half)
    value.backward()
    results[rank] = value.item(), half.grad
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    x = torch.randn(12, 4) + 1
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(worker, (tmp_path / 'sync', x, results), nprocs=2)
        results = dict(results)
    joined = x.clone().requires_grad_()
    torch.manual_seed(7)
    value = SIGReg(num_slices=8)(joined)
    value.backward()
    for rank, (local_value, grad) in results.items():
        assert local_value == pytest.approx(value.item(), rel=1e-5)
        # DDP averages the gradients of two processes
        torch.testing.assert_close(grad / 2, joined.grad[rank::2])


# tools/train.py

def test_train_with_options(folder):
    """From --cfg-options to the log, and the weights load into a network without the options."""
    run_train([save_pretraining(), '--work-dir', 'out', *options(
        'model.head.loss=infonce', 'model.head.temperature=100', 'model.head.stop_gradient=False',
        'model.regularizer.type=SIGReg', 'model.regularizer.num_slices=4')])
    log, = Path('out').glob('2*/*.log')
    first, second = (float(re.search(rf'\b{name}: (\S+)', log.read_text())[1])
                     for name in ('loss', 'loss_regularizer'))
    assert first == pytest.approx(np.log(4), abs=0.02)      # uniform logits over 4 patches
    assert second > 0
    nepa().load_state_dict(torch.load('out/epoch_1.pth', weights_only=False)['state_dict'])


@pytest.mark.parametrize('values, message', [
    (['model.head.loss=l1'], "loss must be 'cosine', 'mse' or 'infonce', got 'l1'"),
    (['model.head.losss=mse'], 'nothing reads model.head.losss'),
    (['model.regularizer.type=SIGReg', 'model.regularizer.loss_weight=0'],
     'loss_weight must be positive, got 0')])
def test_train_refuses(folder, values, message):
    with refused(message):
        run_train([save_pretraining(), '--work-dir', 'out', *options(*values)])
    assert not list(Path('.').glob('out/*.pth'))
