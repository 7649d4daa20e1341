"""One reader of images: networks in every tool see the same pixels of a file, and people, too."""
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from nepa_mm.models.layers import PatchEmbed
from nepa_mm.utils.errors import DataError

from .conftest import REPO
from .tiny_runs import load_tool, run_test, run_train, save_classifier, save_segmentor

predict, visualize, knn = (load_tool(name).main for name in ('predict', 'visualize', 'knn'))
RNG = np.random.default_rng(7)
WORDS = RNG.integers(0, 2 ** 16, (28, 28), dtype=np.uint16)
HIGH = np.dstack([WORDS >> 8] * 3).astype(np.uint8)
RGB = RNG.integers(0, 256, (28, 28, 3), dtype=np.uint8)
GREY = np.dstack([RGB[..., 0]] * 3)
TURNED = Image.Exif()
TURNED[0x0112] = 6


def encoded(image, form, **options):
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def pgm16():
    return b'P5 28 28 65535\n' + WORDS.astype('>u2').tobytes()


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


PALETTE = Image.fromarray(RGB).quantize(200)
BIG_ENDIAN = Image.frombytes('I;16B', (28, 28), WORDS.astype('>u2').tobytes())
ALPHA = np.dstack([RGB, RGB[::-1, :, :1]])
COLOURS = np.asarray(PALETTE.convert('RGB'))
CMYK = encoded(Image.fromarray(RGB).convert('CMYK'), 'JPEG')
# kind: (suffix, content of the file, RGB)
KINDS = {
    '16-bit png': ('.png', encoded(Image.fromarray(WORDS), 'PNG'), HIGH),
    '16-bit tiff': ('.tif', encoded(Image.fromarray(WORDS), 'TIFF'), HIGH),
    '16-bit big-endian': ('.tif', encoded(BIG_ENDIAN, 'TIFF'), HIGH),
    '16-bit turned': ('.png', encoded(Image.fromarray(WORDS), 'PNG', exif=TURNED),
                      np.rot90(HIGH, -1)),
    '16-bit pgm': ('.pgm', pgm16(), HIGH),
    '32-bit tiff': ('.tif', encoded(Image.fromarray(GREY[..., 0].astype(np.int32)), 'TIFF'), GREY),
    'float tiff': ('.tif', encoded(Image.fromarray(GREY[..., 0] * np.float32(0.5)), 'TIFF'),
                   np.rint(GREY * 0.5).astype(np.uint8)),
    'grey alpha': ('.png', encoded(Image.fromarray(ALPHA[..., [0, 3]], 'LA'), 'PNG'), GREY),
    'rgba tiff': ('.tif', encoded(Image.fromarray(ALPHA), 'TIFF'), RGB),
    'palette alpha': ('.tif', encoded(PALETTE.convert('PA'), 'TIFF'), COLOURS),
    'palette': ('.png', encoded(PALETTE, 'PNG', transparency=3), COLOURS),
    'cmyk': ('.jpg', CMYK, np.asarray(Image.open(io.BytesIO(CMYK)).convert('RGB'))),
    '1-bit': ('.png', encoded(Image.fromarray(RGB[..., 0] > 99), 'PNG'),
              np.uint8(255) * (GREY > 99)),
    'turned': ('.png', encoded(Image.fromarray(RGB), 'PNG', exif=TURNED), np.rot90(RGB, -1)),
    'turned webp': ('.webp', encoded(Image.fromarray(RGB), 'WEBP', lossless=True, exif=TURNED),
                    np.rot90(RGB, -1)),
    'array': ('.npy', npy(RGB), RGB), 'grey array': ('.npy', npy(RGB[..., 0]), GREY),
}

