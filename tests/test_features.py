"""nepa_mm.features and tools/extract_features.py."""
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

import nepa_mm

from .tiny_runs import (
    load_tool,
    refused,
    run_script,
    save_classifier,
    save_image,
    save_pretraining,
    save_segmentor,
)

extract = load_tool('extract_features').main


@pytest.fixture(autouse=True)
def in_folder(folder):
    """Every test runs in an empty folder."""


@pytest.fixture
def model():
    return nepa_mm.load(*save_classifier())


PATHS = ['data/val/a/0.jpg', 'data/val/b/1.jpg', 'data/val/e/4.jpg']


def test_pools(model):
    x = torch.stack([model.transform(path) for path in PATHS])
    with torch.no_grad():
        tokens = [model.backbone.encode(*model.backbone.embed(x), [i])[0] for i in range(3)]
    for block in (0, 1, 2, -1, -3):
        t = tokens[block]
        expected = dict(mean=t[:, 1:].mean(1), cls=t[:, 0], last=t[:, -1], none=t,
                        map=t[:, 1:].transpose(1, 2).reshape(3, 32, 2, 2))
        names = dict(mean='avg_featmap', cls='cls_token', last='last_token', none='raw',
                     map='featmap')
        for pool, tensor in expected.items():
            found = nepa_mm.features(model, x, block=block, pool=pool)
            assert torch.equal(found, tensor) and not found.requires_grad
            assert torch.equal(nepa_mm.features(model, x, block=block, pool=names[pool]), tensor)
    assert torch.equal(nepa_mm.features(model, x), tokens[2][:, 1:].mean(1))


def test_images(model):
    """Paths and images, in batches; a backbone takes tensors."""
    x = torch.stack([model.transform(path) for path in PATHS])
    expected = nepa_mm.features(model, x, block=1)
    mixed = [PATHS[0], Path(PATHS[1]), Image.open(PATHS[2])]
    for batch_size in (1, 2, 64):
        found = nepa_mm.features(model, mixed, block=1, batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(nepa_mm.features(model, iter(mixed), block=1), expected)
    assert torch.equal(nepa_mm.features(model.backbone, x, block=1), expected)
    torch.testing.assert_close(nepa_mm.features(model, PATHS[0], block=1), expected[:1])
    half = nepa_mm.features(model.bfloat16(), x, block=1)
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)
    assert half.dtype == torch.float32


