"""JPEGs that travel encoded: the crops of LoadRandomResizedCrop, decoded by the preprocessor."""
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS, MODELS, TRANSFORMS
from PIL import Image
from torchvision.io import decode_jpeg

from nepa_mm.datasets.transforms import gpu_decode as encoded
from nepa_mm.utils.errors import UnreadableImageError
from nepa_mm.utils.random_state import fixed_seed

from .conftest import REPO
from .faults.files import mutate
from .test_unreadable import ODD, save_text, save_truncated
from .tiny_runs import NORMALIZE, options, refused, run_train, save_image, save_pretraining

CROP = dict(scale=28, interpolation='bicubic')
PIXELS = [dict(type='LoadRandomResizedCrop', **CROP), dict(type='RandomFlip', prob=0.5),
          dict(type='PackInputs')]
BYTES = [dict(type='PackEncodedCrop', **CROP)]
collate = encoded.encoded_collate


def save_adobe_rgb(path):
    """Stored without a conversion to YCbCr, of which not every decoder takes notice."""
    ODD['rgb'](path)
    content = path.read_bytes()
    marker = b'\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00'
    path.write_bytes(content[:2] + marker + content[2:])


KINDS = dict(ODD, adobe_rgb=save_adobe_rgb)
PLAIN = ('rgb', 'progressive', 'grey')


@pytest.fixture
def files(tmp_path):
    """A file of each kind."""
    for kind, save in KINDS.items():
        save(tmp_path / f'{kind}.JPEG')
    return sorted(tmp_path.iterdir())


def samples(files, steps, seed):
    pipeline = Compose(steps)
    with fixed_seed(seed):
        return [pipeline(dict(img_path=str(path), gt_label=3)) for path in files]


@pytest.mark.parametrize('seed', range(4))
def test_the_same_crops(files, seed):
    """Pixel by pixel, normalised by the same preprocessor, and the same metainfo."""
    preprocess = MODELS.build(dict(type='NEPADataPreprocessor', to_rgb=True, **NORMALIZE))
    theirs, ours = (samples(files, steps, seed) for steps in (PIXELS, BYTES))
    for path, sample in zip(files, ours):
        assert isinstance(sample['inputs'], bytes) == (path.stem in PLAIN), path.stem
    pixels, batch = default_collate(theirs), collate(ours)
    assert encoded.batch_shape(batch) == encoded.batch_shape(pixels) == (len(files), 28, 28)
    expected, result = preprocess(pixels), preprocess(batch)
    assert torch.equal(result['inputs'], expected['inputs'])
    for one, two in zip(result['data_samples'], expected['data_samples']):
        assert one.gt_label == two.gt_label and one.flip == two.flip
        assert (one.img_path, one.ori_shape, one.img_shape[:2]) == (
            two.img_path, two.ori_shape, two.img_shape[:2])


def test_another_collate_fn_is_refused(files):
    preprocess = MODELS.build(dict(type='NEPADataPreprocessor'))
    batch = default_collate(samples([path for path in files if path.stem in PLAIN], BYTES, 0))
    with pytest.raises(ValueError, match="set the data loader's collate_fn to .* for PackEnc"):
        preprocess(batch)


def test_flips(files):
    for prob in (0, 1):
        steps = [dict(BYTES[0], flip_prob=prob)]
        assert all(one['data_samples'].flip == prob for one in samples(files, steps, 0))
    with pytest.raises(ValueError, match='flip_prob must be between 0 and 1, got 2'):
        TRANSFORMS.build(dict(type='PackEncodedCrop', scale=28, flip_prob=2))
    with pytest.raises(ValueError, match="interpolation must be 'bilinear' or 'bicubic'"):
        TRANSFORMS.build(dict(type='PackEncodedCrop', scale=28, interpolation='area'))


# Files that the device refuses; decode_jpeg stands for nvJPEG

def refuse(monkeypatch, *contents):
    """A decoder that raises for these files, and for every batch with one of them."""
    def decode(content, **kwargs):
        several = content if isinstance(content, list) else [content]
        if any(one.numpy().tobytes() in contents for one in several):
            raise RuntimeError('nvjpegDecode failed: 5\nsomewhere in C++')
        return decode_jpeg(content, **kwargs)
    monkeypatch.setattr(encoded, 'decode_jpeg', decode)


def test_what_the_device_refuses_is_decoded_by_pillow(files, monkeypatch, caplog):
    batch = collate(samples(files, BYTES, 0))
    expected = encoded.decode_crops(**batch, device='cpu')
    refused = next(path for path in files if path.stem == 'grey')
    refuse(monkeypatch, refused.read_bytes())
    warnings = []
    monkeypatch.setattr(encoded, 'print_log', lambda message, **_: warnings.append(message))
    assert torch.equal(encoded.decode_crops(**batch, device='cpu'), expected)
    assert warnings == [f'{refused} is decoded by Pillow, because cpu refuses it: '
                        'nvjpegDecode failed: 5']


def test_what_nobody_can_decode_is_named(tmp_path, monkeypatch):
    """A header as any other, an end as well, and nothing in between."""
    ODD['rgb'](tmp_path / 'good.jpg')
    content = (tmp_path / 'good.jpg').read_bytes()
    scan = content.index(b'\xff\xda')
    (tmp_path / 'bad.jpg').write_bytes(content[:scan] + b'\xff\xd9')
    batch = collate(samples(sorted(tmp_path.iterdir()), BYTES, 0))
    with pytest.raises(UnreadableImageError, match=r'^The image .*bad.jpg cannot be read: .*\.$'):
        encoded.decode_crops(**batch, device='cpu')


