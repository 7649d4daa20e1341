"""timm's augmentations inside mmpretrain: the same numbers, the same order, the right channels."""
import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, TRANSFORMS
from mmpretrain.structures import DataSample
from PIL import Image
from timm.data import Mixup, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy

from nepa_mm.datasets.transforms.timm_augment import TimmBatchAugment, TimmRandAugment

from .conftest import REPO, TINY

CONFIG = REPO / 'configs' / 'classification' / 'nepa_vit-b_ft_in1k.py'


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.mark.parametrize('value', range(6))
def test_mixing_equals_timm(value):
    """Images and targets bitwise, with what the reference sets; both kinds of mixing occur."""
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 3, 9, 9, 5, 1])
    ours, targets = images.clone(), torch.nn.functional.one_hot(labels, 10)
    seed(value)
    ours, targets = TimmBatchAugment()(ours, targets)
    seed(value)
    theirs = RandomErasing(0.25, mode='pixel', max_count=1, device='cpu')(images.clone())
    theirs, expected = Mixup(mixup_alpha=0.8, cutmix_alpha=1., prob=1., switch_prob=0.5,
                             mode='batch', label_smoothing=0.1, num_classes=10)(theirs, labels)
    assert torch.equal(ours, theirs) and torch.equal(targets, expected)
    assert not torch.equal(ours, images)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_partner_is_the_mirrored_image():
    images = torch.arange(4.).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    augment = TimmBatchAugment(erase_prob=0., cutmix_alpha=0., label_smoothing=0.)
    seed(0)
    mixed, targets = augment(images, torch.eye(4))
    lam = targets[0, 0]
    assert targets[0, 3] == pytest.approx(1 - lam) and 0 < lam < 1
    expected = lam * torch.arange(4.) + (1 - lam) * torch.arange(4.).flip(0)
    torch.testing.assert_close(mixed[:, 0, 0, 0], expected)


def test_odd_batch():
    with pytest.raises(ValueError, match='even batch size, got 3'):
        TimmBatchAugment()(torch.randn(3, 3, 8, 8), torch.eye(3)[:, :2])


