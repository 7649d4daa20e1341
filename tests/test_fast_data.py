"""Fast reading of JPEGs against Pillow's, and the tool that makes ImageNet smaller."""
import os
import sys

import numpy as np
import pytest
from mmengine.dataset import Compose
from PIL import Image

from nepa_mm.datasets import images as reading
from nepa_mm.datasets.resize import resize_image
from nepa_mm.datasets.transforms import crops

from .tiny_runs import load_tool, run_script

tool = load_tool('resize_imagenet')
resize = tool.main
CROP = dict(scale=64, crop_ratio_range=(0.08, 1.))
REST = [dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]


def photo(size, seed=0):
    """Structures of all sizes: a resize without antialiasing would show."""
    rng = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, 3)
    noise = rng.normal(0, 25, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def draw(path, interpolation, fast, num=12):
    """Crops of one file by either pipeline, from the same random draws."""
    first = [dict(type='LoadRandomResizedCrop', interpolation=interpolation, **CROP)] if fast else [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', interpolation=interpolation, backend='pillow', **CROP)]
    pipeline = Compose([*first, *REST])
    np.random.seed(0)
    samples = [pipeline(dict(img_path=str(path))) for _ in range(num)]
    assert all(s['data_samples'].img_shape[:2] == (64, 64) for s in samples)
    return np.stack([s['inputs'].numpy() for s in samples]).astype(int)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('kind', ['RGB', 'L', 'CMYK', 'turned', 'wide', 'png'])
def test_pixels_differ_from_pillows_by_rounding(tmp_path, kind, interpolation):
    image, options = photo((1200, 90) if kind == 'wide' else (251, 187)), dict(quality=90)
    if kind in ('L', 'CMYK'):
        image = image.convert(kind)
    if kind == 'turned':
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = 6     # the camera was turned by 90 degrees
    path = tmp_path / 'image.JPEG'      # ImageNet has a PNG of that name
    image.save(path, 'PNG' if kind == 'png' else 'JPEG', **options)
    difference = abs(draw(path, interpolation, True) - draw(path, interpolation, False))
    # Pillow rounds between the two directions, and a bicubic kernel enlarges what it lost; from
    # CMYK the decoders convert with another rounding
    assert difference.max() <= (2 if interpolation == 'bilinear' else 4)
    assert difference.mean() < (1.01 if kind == 'CMYK' else 0.05)
    if kind == 'png':
        assert difference.max() == 0


def test_fast_crops_are_antialiased(tmp_path):
    """What the bound above is worth: without antialiasing it is exceeded many times."""
    photo((1000, 750)).save(tmp_path / 'image.jpg', quality=90)
    pillow, fast = (draw(tmp_path / 'image.jpg', 'bilinear', fast) for fast in (False, True))
    aliased = Compose([dict(type='LoadImageFromFile'),
                       dict(type='RandomResizedCrop', backend='cv2', **CROP), *REST])
    np.random.seed(0)
    aliased = np.stack([aliased(dict(img_path=str(tmp_path / 'image.jpg')))['inputs'].numpy()
                        for _ in range(12)]).astype(int)
    assert abs(aliased - pillow).mean() > 5 > 100 * abs(fast - pillow).mean()


@pytest.mark.parametrize('options', [
    {}, dict(progressive=True), dict(exif=b'Exif\0\0' + 500 * b'e'),
    dict(icc_profile=70_000 * b'p')])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_size_of_a_jpeg(tmp_path, mode, options):
    photo((37, 21)).convert(mode).save(tmp_path / 'image.jpg', **options)
    content = (tmp_path / 'image.jpg').read_bytes()
    assert reading.jpeg_size(content) == (21, 37)
    frame = content.index(b'\0\x15\0\x25')
    assert not any(reading.jpeg_size(content[:end]) for end in (0, 2, 3, 20, frame + 3))
    photo((37, 21)).save(tmp_path / 'image.png')
    assert reading.jpeg_size((tmp_path / 'image.png').read_bytes()) is None


def test_pillow_sees_no_plain_jpeg(tmp_path, monkeypatch):
    """Its decoder would be correct, and slow without a word."""
    decoded, decode_image = [], crops.decode_image
    monkeypatch.setattr(crops, 'decode_image',
                        lambda *args: decoded.append(name) or decode_image(*args))
    for mode, name in (('RGB', 'rgb.jpg'), ('L', 'grey.jpg'), ('RGB', 'rgb.png')):
        photo((100, 75)).convert(mode).save(tmp_path / name)
        draw(tmp_path / name, 'bilinear', True, num=1)
    assert decoded == ['rgb.png']


def test_bad_interpolation():
    with pytest.raises(ValueError, match="interpolation must be 'bilinear' or 'bicubic', got 'l"):
        crops.LoadRandomResizedCrop(64, interpolation='lanczos')


# The tool

@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Two classes, one image of each kind that matters; a text file."""
    monkeypatch.setitem(sys.modules, tool.__name__, tool)   # for the processes of the pool
    root = tmp_path / 'imagenet'
    for folder in ('train/n01', 'train/n02', 'val/n01'):
        (root / folder).mkdir(parents=True)
    photo((100, 75)).save(root / 'train/n01/wide.JPEG', quality=90)
    photo((75, 100)).convert('CMYK').save(root / 'train/n01/cmyk.JPEG')
    photo((90, 60)).save(root / 'train/n02/is_a_png.JPEG', 'PNG')
    photo((30, 20)).save(root / 'train/n02/small.JPEG')
    turned = Image.Exif()
    turned[0x0112] = 6
    photo((100, 80)).save(root / 'val/n01/turned.JPEG', exif=turned)
    content = (root / 'train/n01/wide.JPEG').read_bytes()
    (root / 'val/n01/cut.JPEG').write_bytes(content[:len(content) // 2])
    (root / 'val/n01/text.JPEG').write_text('no image')
    (root / 'notes.txt').write_text('not copied')
    return root


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob('*') if path.is_file())


def test_resize(imagenet, tmp_path, capsys):
    target = tmp_path / 'small'
    unreadable = resize([str(imagenet), str(target), '--short-side', '50', '--workers', '2'])
    assert [line.split(':')[0] for line in unreadable] == ['val/n01/cut.JPEG', 'val/n01/text.JPEG']
    assert (target / 'unreadable.txt').read_text().splitlines() == unreadable
    sizes = {name: Image.open(target / name).size for name in files(target) if 'JPEG' in name}
    assert sizes == {'train/n01/cmyk.JPEG': (50, 67), 'train/n01/wide.JPEG': (67, 50),
                     'train/n02/is_a_png.JPEG': (75, 50), 'train/n02/small.JPEG': (30, 20),
                     'val/n01/turned.JPEG': (50, 62)}
    assert files(target) == sorted([*sizes, 'resize.json', 'unreadable.txt'])   # nothing else
    modes = {name: (Image.open(target / name).format, Image.open(target / name).mode)
             for name in sizes}
    assert modes.pop('train/n02/is_a_png.JPEG') == ('PNG', 'RGB')
    assert set(modes.values()) == {('JPEG', 'RGB')}
    assert not Image.open(target / 'val/n01/turned.JPEG').getexif().get(0x0112)
    assert ((target / 'train/n02/small.JPEG').read_bytes()
            == (imagenet / 'train/n02/small.JPEG').read_bytes())
    expected = Image.open(imagenet / 'train/n01/wide.JPEG').resize((67, 50), 3)
    small, expected = (np.asarray(image.convert('L'), dtype=int) for image in (
        Image.open(target / 'train/n01/wide.JPEG'), expected))
    assert abs(small - expected).mean() < 2     # what a JPEG of quality 95 costs in brightness
    assert '5 images in' in capsys.readouterr().out


def test_quality_of_resized_jpegs(imagenet, tmp_path):
    sizes = []
    for quality in (95, 30):
        args = tool.parse_args([str(imagenet), str(tmp_path / f'{quality}'), '--short-side', '50',
                                '--quality', f'{quality}'])
        assert tool.resize_one('train/n01/wide.JPEG', args) is None
        sizes.append((args.target / 'train/n01/wide.JPEG').stat().st_size)
    assert sizes[1] < 0.5 * sizes[0]


def test_resize_goes_on(imagenet, tmp_path, monkeypatch, capsys):
    """A stopped run left an image, and half of one; only what is missing is made."""
    target = tmp_path / 'small'
    args = [str(imagenet), str(target), '--short-side', '50', '--workers', '1']
    resize(args)
    before = {name: os.stat(target / name).st_mtime_ns for name in files(target)}
    (target / 'train/n01/wide.JPEG').unlink()
    (target / 'train/n01/.wide.JPEG.part').write_bytes(b'half')
    capsys.readouterr()
    resize(args)
    assert '7 images, 4 of them already resized' in capsys.readouterr().out
    after = {name: os.stat(target / name).st_mtime_ns for name in files(target)}
    assert set(before) == set(after)
    assert [name for name in before if 'JPEG' in name and before[name] != after[name]] == [
        'train/n01/wide.JPEG']


def test_nothing_half_written(imagenet, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(KeyboardInterrupt):
        resize_image(imagenet / 'train/n01/wide.JPEG', tmp_path / 'out.JPEG', 50)
    assert not (tmp_path / 'out.JPEG').exists()


@pytest.mark.parametrize('args, sentence', [
    (['nothing', 'small'], 'error: There is no folder nothing.'),
    (['imagenet', 'imagenet/small'], 'error: imagenet/small is inside imagenet; give a target'),
    (['empty', 'small'], 'error: empty holds no image.'),
    (['imagenet', 'small', '--quality', '100'], 'error: --short-side and --workers must be'),
    (['imagenet', 'other'], 'error: other holds images made with {"short_side": 320')])
def test_bad_input(imagenet, tmp_path, monkeypatch, capsys, args, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/resize.json').write_text('{"short_side": 320, "quality": 95}')
    with pytest.raises(SystemExit) as stop:
        resize(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(sentence) and error.count('\n') == 1


def test_as_a_command(imagenet, tmp_path):
    code, output = run_script('resize_imagenet.py', 'imagenet', 'small', '--workers', 2,
                              cwd=tmp_path)
    assert code == 0 and (tmp_path / 'small/train/n01/wide.JPEG').is_file(), output
