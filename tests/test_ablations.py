"""Ablations: the options beside the released network, and one config for every row of the paper."""
import ast
import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

from nepa_mm.engine.hooks.throughput import flops_per_image
from nepa_mm.evaluation.frozen_features import extract_features
from nepa_mm.models.layers import scan_order
from nepa_mm.models.nepa import NEPA, NEPAHead
from nepa_mm.models.vit import NEPAViT

from . import test_configs
from .conftest import REPO, TINY
from .tiny_runs import load_tool

load = functools.cache(Config.fromfile)
docstring_fields = load_tool('readme_tables').docstring_fields
CONFIGS = {folder: sorted((REPO / 'configs' / folder / 'ablations').glob('*.py'))
           for folder in ('pretrain', 'classification')}
ALL = [path for paths in CONFIGS.values() for path in paths]
PUBLISHED = {   # the paper's tables; Table 9's SwiGLU and Table 8's rising decay are no ablations
    'Table 1a': {'fail', '73.6', '76.8'},
    'Table 1b': {'78.2', '77.4', '80.2', 'fail', '81.1', '81.3'},
    'Table 1c': {'78.2', '76.4', '75.7'}, 'Table 1d': {'77.4', '73.1'},
    'Table 1e': {'81.3', '82.5'}, 'Table 8': {'83.0'}, 'Table 9': {'83.6'}}
OTHER_PAPERS = {'arXiv 2610.02203.': {'82.6', '81.7'}, 'arXiv 2607.00958.': {'unknown,'}}
SNAKE = [0, 1, 2, 5, 4, 3, 6, 7, 8, 11, 10, 9]      # of 4 rows and 3 columns


def vit(**kwargs):
    torch.manual_seed(0)
    return NEPAViT(**(dict(arch=TINY, layer_scale_init_value=1.) | kwargs)).eval()


def nepa(head={}, mask_ratio=0., intermediate_blocks=(), **backbone):
    torch.manual_seed(0)
    return NEPA(backbone=dict(type='NEPAViT', arch=TINY, layer_scale_init_value=1.,
                              rope_rescale=None) | backbone,
                head=dict(type='NEPAHead') | head, mask_ratio=mask_ratio,
                intermediate_blocks=intermediate_blocks)


def test_scan_orders():
    assert scan_order('raster', (4, 3)).tolist() == list(range(12))
    assert scan_order('snake', (4, 3)).tolist() == SNAKE
    order = scan_order('random', (4, 3)).tolist()
    assert sorted(order) == list(range(12)) and order not in (list(range(12)), SNAKE)
    # the same in every process and release: weights depend on it
    assert order == [6, 11, 4, 10, 2, 8, 1, 7, 9, 3, 0, 5]


@pytest.mark.parametrize('scan', ['raster', 'snake', 'random'])
def test_scan_round_trip(scan):
    """A patch marked at a row and column is read when the scan says, and comes back there."""
    image, order = torch.zeros(1, 3, 56, 42), scan_order(scan, (4, 3)).tolist()
    image[:, :, 28:42, 14:28] = 1       # row 2, column 1: raster index 7
    model = vit(scan=scan)
    z, grid = model.embed(image)
    assert grid == (4, 3)
    assert z[0].abs().sum(dim=1).nonzero().flatten().tolist() == [order.index(7)]
    featmap = vit(scan=scan, out_type='featmap').format_output(
        torch.cat((torch.zeros(1, 1, 32), z), dim=1), grid)
    assert featmap[0].abs().sum(dim=0).nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize('scan', ['snake', 'random'])
@pytest.mark.parametrize('options', [{}, dict(use_abs_pos_emb=True, img_size=(56, 42))])
def test_patches_keep_their_place_in_any_scan(scan, options):
    """Without a mask the order of the tokens means nothing, if their positions moved along."""
    image = torch.randn(2, 3, 56, 42)
    options = options | dict(causal=False, out_type='featmap')
    expected, = vit(**options)(image)
    torch.testing.assert_close(vit(scan=scan, **options)(image)[0], expected)
    causal = options | dict(causal=True)
    assert not torch.allclose(vit(scan=scan, **causal)(image)[0], vit(**causal)(image)[0])


