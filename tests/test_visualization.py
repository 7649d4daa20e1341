"""What the maps hold, where they are drawn, and what tools/analysis_tools/visualize.py accepts."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

from nepa_mm.models.nepa import NEPA, NEPAHead
from nepa_mm.models.vit import NEPAViT
from nepa_mm.visualization import pages as visualization
from nepa_mm.visualization.image_maps import (
    attention_weights,
    inspect_image,
    pca_colours,
    query_attention,
)

from .conftest import TINY, smooth_images
from .tiny_runs import load_tool, save_classifier, save_image, save_pretraining, save_segmentor

tool = load_tool('visualize')
fit_image = tool.fit_image
OPTIONS = dict(layers=[0, 1], heads=[0, 1], block=1)


def build(**kwargs):
    """A network with larger weights than at the start, so that nothing is nearly equal."""
    torch.manual_seed(0)
    backbone = NEPAViT(**dict(dict(arch=TINY, layer_scale_init_value=0.5, qk_norm='affine_bias'),
                              **kwargs)).eval()
    for p in backbone.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return backbone


def catch_calls(backbone, img):
    calls = []
    for layer in backbone.layers:
        layer.attn.register_forward_hook(lambda attn, args, out: calls.append((attn, args, out)))
    backbone(img)
    return calls


@pytest.mark.parametrize('causal', [True, False])
def test_weights_are_those_of_the_network(causal):
    """Weights times values, projected, is what the attention itself returns."""
    img = smooth_images(2, 70)[..., :42]
    for attn, args, out in catch_calls(build(causal=causal), img):
        weights = attention_weights(attn, *args)
        x = (weights @ attn.project(*args)[2]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn.proj(x), out, atol=1e-5, rtol=1e-5)
        assert bool(weights.triu(1).any()) != causal
        torch.testing.assert_close(attention_weights(attn, *args, slice(5, 6)), weights[:, :, 5:6])


def test_query_attention():
    """Layers and heads are averaged; rollout is the product of the averaged matrices."""
    calls = [(attn, *args) for attn, args, _ in catch_calls(build(), smooth_images(1, 42))]
    weights = torch.stack([attention_weights(*call)[0] for call in calls])          # L H T T
    torch.testing.assert_close(query_attention(calls, 4, [0, 1], False),
                               weights[:, :, 4].mean(dim=(0, 1)))
    torch.testing.assert_close(query_attention(calls[:1], 4, [1], False), weights[0, 1, 4])
    product = torch.eye(weights.shape[-1])
    for matrix in weights.mean(dim=1):
        product = (matrix + torch.eye(len(matrix))) / 2 @ product
    torch.testing.assert_close(query_attention(calls, 4, [0, 1], True), product[4])


@pytest.mark.parametrize('rollout', [False, True])
@pytest.mark.parametrize('causal', [True, False])
def test_attention_map(causal, rollout):
    view = inspect_image(build(causal=causal), smooth_images(1, 70)[..., :42], 7, rollout=rollout,
                         **OPTIONS)
    assert view.attention.shape == (5, 3) and view.next_cosine is None and view.target is None
    assert np.isnan(view.attention.ravel()[8:]).all() == causal
    assert not np.isnan(view.attention.ravel()[:8]).any()
    assert np.nansum(view.attention) + view.prefix_attention == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('shift', [0, 1, 2])
def test_predictions(shift):
    """Every value against its definition, on the outputs that the pretraining loss reads."""
    backbone, img = build(), smooth_images(1, 70)[..., :42]
    with torch.no_grad():
        z, grid = backbone.embed(img)
        h = backbone.encode(z, grid)[-1][0]
    view = inspect_image(backbone, img, 7, shift=shift, **OPTIONS)
    ahead, z = max(shift, 1), z[0]
    assert view.target == 7 + ahead
    cosine = F.cosine_similarity(h[8:9], z).view(5, 3)
    np.testing.assert_allclose(view.similarity, cosine, atol=1e-6)
    for patch in range(15):     # h[0] is the class token's, h[1 + t] that of patch t
        token, row = patch - ahead + 1, divmod(patch, 3)
        expected = F.cosine_similarity(h[token], z[patch], dim=0) if token >= 0 else torch.nan
        assert view.next_cosine[row] == pytest.approx(float(expected), abs=1e-6, nan_ok=True)
        copied = F.cosine_similarity(h[token], z[token - 1], dim=0) if token > 0 else torch.nan
        assert view.lift[row] == pytest.approx(float(expected - copied), abs=1e-6, nan_ok=True)


def test_mean_is_the_loss():
    backbone, img = build(), smooth_images(1, 70)
    model = NEPA(dict(type='NEPAViT', arch=TINY), dict(type='NEPAHead')).eval()
    model.backbone, model.head = backbone, NEPAHead()
    view = inspect_image(backbone, img, 24, shift=1, **OPTIONS)
    assert view.next_cosine.mean() == pytest.approx(-model.loss(img)['loss'].item(), abs=1e-5)
    assert view.target is None and view.similarity is None      # behind the last patch
    assert not any(layer.attn._forward_pre_hooks for layer in backbone.layers)


def test_pca():
    """Separated features get separated colours; the sign does not depend on the solver's."""
    torch.manual_seed(0)
    features = torch.randn(50, 1) * torch.tensor([[3., -4., 0., 0., 0.]]) + 7
    colours, share = pca_colours(features + 1e-3 * torch.randn(50, 5))
    order = colours[:, 0].argsort()
    assert share > 0.999 and colours.shape == (50, 3) and colours.min() == 0 and colours.max() == 1
    assert (features[order, 1].diff() >= -1e-2).all()
    assert pca_colours(torch.ones(6, 5))[0].isfinite().all()