def test_a_decoder_that_decodes_nothing_is_an_error(files, monkeypatch):
    """Pillow would do it, slowly and without a word."""
    refuse(monkeypatch, *(path.read_bytes() for path in files))
    with pytest.raises(RuntimeError, match='^No JPEG of a batch can be decoded on cpu: nvjpeg'):
        encoded.decode_crops(**collate(samples(files, BYTES, 0)), device='cpu')


@pytest.mark.parametrize('save', [save_truncated, save_text])
def test_torn_files_are_found_by_the_worker(tmp_path, save):
    save(tmp_path / 'image.jpg')
    with pytest.raises(UnreadableImageError, match='image.jpg cannot be read'):
        samples([tmp_path / 'image.jpg'], BYTES, 0)


def test_damaged_files_are_pixels_or_one_error(tmp_path):
    rng, path, outcomes = np.random.default_rng(0), tmp_path / 'image.jpg', set()
    ODD['turned'](path)
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutate(rng, content))
        try:
            pixels = encoded.decode_crops(**collate(samples([path], BYTES, 0)), device='cpu')
        except UnreadableImageError as error:
            assert str(path) in str(error)
            outcomes.add('error')
        else:
            assert pixels.shape == (1, 3, 28, 28) and pixels.dtype == torch.uint8
            outcomes.add('pixels')
    assert len(outcomes) == 2


# Training

@HOOKS.register_module()
class WatchHook(Hook):
    """Losses and files, and a stop after iteration ``stop_at``."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def before_train(self, runner):
        runner.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        names = [Path(sample.img_path).name for sample in data_batch['data_samples']]
        runner.seen.append((outputs['loss'].item(), *names))
        if runner.iter + 1 == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Eleven good images, one of which is a PNG, and a torn one, for two epochs."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(save_pretraining())
    for index in range(12):
        save_image(Path(f'data/imagenet/train/n0/{index:02d}.JPEG'), (40 + index, 50))
    save_truncated(Path('data/imagenet/train/n0/03.JPEG'))
    Image.open('data/imagenet/train/n0/05.JPEG').save('data/imagenet/train/n0/05.JPEG', 'PNG')
    cfg.train_dataloader.dataset.data_prefix = 'train/n0'
    cfg.train_dataloader.update(batch_size=4, sampler=dict(type='DefaultSampler', shuffle=True))
    cfg.default_hooks.update(
        resume=dict(type='ExactResumeHook'), guard=dict(type='NonFiniteGuardHook'),
        unreadable=dict(type='UnreadableImageHook', max_share=0.2))
    cfg.custom_hooks = [dict(type='WatchHook'), dict(type='NEPAMonitorHook', interval=1),
                        dict(type='ThroughputHook', interval=2)]
    cfg.randomness = dict(seed=1, diff_rank_seed=True)
    cfg.train_cfg.max_epochs = 2
    cfg.train_dataloader.dataset.pipeline = PIXELS
    cfg.dump('pixels.py')
    cfg.train_dataloader.collate_fn = dict(type='encoded_collate')
    cfg.train_dataloader.dataset.pipeline = BYTES
    cfg.dump('bytes.py')


def test_training(config):
    """Bit for bit the run on decoded pixels, for any number of workers and after a resume."""
    expected = run_train(['pixels.py', '--work-dir', 'a'])
    assert len(expected.seen) == 6 and not any('03.JPEG' in batch for batch in expected.seen)
    workers = options('train_dataloader.num_workers=2')
    runner = run_train(['bytes.py', '--work-dir', 'b', *workers])
    assert runner.seen == expected.seen
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert log.count('03.JPEG cannot be read') == 1
    assert 'Epoch 2: 1 of 12 samples were replaced' in log
    assert all(f'{name}: ' in log for name in ('images_per_second', 'mfu', 'next_cosine'))
    with pytest.raises(KeyboardInterrupt):
        run_train(['bytes.py', '--work-dir', 'c', *options('custom_hooks.0.stop_at=5')])
    assert run_train(['bytes.py', '--work-dir', 'c', *workers]).seen == expected.seen[3:]


def test_files_of_a_loss_that_is_not_finite(config):
    bad = options('model.data_preprocessor.std=[0,0,0]', 'model.data_preprocessor.mean=[0,0,0]')
    with refused(r'rank 0: .*n0/\d\d.JPEG, .*n0/\d\d.JPEG'):
        run_train(['bytes.py', *bad])


def test_our_config(image_folder, tmp_path):
    """The file takes the place of imagenet_pretrain.py, and draws as that one does."""
    bases = REPO / 'configs' / '_base_'
    names = ('models/nepa_vit-b.py', 'datasets/imagenet_pretrain_gpu-decode.py',
             'schedules/pretrain_bs4096_1600e.py', 'runtime.py')
    (tmp_path / 'run.py').write_text(f'_base_ = {[str(bases / name) for name in names]}')
    cfg = Config.fromfile(tmp_path / 'run.py')
    assert FUNCTIONS.get(cfg.train_dataloader.collate_fn.type) is collate
    pipelines = [Config.fromfile(bases / 'datasets' / f'{name}.py').train_pipeline
                 for name in ('imagenet_pretrain', 'imagenet_pretrain_gpu-decode')]
    assert cfg.train_dataloader.dataset.pipeline == pipelines[1]
    files = sorted(image_folder.rglob('*.jpg'))
    pixels, ours = (samples(files, steps, 0) for steps in pipelines)
    theirs = torch.stack([one['inputs'] for one in pixels])
    ours = encoded.decode_crops(**collate(ours), device='cpu')
    assert abs(ours.int() - theirs.int()).max() <= 2