def test_snake_neighbours_touch():
    """What is next is so in the order of the scan: one patch ahead is one place away."""
    gh, gw = 5, 4
    rows, columns = scan_order('snake', (gh, gw)) // gw, scan_order('snake', (gh, gw)) % gw
    assert (rows.diff().abs() + columns.diff().abs() == 1).all()


@pytest.mark.parametrize('with_cls_token', [True, False])
@pytest.mark.parametrize('shift', [0, 1, 2, 5])
def test_pairs_against_a_loop(shift, with_cls_token):
    z, h = torch.randn(2, 9, 16), torch.randn(2, 10, 16)
    cosines = []
    for image in range(2):
        for token in range(10):         # 0 is the class token, t patch t, counted from 1
            target = token + shift
            if target < 1 or target > 9 or token == 0 and not with_cls_token:
                continue
            cosines.append(F.cosine_similarity(h[image, token], z[image, target - 1], dim=0))
    head = NEPAHead(shift=shift, with_cls_token=with_cls_token)
    torch.testing.assert_close(head.loss(h, z), -torch.stack(cosines).mean())
    assert len(cosines) == 2 * (9 - shift + (shift > 0 and with_cls_token))


def test_too_few_patches_without_the_class_token():
    head = dict(shift=4, with_cls_token=False)
    with pytest.raises(ValueError, match='shift=4 needs at least 5 patches, but the image has 4'):
        nepa(head).loss(torch.randn(1, 3, 28, 28))


@pytest.mark.parametrize('shift', [1, 3])
def test_last_patches_are_no_inputs_in_any_scan(shift):
    """Leaving out what nobody sees changes no bit, in the order of the scan."""
    model = nepa(dict(shift=shift), scan='random', num_register_tokens=2)
    image = torch.randn(2, 3, 56, 42)
    z, grid = model.backbone.embed(image)
    h = model.backbone.without_registers(model.backbone.encode(z, grid)[-1])
    assert torch.equal(model.loss(image)['loss'], model.head.loss(h, z))
    assert model.forward_tokens(z, grid)[-1].shape == (2, 1 + 12 - shift, 32)


def test_registers():
    """They take part, are not rotated, and are in no loss and no read-out but 'raw'."""
    image, R = torch.randn(2, 3, 28, 42), 3
    model = vit(num_register_tokens=R)
    assert model.num_extra_tokens == 1 + R
    raw, = model(image)
    assert raw.shape == (2, 1 + R + 6, 32)
    patches = raw[:, 1 + R:]
    torch.testing.assert_close(vit(num_register_tokens=R, out_type='featmap')(image)[0],
                               patches.transpose(1, 2).unflatten(2, (2, 3)))
    torch.testing.assert_close(vit(num_register_tokens=R, out_type='avg_featmap')(image)[0],
                               patches.mean(dim=1))
    torch.testing.assert_close(vit(num_register_tokens=R, out_type='cls_token')(image)[0],
                               raw[:, 0])
    assert not torch.allclose(patches, vit()(image)[0][:, 1:])
    sin, cos = model.rope((2, 3), model.num_extra_tokens, 'cpu')
    assert not sin[:1 + R].any() and (cos[:1 + R] == 1).all() and sin[1 + R:].any()

    model, taken = nepa(num_register_tokens=R), []
    model.head.loss = lambda h, z: taken.append((h, z)) or h.sum()
    model.loss(image)
    (h, z), = taken
    tokens = model.backbone.encode(z[:, :-1], (2, 3))[-1]
    assert torch.equal(h, torch.cat((tokens[:, :1], tokens[:, 1 + R:]), dim=1))