@pytest.mark.parametrize('size, short, expected', [
    ((640, 427), 224, (336, 224)), ((427, 640), 224, (224, 336)), ((8, 8), 30, (28, 28)),
    ((1000, 100), 28, (280, 28))])
def test_fit_image(size, short, expected):
    """Whole patches; a circle stays a circle."""
    image = np.zeros((*size[::-1], 3), np.uint8)
    assert fit_image(image, short, (14, 14)).shape == (*expected[::-1], 3)


def test_aspect_is_kept():
    y, x = np.mgrid[:100, :145]
    disc = (((x - 72) ** 2 + (y - 50) ** 2 < 900) * 255).astype(np.uint8)
    seen = np.array(fit_image(disc, 42, (14, 14))) > 127        # 145 would fit 60.9 pixels
    assert seen.shape == (42, 56)
    assert abs(seen.any(axis=0).sum() - seen.any(axis=1).sum()) <= 1


def test_too_small():
    with pytest.raises(ValueError, match='at least two patches, 28 pixels, got 20'):
        fit_image(np.zeros((50, 50, 3), np.uint8), 20, (14, 14))


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """The figures that are written; they stay open until the end of the test."""
    written, save = [], visualization.save
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visualization, 'save',
                        lambda figure, path: (written.append(figure), save(figure, path)))
    yield written
    plt.close('all')


@pytest.fixture
def pretrained(figures):
    config = save_pretraining()
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), 'pretrained.pth')
    save_image(Path('photo.jpg'), (90, 60))
    return [config, 'pretrained.pth', 'photo.jpg']


def boxes(axis):
    """(x, y, width, height, colour) of the marks."""
    return [(*patch.get_xy(), patch.get_width(), patch.get_height(), plt.matplotlib.colors.to_hex(
        patch.get_edgecolor())) for patch in axis.patches if patch.get_edgecolor()[:3] != (0, 0, 0)]


def test_page(pretrained, figures):
    """Maps lie on the pixels of the image, marks on their patches, colour bars beside them."""
    tool.main([*pretrained, '--query', '1', '3', '--size', '56'])
    assert Image.open('visualization/photo.png').width > 1000
    assert figures[0].get_suptitle() == 'photo.jpg\npretrained.pth (raw weights)'
    panels = [axis for axis in figures[0].axes if axis.images]
    assert [bool(axis.child_axes) for axis in panels] == [False, True, False, True, True, True]
    query, target = (42, 14, 14, 14, '#ff2d2d'), (56, 14, 14, 14, '#00b7ff')
    for axis, marks in zip(panels, ([target, query], [query], [query], [target, query], [query],
                                    [query])):
        assert axis.images[0].get_extent() == [0, 84, 56, 0]
        assert axis.get_aspect() == 1 and boxes(axis) == marks
    assert 'layers 0, 1 of 3, all heads' in panels[1].get_title().replace('\n', ' ')
    attention = panels[1].images[0].get_array()
    assert attention.shape == (4, 6) and (attention.mask == (np.arange(24) > 9).reshape(4, 6)).all()


def test_rollout_is_another_map(pretrained, figures):
    for flags in ([], ['--rollout'], ['--rollout']):
        tool.main([*pretrained, '--query', '1', '1', *flags])
    mean, *rollouts = ([axis for axis in figure.axes if axis.images][1].images[0].get_array()
                       for figure in figures)
    assert np.ma.allequal(*rollouts) and not np.ma.allclose(mean, rollouts[0])


def test_query_that_predicts_nothing(pretrained, figures):
    tool.main([*pretrained, '--query', '1', '2', '--grid'])
    for figure in figures:
        panel = [axis for axis in figure.axes if axis.images][3]
        assert panel.texts[0].get_text() == 'predicts nothing' and len(boxes(panel)) == 1
        assert not panel.child_axes and panel.images[0].colorbar is None


def test_what_the_model_saw(pretrained):
    """Values and order of the channels as from the config's data_preprocessor."""
    cfg = Config.fromfile(pretrained[0])
    image = tool.load_image('photo.jpg', cfg, 28, (14, 14))
    for to_rgb in (True, False):
        cfg.model.data_preprocessor.update(mean=[1., 2., 3.], std=[4., 5., 6.], to_rgb=to_rgb)
        loaded = torch.tensor(image).permute(2, 0, 1)
        expected = MODELS.build(cfg.model.data_preprocessor)(
            dict(inputs=loaded[None], data_samples=[]))
        torch.testing.assert_close(tool.normalise(image, cfg, 'cpu'), expected['inputs'])