def test_the_model_stays_as_it_is(model):
    model.train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    rng, state = torch.random.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    first = nepa_mm.features(model, PATHS)
    with pytest.raises(ValueError):
        nepa_mm.features(model, ['nowhere.jpg'])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(rng, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(nepa_mm.features(model.eval(), PATHS), first)


def test_segmentor_fits_patches():
    config, checkpoint = save_segmentor()
    cfg = Config.fromfile(config)
    cfg.model.update(type='NEPASegmentor')
    cfg.custom_imports.imports.append('nepa_mm.models.segmentors')
    cfg.test_dataloader.dataset.pipeline[1] = dict(type='Resize', scale=(200, 30), keep_ratio=True)
    cfg.dump('fit.py')
    model = nepa_mm.load('fit.py', checkpoint)
    save_image(Path('wide.png'), (66, 30))
    save_image(Path('high.png'), (30, 44))
    x = model.transform('wide.png')[None]
    assert x.shape[2:] == (30, 66)
    found = nepa_mm.features(model, x, pool='map')
    assert torch.equal(found, model.extract_feat(x)[0])
    both = nepa_mm.features(model, ['wide.png', 'high.png'])
    assert both.shape == (2, 32) and torch.equal(both[:1], nepa_mm.features(model, x))
    with pytest.raises(ValueError, match="pool='map' .* same size"):
        nepa_mm.features(model, ['wide.png', 'high.png'], pool='map')


def test_refusals(model):
    x = torch.zeros(1, 3, 28, 28)
    for kwargs, message in ((dict(pool='max'), "pool must be one of .*'mean'.*got 'max'"),
                            (dict(block=3), r'\[-3, 2\] for 3 blocks, got 3'),
                            (dict(block=-4), 'got -4'), (dict(block=1.5), 'got 1.5'),
                            (dict(batch_size=0), 'batch_size .* got 0')):
        with pytest.raises(ValueError, match=message):
            nepa_mm.features(model, x, **kwargs)
    for images, message in (([], 'no image'), (x[0], r'\(B, C, height, width\)'),
                            (x[:, :, :20], 'not a multiple of the patch'), (3, 'got int'),
                            (x.to(torch.uint8), 'normalised'), ([x], 'got Tensor')):
        with pytest.raises(ValueError, match=message):
            nepa_mm.features(model, images)
    with pytest.raises(ValueError, match='NEPAViT, got Linear'):
        nepa_mm.features(torch.nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match='no transform'):
        nepa_mm.features(model.backbone, PATHS)


def test_tool_on_classes(model, capsys):
    save_image(Path('data/val/b/with blank.png'), (61, 33))
    extract(['data/val', '--model', 'classify.py', '--checkpoint', 'classifier.pth',
             '--out', 'out/features.npz', '--block', '1', '--pool', 'cls', '--batch-size', '4',
             '--device', 'cpu', '--workers', '1'])
    saved = np.load('out/features.npz')
    assert saved['features'].shape == (9, 32) and saved['features'].dtype == np.float32
    files = saved['files'].tolist()
    assert files == sorted(files) and 'data/val/b/with blank.png' in files
    assert saved['classes'].tolist() == list('abcde')
    assert [saved['classes'][i] for i in saved['labels']] == [Path(f).parent.name for f in files]
    expected = nepa_mm.features(model, files, block=1, pool='cls')
    np.testing.assert_allclose(saved['features'], expected, atol=1e-6)
    assert (saved['block'], str(saved['pool']), str(saved['weights'])) == (1, 'cls', 'raw')
    assert '9 images' in capsys.readouterr().out
    with refused('features.npz exists already'):
        extract(['data/val', '--model', 'classify.py', '--checkpoint', 'classifier.pth',
                 '--out', 'out/features.npz'])


def test_tool_on_files(model, capsys):
    """Nested folders and files have no classes; broken images are named, and the status is 1."""
    content = Path(PATHS[0]).read_bytes()
    Path('mixed/deep/er').mkdir(parents=True)
    Path('mixed/a.jpg').write_bytes(content)
    Path('mixed/deep/er/b.JPG').write_bytes(content)
    Path('mixed/deep/cut.jpg').write_bytes(content[:300])
    Path('mixed/notes.txt').write_text('no image')
    args = ['--model', 'classify.py', '--checkpoint', 'classifier.pth', '--device', 'cpu']
    with pytest.raises(SystemExit) as end:
        extract(['mixed', PATHS[1], *args, '--out', 'f.npz', '--workers', '0'])
    assert end.value.code == 1
    saved = np.load('f.npz')
    assert saved['files'].tolist() == ['mixed/a.jpg', 'mixed/deep/er/b.JPG', PATHS[1]]
    assert 'labels' not in saved and np.array_equal(saved['features'][0], saved['features'][1])
    err = capsys.readouterr().err
    assert 'mixed/deep/cut.jpg cannot be read' in err and '1 of 4 images' in err

    for argv, message in (
            (['nowhere', '--out', 'g.npz'], 'There is no image nowhere'),
            (['mixed/deep/cut.jpg', '--out', 'g.npz'], 'None of the 1 images'),
            (['mixed', '--out', 'g.npy'], r'must end in \.npz'),
            (['mixed', '--out', 'g.npz', '--block', '7'], 'got 7'),
            (['mixed', '--out', 'g.npz', '--batch-size', '0'], '--batch-size must .* got 0'),
            (['mixed/deep/er/..', '--out', 'g.npz', '--weights', 'ema'], 'without EMA weights')):
        with refused(message):
            extract([*argv, *args])
    Path('empty').mkdir()
    with refused('empty holds no image'):
        extract(['empty', *args, '--out', 'g.npz'])
    with pytest.raises(SystemExit) as end:
        extract(['mixed', '--out', 'g.npz'])
    assert end.value.code == 2 and 'required: --checkpoint' in capsys.readouterr().err
    assert not list(Path().glob('*g.npz*'))


def test_tool_as_a_command(tmp_path):
    """From the checkpoint's own record, as README shows."""
    config = save_pretraining()
    status, text = run_script('train.py', config, '--work-dir', 'work', cwd=tmp_path)
    assert status == 0, text
    status, text = run_script('extract_features.py', 'data', '--checkpoint', 'work/epoch_1.pth',
                              '--out', 'f.npz', cwd=tmp_path)
    assert status == 0, text
    assert np.load('f.npz')['features'].shape == (4, 32)