def test_loss_of_a_batch_equals_timm():
    """From uint8 images and labels to the loss, through preprocessor, network and head."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(arch=TINY, init_cfg=None, drop_path_rate=0., rope_rescale=None)
    cfg.model.head.in_channels = 32
    cfg.model.head.init_cfg = None
    model = MODELS.build(cfg.model).train()
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    labels = torch.tensor([7, 999, 0, 7])
    data = dict(inputs=images, data_samples=[DataSample().set_gt_label(x) for x in labels])
    seed(3)
    data = model.data_preprocessor(data, training=True)
    loss = model.loss(**data)['loss']

    seed(3)
    inputs = (images.flip(1).float() - 127.5) / 127.5                       # BGR to RGB
    inputs = RandomErasing(0.25, mode='pixel', max_count=1, device='cpu')(inputs)
    inputs, targets = Mixup(mixup_alpha=0.8, cutmix_alpha=1., prob=1., switch_prob=0.5,
                            mode='batch', label_smoothing=0.1, num_classes=1000)(inputs, labels)
    logits = model.head(model.extract_feat(inputs))
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, targets))
    assert loss.dtype == torch.float32
    evaluated = model.data_preprocessor(dict(inputs=images), training=False)['inputs']
    torch.testing.assert_close(evaluated, (images.flip(1).float() - 127.5) / 127.5)


def test_rand_augment_equals_timm_in_rgb():
    rng = np.random.default_rng(0)
    bgr = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
    reference = rand_augment_transform('rand-m9-mstd0.5-inc1', dict(
        translate_const=100, img_mean=(128, 128, 128), interpolation=Image.Resampling.BICUBIC))
    changed = 0
    for value in range(20):
        seed(value)
        ours = TimmRandAugment()(dict(img=bgr.copy()))['img']
        seed(value)
        theirs = np.asarray(reference(Image.fromarray(bgr[..., ::-1])))[..., ::-1]
        assert np.array_equal(ours, theirs)
        changed += not np.array_equal(ours, bgr)
    assert changed > 5


def apply(policy, name, magnitude, rgb):
    """What one operation of a policy makes of an image, at a fixed magnitude: RGB to RGB."""
    step = TimmRandAugment(policy)
    step.augment.ops = [op for op in step.augment.ops if op.name == name]
    step.augment.num_layers, step.augment.choice_weights = 1, None
    op, = step.augment.ops
    op.prob, op.magnitude, op.magnitude_std = 1., magnitude, 0
    return step(dict(img=rgb[..., ::-1]))['img'][..., ::-1]


def posterized(values, bits):
    return values // 2 ** (8 - bits) * 2 ** (8 - bits) if bits > 0 else 0 * values


def solarized(values, threshold):
    return np.where(values < threshold, values, 255 - values)


# by integers: what an operation makes of its values, of dtype int, at a share of its range
EXACT = {
    'Posterize': lambda x, level: posterized(x, int(4 * level)),
    'PosterizeIncreasing': lambda x, level: posterized(x, 4 - int(4 * level)),
    'Solarize': lambda x, level: solarized(x, min(256, int(256 * level))),
    'SolarizeIncreasing': lambda x, level: solarized(x, 256 - min(256, int(256 * level))),
    'SolarizeAdd': lambda x, level: np.where(
        x < 128, np.minimum(255, x + min(128, int(110 * level))), x),
    'Invert': lambda x, level: 255 - x,
}
POLICIES = ['rand-m9-mstd0.5-inc1', 'rand-m9-mstd0.5', 'rand-m9-mmax30-inc1', 'rand-m9-mmax30',
            'rand-m9-tweights', 'rand-m9-t3a', 'rand-m9-t3aw']


@pytest.mark.parametrize('policy', POLICIES)
def test_every_operation_over_its_range_and_beyond(policy):
    rng = np.random.default_rng(0)
    checked = set()
    for op in TimmRandAugment(policy).augment.ops:
        for size in [(1, 1), (1, 7), (5, 3), (28, 31)]:
            rgb = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            for magnitude in [*range(-2, 33), 9.99, 10.01, 1e-6]:
                out = apply(policy, op.name, magnitude, rgb)
                assert out.shape == rgb.shape and out.dtype == np.uint8
                if op.name in EXACT:
                    level = min(max(magnitude, 0), 30 if 'mmax30' in policy else 10) / 10
                    assert np.array_equal(out, EXACT[op.name](rgb.astype(int), level)), (
                        op.name, magnitude)
                    checked.add(op.name)
    assert len(checked) == {'rand-m9-t3a': 1, 'rand-m9-t3aw': 3}.get(policy, 4)


def test_no_bits_are_a_black_image():
    white = np.full((3, 5, 3), 255, dtype=np.uint8)
    increasing = [240, 240, 240, 224, 224, 192, 192, 192, 128, 128, 0]
    decreasing = [0, 0, 0, 128, 128, 192, 192, 192, 224, 224, 240]
    for magnitude in range(11):
        for policy, name, values in [
                ('rand-m9-inc1', 'PosterizeIncreasing', increasing),
                ('rand-m9', 'Posterize', decreasing)]:
            assert (apply(policy, name, magnitude, white) == values[magnitude]).all()


@pytest.mark.parametrize('policy, least, most', [
    ('rand-m0-mstd1', 0.05, 0.08),
    ('rand-m10-mstd101-inc1', 0., 0.002),           # uniform from 0 to 10, which it never reaches
    ('rand-m12-mmax15-mstd1-inc1-n3-p0.9', 0.08, 0.13)])    # less than 0 bits, too
def test_policies_draw_black_images(policy, least, most):
    seed(0)
    augment = TimmRandAugment(policy)
    image = np.random.default_rng(0).integers(60, 256, (4, 4, 3), dtype=np.uint8)
    black = [not augment(dict(img=image))['img'].any() for _ in range(5000)]
    assert least <= np.mean(black) <= most


def test_thirty_thousand_draws_of_the_recipe():
    """The pipeline of the released fine-tuning and its batch augmentation, on small images."""
    seed(0)
    cfg = Config.fromfile(CONFIG)
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[1].scale = 8
    steps = Compose([dict(step, _scope_='mmpretrain') for step in pipeline[1:]])
    cfg.model.backbone.arch = TINY
    prepare = MODELS.build(cfg.model).data_preprocessor
    image = np.random.default_rng(0).integers(60, 256, (9, 11, 3), dtype=np.uint8)
    black = 0
    for _ in range(60):
        drawn = [steps(dict(img=image, img_shape=(9, 11), gt_label=i)) for i in range(500)]
        black += sum(not item['inputs'].any() for item in drawn)
        batch = prepare(dict(inputs=torch.stack([item['inputs'] for item in drawn]),
                             data_samples=[item['data_samples'] for item in drawn]), training=True)
        assert batch['inputs'].shape == (500, 3, 8, 8) and batch['inputs'].isfinite().all()
        scores = torch.stack([sample.gt_score for sample in batch['data_samples']])
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(500))
    # the rare case: 2 layers x 1 of 15 operations x 0.5 x P(magnitude >= 10) is 46 in 30,000
    assert 25 <= black <= 70


@pytest.mark.parametrize('policy', [
    'augmix-m3', 'rand-m9.5', 'rand-m9-mstdinf', 'rand-m9-tfoo', 'rand-m9-x3', 'm9', '', 'rand-9'])
def test_unknown_policy(policy):
    with pytest.raises(ValueError, match=f"^policy .*'rand-m9-mstd0.5-inc1'.* got '{policy}'"):
        TimmRandAugment(policy)


def test_parameters_of_the_reference():
    """Facts of the released fine-tuning, as drawn by the objects that the config builds."""
    pipeline = Config.fromfile(CONFIG).train_dataloader.dataset.pipeline
    names = [step.type for step in pipeline]
    assert names == ['LoadImageWithPillow', 'RandomResizedCrop', 'RandomFlip', 'TimmRandAugment',
                     'PackInputs']
    crop, flip, augment = (TRANSFORMS.build(dict(s, _scope_='mmpretrain')) for s in pipeline[1:4])
    assert (crop.crop_ratio_range, crop.interpolation, crop.backend, flip.prob) == (
        (0.08, 1.0), 'bicubic', 'pillow', [0.5] if isinstance(flip.prob, list) else 0.5)
    ops = augment.augment.ops
    assert augment.augment.num_layers == 2
    assert all((op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5) for op in ops)
    assert all(op.hparams['translate_const'] == 100 for op in ops)
    assert all(op.kwargs['fillcolor'] == (128,) * 3 for op in ops)
    assert all(op.kwargs['resample'] == Image.Resampling.BICUBIC for op in ops)


def test_erasing_statistics():
    """A quarter of the images, one rectangle of 2 to 33 %, normal noise."""
    seed(0)
    augment = TimmBatchAugment(erase_prob=0.25)
    augment.mixup.mixup_enabled = False
    images, _ = augment(torch.full((800, 1, 40, 40), 9.), torch.eye(2)[torch.zeros(800).long()])
    erased = (images != 9).flatten(1)
    share, noise = erased.float().mean(dim=1), images[images != 9]
    assert 0.20 < (share > 0).float().mean() < 0.30
    assert share[share > 0].min() > 0.015 and share.max() < 0.35
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