@pytest.mark.parametrize('save, scope', [(save_classifier, None), (save_segmentor, 'mmseg')])
def test_networks_that_do_not_predict(save, scope, figures):
    if scope:
        pytest.importorskip(scope)
    config, checkpoint = save()
    image = str(next(Path('data').rglob('0.jpg')))
    tool.main([config, checkpoint, image, '--size', '42', '--rollout', '--heads', '1'])
    assert len([axis for axis in figures[0].axes if axis.images]) == 3
    assert 'No prediction' in figures[0].legends[0].get_title().get_text().replace('\n', ' ')


def test_sheets_and_names(pretrained, figures):
    """No image overwrites another's page, another image, or the sheet; one scale per column."""
    Path('photo.png').write_bytes(Path('photo.jpg').read_bytes())
    Path('grid.png').write_bytes(Path('photo.jpg').read_bytes())
    save_image(Path('other/photo.jpg'), (60, 90))
    inputs = ['photo.jpg', 'other/photo.jpg', 'photo.png', 'grid.png']
    before = [Path(path).read_bytes() for path in inputs]
    tool.main([*pretrained[:2], *inputs, '--grid', '--out-dir', '.'])
    assert sorted(path.name for path in Path().glob('*.png')) == [
        'grid.png', 'grid_2.png', 'grid_3.png', 'other_photo.png', 'photo.png', 'photo_2.png',
        'photo_3.png']
    assert [Path(path).read_bytes() for path in inputs] == before
    attention = [axis for axis in figures[4].axes if axis.images][1::6]
    assert len({axis.images[0].norm.vmax for axis in attention}) == 1
    assert [axis.get_ylabel() for axis in figures[4].axes if axis.get_ylabel()] == [
        'photo.jpg', 'other/photo.jpg', 'photo.png', 'grid.png']


def test_training_size(pretrained):
    cfg = Config.fromfile(pretrained[0])
    assert tool.training_size(cfg) == 28
    cfg.train_dataloader.dataset.pipeline.append(dict(type='RandomCrop', crop_size=(512, 640)))
    assert tool.training_size(cfg) == 512
    assert tool.training_size(Config()) == 224


def test_random_queries():
    """The same for the same seed, and never one that predicts nothing."""
    chosen = [tool.choose_query(None, '', (2, 2), 1, np.random.default_rng(s)) for s in range(50)]
    assert set(chosen) == {0, 1, 2}
    assert chosen[3] == tool.choose_query(None, '', (2, 2), 1, np.random.default_rng(3))


def test_weights(pretrained, figures):
    checkpoint = torch.load('pretrained.pth')
    raw = {f'module.{key}': value for key, value in checkpoint['state_dict'].items()}
    torch.save(dict(checkpoint, ema_state_dict=raw), 'both.pth')
    for flags, name in (([], 'ema'), (['--weights', 'raw'], 'raw')):
        tool.main([pretrained[0], 'both.pth', 'photo.jpg', *flags])
        assert figures[-1].get_suptitle().endswith(f'both.pth ({name} weights)')


def test_refusals(pretrained, capsys):
    def refuse(*args):
        with pytest.raises(SystemExit) as exit_info:
            tool.main(list(args))
        assert exit_info.value.code == 2 and not Path('visualization').exists()
        error = capsys.readouterr().err.strip().split('\n')
        assert len([line for line in error if line.startswith('error: ')]) == 1
        return error[-1]

    config, checkpoint, image = pretrained
    assert 'no image nowhere.jpg' in refuse(*pretrained, 'nowhere.jpg')
    assert 'rows 0 to 1 and columns 0 to 2' in refuse(*pretrained, '--query', '2', '0')
    assert 'rows 0 to 1' in refuse(*pretrained, '--query', '0', '-1')
    assert '--layers must be from -3 to 2, got 3' in refuse(*pretrained, '--layers', '0', '3')
    assert '--heads must be from 0 to 1, got -1' in refuse(*pretrained, '--heads', '-1')
    assert 'at least two patches' in refuse(*pretrained, '--size', '14')
    assert "The checkpoint 'x.pth', given as" in refuse(config, 'x.pth', image)
    Path('torn.jpg').write_bytes(Path(image).read_bytes()[:300])
    assert 'The image torn.jpg cannot be read' in refuse(config, checkpoint, image, 'torn.jpg')
    cfg = Config.fromfile(config)
    cfg.model.backbone.arch.num_layers += 1
    cfg.dump('deeper.py')
    assert 'another network: it lacks layers.3' in refuse('deeper.py', checkpoint, image)
    cfg.model.backbone.scan = 'snake'
    cfg.dump('snake.py')
    assert "scan order 'snake'" in refuse('snake.py', checkpoint, image)
    cfg.model.backbone = dict(type='ResNet', depth=18)
    cfg.dump('resnet.py')
    assert 'must be a NEPAViT, got ResNet' in refuse('resnet.py', *pretrained[1:])
