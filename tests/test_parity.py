"""The reference's numbers: embeddings, blocks, loss, logits, gradients within 1e-5.

The cases come from the authors' code, see tests/parity/README.md.
"""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from safetensors.torch import load_file

from nepa_mm.checkpoints.huggingface import from_published, to_published
from nepa_mm.checkpoints.huggingface_config import backbone_cfg
from nepa_mm.models.nepa import NEPA

CASES = sorted((Path(__file__).parent / 'parity' / 'cases').iterdir())
TOLERANCE = 1e-5    # relative to the largest value of a tensor


def assert_agrees(ours, reference, name=''):
    error = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-6)
    assert ours.shape == reference.shape and error < TOLERANCE, f'{name}: {error:.2e}'


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def case(request):
    """Pretraining model, classifier, golden tensors and config of one case."""
    config = json.loads((request.param / 'case.json').read_text())['config']
    weights = from_published(load_file(request.param / 'weights.safetensors'))
    backbone = backbone_cfg(config)
    model = NEPA(backbone=backbone, head=dict(type='NEPAHead')).eval()
    model.backbone.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in weights.items()
         if k.startswith('backbone.')})
    classifier = MODELS.build(dict(
        type='mmpretrain.ImageClassifier', backbone=backbone,
        head=dict(type='LinearClsHead', num_classes=config['num_labels'],
                  in_channels=config['hidden_size']))).eval()
    classifier.load_state_dict(weights)
    return model, classifier, load_file(request.param / 'golden.safetensors'), config


def assert_gradients(model, golden, prefix):
    gradients = to_published({k: p.grad for k, p in model.named_parameters()
                              if p.grad is not None})
    names = [key.removeprefix(prefix) for key in golden if key.startswith(prefix)]
    for name in names:
        assert_agrees(gradients[name], golden[prefix + name], name)
    return len(names)


def test_outputs(case):
    model, classifier, golden, config = case
    backbone, image = model.backbone, golden['in/pixel_values']
    z, grid = backbone.embed(image)
    assert_agrees(z, golden['out/input_embedding'][:, 1:], 'embeddings')

    blocks = []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda module, args, out: blocks.append(out))
    assert_agrees(backbone.encode(z, grid)[-1],
                  golden['out/last_hidden_state'], 'after the final norm')
    assert len(blocks) == config['num_hidden_layers']
    for i, block in enumerate(blocks, start=1):
        assert_agrees(block, golden[f'out/hidden_states/{i}'], f'block {i}')

    assert_agrees(model.loss(image)['loss'], golden['out/loss_eval'], 'loss')
    assert_agrees(classifier(image), golden['out/logits'], 'logits')


def test_other_sizes(case):
    """The grid of the image itself positions the patches."""
    model, classifier, golden, _ = case
    for key in [key for key in golden if key.startswith('in/alt/')]:
        out, image = key.replace('in/', 'out/'), golden[key]
        tokens = model.backbone.encode(*model.backbone.embed(image))[-1]
        assert_agrees(tokens, golden[f'{out}/last_hidden_state'], key)
        assert_agrees(classifier(image), golden[f'{out}/logits'], key)
        assert_agrees(model.loss(image)['loss'], golden[f'{out}/loss_eval'], key)


def test_training_step(case):
    """Loss and gradients in training mode, without and with the reference's RoPE draw."""
    model, _, golden, _ = case
    image, rope = golden['in/pixel_values'], model.backbone.rope
    model.train()
    neutral = dict(shift=torch.zeros(2), jitter=torch.ones(2), rescale=torch.ones(1))
    rope.draw = lambda device: tuple(neutral.values())
    loss = model.loss(image)['loss']
    loss.backward()
    assert_agrees(loss, golden['out/loss_train'], 'loss')
    assert_gradients(model, golden, 'out/grads/')

    drawn = {k.removeprefix('in/rope_aug/'): v for k, v in golden.items() if 'in/rope_aug' in k}
    if drawn:
        rope.draw = lambda device: tuple((neutral | drawn).values())
        assert_agrees(model.loss(image)['loss'], golden['out/loss_train_aug'], 'augmented loss')
        tokens = model.backbone.encode(*model.backbone.embed(image))[-1]
        assert_agrees(tokens, golden['out/last_hidden_state_aug'], 'augmented tokens')


def test_classification_step(case):
    _, classifier, golden, _ = case
    logits = classifier(golden['in/pixel_values'])
    loss = -(golden['in/soft_labels'] * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
    loss.backward()
    assert_agrees(loss, golden['out/cls_loss_soft'], 'soft cross-entropy')
    assert_gradients(classifier, golden, 'out/cls_grads/')


def test_bf16_autocast(case):
    model, _, golden, _ = case
    with torch.autocast('cpu', torch.bfloat16):
        loss = model.loss(golden['in/pixel_values'])['loss']
        tokens = model.backbone.encode(*model.backbone.embed(golden['in/pixel_values']))[-1]
    assert loss.dtype == tokens.dtype == torch.float32      # residual stream and loss stay fp32
    if 'out/loss_autocast_bf16' in golden:
        assert abs(loss - golden['out/loss_autocast_bf16']) < 1e-2


def test_round_trip(case):
    _, classifier, _, _ = case
    weights = classifier.state_dict()
    again = from_published(to_published(weights))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)