def test_registers_elsewhere():
    """Mean features for k-NN leave them out, the count of operations does not."""
    model, image = nepa(num_register_tokens=3), torch.randn(2, 3, 28, 42)
    batch = dict(inputs=image, data_samples=[DataSample().set_gt_label(0)] * 2)
    features, _ = extract_features(model.eval(), [batch])
    expected = vit(num_register_tokens=3, out_type='avg_featmap', rope_rescale=None)
    expected.load_state_dict(model.backbone.state_dict())
    torch.testing.assert_close(features, expected(image)[0])
    assert flops_per_image(model, 28, 42) > flops_per_image(nepa(), 28, 42)


def test_without_rope_only_the_mask_tells_the_order():
    image = torch.randn(1, 3, 28, 42)
    swapped = image.clone()
    swapped[..., :14, :14], swapped[..., :14, 14:28] = image[..., :14, 14:28], image[..., :14, :14]
    for theta, causal in ((None, False), (None, True), (100., False)):
        model = vit(rope_theta=theta, causal=causal)
        same = torch.allclose(model(swapped)[0][:, -1], model(image)[0][:, -1], atol=1e-6)
        assert same == (theta is None and not causal)
        assert model.state_dict().keys() == vit().state_dict().keys()


def test_absolute_positions():
    """Learned, added to the input and not to the targets, for one size."""
    model = nepa(rope_theta=None, use_abs_pos_emb=True, img_size=28)
    image = torch.randn(2, 3, 28, 28)
    places = model.backbone.pos_embed
    assert places.shape == (1, 2, 2, 32) and places.std().item() == pytest.approx(0.02, abs=0.005)
    z, grid = model.backbone.embed(image)
    tokens = []
    model.backbone.layers[0].register_forward_pre_hook(lambda m, args: tokens.append(args[0]))
    model.backbone.encode(z, grid)
    assert torch.equal(tokens[0][:, 1:], z + places.flatten(1, 2))
    assert torch.equal(z, model.backbone.patch_embed(image)[0])
    model.loss(image)['loss'].backward()
    assert places.grad[0, 0, 0].any() and not places.grad[0, 1, 1].any()    # the last is no input
    with pytest.raises(ValueError, match='positions for 2x2 patches, but the image has 3x2; set'):
        model.backbone(torch.randn(1, 3, 42, 28))


@pytest.mark.parametrize('frozen, trained', [(-1, True), (0, True), (1, False)])
def test_frozen_stages_and_depth(frozen, trained):
    model = vit(num_register_tokens=2, use_abs_pos_emb=True, frozen_stages=frozen)
    for name in ('cls_token', 'register_tokens', 'pos_embed'):
        assert getattr(model, name).requires_grad == trained, name
        assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (0, 5)


def test_intermediate_loss():
    """The blocks' mean comes on top, without the final norm, and is logged apart."""
    model, image = nepa(intermediate_blocks=(0, -2)), torch.randn(2, 3, 28, 42)
    torch.nn.init.normal_(model.backbone.norm.weight)
    losses = model.loss(image)
    z, grid = model.backbone.embed(image)
    first, second, last = model.backbone.encode(z[:, :-1], grid, (0, 1, 2))
    expected = (model.head.loss(first, z) + model.head.loss(second, z)) / 2
    torch.testing.assert_close(losses['loss_intermediate'], expected)
    assert torch.equal(losses['loss'], model.head.loss(last, z))
    total, log = model.parse_losses(losses)
    torch.testing.assert_close(total, losses['loss'] + losses['loss_intermediate'])
    assert log['loss'] == losses['loss']
    assert nepa().loss(image).keys() == {'loss'}


@pytest.mark.parametrize('options', [
    dict(scan='snake'), dict(scan='random', num_register_tokens=2),
    dict(rope_theta=None, use_abs_pos_emb=True, img_size=28)])
def test_export(options):
    model, image = vit(**options), torch.randn(2, 3, 28, 28)
    program = torch.export.export(model, (image,), dynamic_shapes=dict(
        img={0: torch.export.Dim('batch')}))
    image = torch.randn(3, 3, 28, 28)
    torch.testing.assert_close(program.module()(image), model(image))


# The configs