SOME = ['16-bit turned', 'float tiff', 'rgba tiff', 'palette alpha', 'cmyk', 'array']


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def seen():
    """What networks were given, as RGB of 8 bits: (B, height, width, 3)."""
    batches = []

    def record(module, args):
        if isinstance(module, PatchEmbed):
            batches.append((args[0] * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    handle = register_module_forward_pre_hook(record)
    yield batches
    handle.remove()


@pytest.fixture
def shown(monkeypatch):
    """The first picture of each figure."""
    pictures = []
    monkeypatch.setattr(plt, 'close', lambda figure: pictures.append(
        np.asarray(next(axis for axis in figure.axes if axis.images).images[0].get_array())))
    yield pictures
    monkeypatch.undo()
    plt.close('all')


def write(kind, folder):
    suffix, content, expected = KINDS[kind]
    path = Path(folder) / f'image{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path, expected


def loaders(config):
    """The steps by which a config of ours loads files, in each of its pipelines."""
    cfg = Config.fromfile(REPO / 'configs' / config)
    init_default_scope(cfg.default_scope)
    found = [cfg[name].dataset.pipeline[0] for name in (
        'train_dataloader', 'val_dataloader', 'test_dataloader') if name in cfg]
    return found + [cfg[name][0] for name in ('tta_pipeline', 'test_pipeline') if name in cfg]


@pytest.mark.parametrize('config', [
    'pretrain/nepa_vit-b.py', 'classification/nepa_vit-b_ft_in1k.py',
    'classification/nepa_vit-b_linear_in1k.py',
    'segmentation/nepa_vit-b_upernet_160k_ade20k-512x512.py',
    'segmentation/nepa_vit-l_upernet_160k_ade20k-512x512_ms-flip.py', 'demo/digits_upernet.py'])
def test_pipelines_of_the_configs(config):
    for step in loaders(config):
        if step.type == 'LoadRandomResizedCrop':    # the whole image is one possible crop
            step.update(scale=28, crop_ratio_range=(1., 1.), aspect_ratio_range=(1., 1.))
        load = TRANSFORMS.build(step)
        for kind in KINDS:
            path, expected = write(kind, 'data')
            results = load(dict(img_path=str(path)))
            if step.type == 'LoadRandomResizedCrop' and kind == 'cmyk':     # rounds differently
                assert abs(results['img'][..., ::-1].astype(int) - expected).max() <= 2
            else:
                assert np.array_equal(results['img'], expected[..., ::-1]), (step, kind)
            assert results['img_shape'][:2] == (28, 28)


@pytest.mark.parametrize('kind', SOME)
def test_classifier(kind, seen, shown):
    """Training, testing, k-NN, predict and visualize."""
    config, checkpoint = save_classifier()
    for old in Path('data').rglob('*.jpg'):
        old.unlink()
    for name in 'abcde':
        path, expected = write(kind, f'data/val/{name}')
    cfg = Config.fromfile(config)
    cfg.model.data_preprocessor.to_rgb = True
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].dataset.pipeline[0] = dict(type='LoadImageWithPillow')
        cfg[name].dataset.extensions = [path.suffix]
    cfg.dump(config)
    run_train([config, '--work-dir', 'work'])
    run_test([config, checkpoint])
    knn([config, checkpoint, '-k', '1'])
    predict([str(path), '--model', config, '--checkpoint', checkpoint])
    visualize([config, checkpoint, str(path), '--size', '28'])
    images = np.concatenate(seen)
    assert len(images) == 5 + 5 + 5 + 10 + 1 + 1
    assert all(np.array_equal(image, expected) for image in images)
    assert len(shown) == 2 and all(np.array_equal(image, expected) for image in shown)


@pytest.mark.parametrize('kind', SOME)
def test_segmentor(kind, seen):
    """predict, and mmseg's own inferencer; predict's picture is the image with a class over it."""
    from mmseg.apis import MMSegInferencer
    config, checkpoint = save_segmentor()
    path, expected = write(kind, 'mine')
    cfg = Config.fromfile(config)
    cfg.test_dataloader.dataset.pipeline[0] = dict(type='LoadImageFromFile', _scope_='nepa_mm')
    cfg.model.data_preprocessor.bgr_to_rgb = True
    cfg.dump(config)
    predict([str(path), '--model', config, '--checkpoint', checkpoint])
    MMSegInferencer(config, checkpoint, device='cpu')(str(path))
    assert len(seen) == 2 and all(np.array_equal(image[0], expected) for image in seen)
    cover = np.asarray(Image.open('predictions/image.png')) - 0.2 * expected    # opacity 0.8
    colour = np.median(cover, axis=(0, 1))
    assert (abs(cover - colour).max(axis=2) < 2).mean() > 0.6       # all but the name of the class


def test_resized(monkeypatch):
    """A smaller copy has the pixels that training reads, made smaller."""
    kinds = [kind for kind in KINDS if 'array' not in kind]
    for kind in kinds:
        write(kind, f'data/{kind}')
    tool = load_tool('resize_imagenet')
    monkeypatch.setitem(sys.modules, tool.__name__, tool)   # for the processes of the pool
    assert tool.main(['data', 'small', '--short-side', '14', '--workers', '1']) == []
    load = TRANSFORMS.build(dict(type='LoadImageWithPillow'))
    for kind in kinds:
        suffix, _, expected = KINDS[kind]
        found = load(dict(img_path=f'small/{kind}/image{suffix}'))['img'][..., ::-1].astype(int)
        wanted = Image.fromarray(expected).resize((14, 14), Image.Resampling.BICUBIC)
        tolerance = 24 if suffix in ('.jpg', '.webp') else 0        # of what compression costs
        assert abs(found - np.asarray(wanted)).mean() <= tolerance, kind


@pytest.mark.parametrize('array, sentence', [
    (RNG.random((28, 28)).astype(np.float32), 'float32 values from 0'),
    (RNG.random((28, 28)).astype(np.float32) * 4000, '.* needs 0 to 255; rescale them, or set'),
    (WORDS.astype(np.int32), 'int32 values from')])
def test_values_of_unknown_range(array, sentence):
    Image.fromarray(array).save('image.tif')
    load = TRANSFORMS.build(dict(type='LoadImageWithPillow'))
    with pytest.raises(DataError, match='^image.tif has ' + sentence):
        load(dict(img_path='image.tif'))
    load = TRANSFORMS.build(dict(type='LoadImageWithPillow', color_type='unchanged'))
    np.testing.assert_array_equal(load(dict(img_path='image.tif'))['img'], array)


@pytest.mark.parametrize('content', [
    npy(RGB)[:-9], npy(RGB[0, 0]), npy(np.array([None])), npy(RGB * 1j), b'\x93NUMPY'])
def test_broken_arrays(content):
    Path('image.npy').write_bytes(content)
    with pytest.raises(DataError, match='^The image image.npy cannot be read: [^\n]*\\.$'):
        TRANSFORMS.build(dict(type='LoadImageWithPillow'))(dict(img_path='image.npy'))


@pytest.mark.parametrize('array', [
    RNG.integers(0, 256, (9, 8, 13), dtype=np.uint8), RGB, RGB[..., :1], WORDS,
    RNG.normal(size=(9, 8, 6))], ids=['13', 'rgb', 'grey', '16-bit', 'float64'])
def test_unchanged_arrays(array):
    np.save('image.npy', array)
    img = TRANSFORMS.build(dict(type='LoadImageWithPillow', color_type='unchanged'))(
        dict(img_path='image.npy'))['img']
    expected = array[..., ::-1] if array.shape[2:] == (3,) else array
    expected = expected[..., 0] if array.shape[2:] == (1,) else expected
    assert img.dtype == (np.uint8 if array.dtype == np.uint8 else np.float32)
    np.testing.assert_array_equal(img, expected.astype(img.dtype))


def test_unchanged_files():
    load = TRANSFORMS.build(dict(type='LoadImageWithPillow', color_type='unchanged'))
    wanted = {'16-bit tiff': WORDS, '16-bit pgm': WORDS, '1-bit': KINDS['1-bit'][2][..., 0],
              'rgba tiff': ALPHA, 'grey alpha': ALPHA[..., [0, 3]],
              'turned': np.rot90(RGB, -1)[..., ::-1]}
    for kind, expected in wanted.items():
        img = load(dict(img_path=str(write(kind, 'data')[0])))['img']
        np.testing.assert_array_equal(img, expected, err_msg=kind)
    pages = [Image.fromarray(channel) for channel in RNG.integers(0, 256, (5, 9, 8), np.uint8)]
    pages[0].save('bands.tif', save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(load(dict(img_path='bands.tif'))['img'], np.dstack(pages))


@pytest.mark.parametrize('form', ['grey', 'colour'])
def test_grayscale(form):
    image = Image.fromarray(WORDS if form == 'grey' else RGB)
    image.save('image.png')
    img = TRANSFORMS.build(dict(type='LoadImageWithPillow', color_type='grayscale'))(
        dict(img_path='image.png'))['img']
    np.testing.assert_array_equal(
        img, HIGH[..., 0] if form == 'grey' else np.asarray(image.convert('L')))


def test_bad_color_type():
    for kind in ('LoadImageWithPillow', 'LoadRandomResizedCrop'):
        with pytest.raises(ValueError, match="one of .'color', 'grayscale', 'unchanged'., got 'l'"):
            TRANSFORMS.build(dict(type=kind, color_type='l', **dict(scale=8) if 'Crop' in kind
                                  else {}))


def test_grey_data_sets_in_colour():
    """An image that is there already is converted, as an inferencer's."""
    load = TRANSFORMS.build(dict(type='LoadImageWithPillow'))
    np.testing.assert_array_equal(load(dict(img=RGB[..., 0]))['img'], GREY)
    np.testing.assert_array_equal(load(dict(img=RGB))['img'], RGB)


@pytest.mark.parametrize('kind', SOME[:-1])
def test_pictures_of_a_test(kind):
    """Every image, though two have one name; in its colours, and as the network saw it."""
    config, weights = save_classifier()
    for path in list(Path('data/val').rglob('*.jpg')):
        path.unlink()
    for folder in 'abcde':
        _, expected = write(kind, f'data/val/{folder}')
    run_test([config, weights, '--show-dir', 'shown', '--cfg-options',
              'default_hooks.visualization.draw_gt=False',
              'default_hooks.visualization.draw_pred=False'])
    pictures = sorted(Path('shown').glob('*.png'))
    assert [picture.stem for picture in pictures] == [
        *(f'{folder}_image' for folder in 'bcde'), 'image']
    for picture in pictures:
        assert np.array_equal(np.asarray(Image.open(picture).convert('RGB')), expected)


@pytest.mark.parametrize('save', [save_classifier, save_segmentor])
def test_predicted_pictures_are_as_many(save):
    """Of one name, and of one pixel; an image that is no image is left out."""
    config, weights = save()
    cfg = Config.fromfile(config)
    if save is save_segmentor:
        cfg.model.decode_head.norm_cfg.type = 'BN'
    cfg.dump(config)
    images = ['a/x.png', 'b/x.png', 'a/x.tif']
    for path in images:
        Path(path).parent.mkdir(exist_ok=True)
        Image.fromarray(RGB[:1, :1] if path == 'b/x.png' else RGB).save(path)
    flags = ['--model', config, '--checkpoint', weights]
    predict([*images, *flags])
    assert sorted(path.name for path in Path('predictions').glob('*.png')) == [
        'a_x.png', 'b_x.png', 'x.png']
    Path('torn.png').write_bytes(b'text')
    with pytest.raises(SystemExit, match='1'):
        predict([images[0], 'torn.png', *images[1:], *flags, '--out-dir', 'rest'])
    assert sorted(path.name for path in Path('rest').glob('*.png')) == [
        'a_x.png', 'b_x.png', 'x.png']