def flat(node, prefix=''):
    """A nested config as dotted key -> value; lists count as values, unless of dicts."""
    if isinstance(node, (list, tuple)) and any(isinstance(item, dict) for item in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {prefix: list(node) if isinstance(node, tuple) else node}
    return {key: value for name, child in node.items()
            for key, value in flat(child, f'{prefix}.{name}' if prefix else str(name)).items()}


def parent_of(path):
    """The one file that a config inherits."""
    first = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
    base, = ast.literal_eval(first.value)
    return (path.parent / base).resolve()


@pytest.mark.parametrize('path', ALL, ids=lambda path: path.stem)
def test_differs_from_its_parent_as_documented(path):
    """Exactly in the keys that the docstring names, which --cfg-options would set as well."""
    fields = docstring_fields(path)
    changes = dict(change.split('=', 1) for change in fields['Changes'].split())
    changes = {key: DictAction._parse_iterable(value) for key, value in changes.items()}
    child, parent = (flat(load(file).to_dict()) for file in (path, parent_of(path)))
    missing = object()
    different = {key for key in child | parent
                 if child.get(key, missing) != parent.get(key, missing)}
    assert different == set(changes)
    for key, value in changes.items():
        assert child[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert set(fields) == {'Paper', 'Expected', 'Cost', 'Changes', 'Command'}
    assert fields['Command'] == f'tools/dist_train.sh {path.relative_to(REPO).as_posix()} 8'


def test_every_row_of_the_paper_has_a_config():
    found = {}
    for path in ALL:
        fields = docstring_fields(path)
        figure = fields['Expected'].split()[0]
        for part in fields['Paper'].removeprefix('arXiv 2512.16922, ').split('; '):
            if part.startswith('Table ') or part in OTHER_PAPERS:
                found.setdefault(part.split(',')[0], set()).add(figure)
            else:
                assert (part, figure) == ('beyond the paper.', 'unknown,') or part == 'none'
    assert found == PUBLISHED | OTHER_PAPERS


def test_protocol():
    """Batch 2048 with lr 3e-4 x batch / 256, and 50k or 100k steps up to half a percent."""
    for path in CONFIGS['pretrain']:
        cfg = load(path)
        assert 8 * cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts == 2048
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2.4e-3)
        steps = cfg.train_cfg.max_epochs * int(np.ceil(1_281_167 / 2048))
        assert steps == pytest.approx(50_000 if '_50k' in path.stem else 100_000, rel=0.005)
        schedule = cfg.param_scheduler
        assert schedule.end == cfg.train_cfg.max_epochs == schedule.warmup * 40


def test_fine_tuning_loads_what_was_pretrained():
    """Every checkpoint that is named has a config that writes it, with the same network."""
    for path in CONFIGS['classification']:
        cfg = load(path)
        folder, name = Path(cfg.model.backbone.init_cfg.checkpoint).parts[1:]
        source, = (REPO / 'configs' / 'pretrain').rglob(f'{folder}.py')
        source = load(source)
        assert name == f'epoch_{source.train_cfg.max_epochs}.pth'
        for key in ('arch', 'patch_size', 'qk_norm', 'layer_scale_init_value', 'gated_mlp',
                    'act_cfg', 'rope_theta', 'use_abs_pos_emb'):
            defaults = dict(rope_theta=100., use_abs_pos_emb=False, gated_mlp=False,
                            act_cfg=dict(type='GELU'))
            ours, theirs = (c.model.backbone.get(key, defaults.get(key)) for c in (cfg, source))
            assert ours == theirs, (path.stem, key)


@pytest.mark.parametrize('path', CONFIGS['pretrain'], ids=lambda path: path.stem)
def test_two_steps(path, image_folder, tmp_path):
    cfg = test_configs.shrink(copy.deepcopy(load(path)), image_folder, tmp_path / 'work')
    if cfg.model.get('intermediate_blocks'):
        cfg.model.intermediate_blocks = [0, 1]
    cfg.default_hooks.checkpoint = None
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == runner.iter and np.isfinite(losses).all()
    assert any(not torch.equal(before[k], v) for k, v in runner.model.state_dict().items())
