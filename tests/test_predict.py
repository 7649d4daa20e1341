"""The model index, inference from Python, tools/predict.py, and the tables of the pages."""
import csv
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmpretrain import FeatureExtractor, ImageClassificationInferencer
from PIL import Image

from nepa_mm.checkpoints.io import read_checkpoint, save_weights

from .conftest import REPO
from .tiny_runs import find_script, load_tool, run_script, save_classifier, save_segmentor

predict = load_tool('predict').main
tables = load_tool('readme_tables')
IMAGES = ['data/val/a/0.jpg', 'data/val/b/1.jpg']


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_model_index():
    """mmpretrain knows every model of every metafile, and where its config is."""
    names = []
    for metafile in yaml.safe_load((REPO / 'model-index.yml').read_text())['Import']:
        for model in yaml.safe_load((REPO / metafile).read_text())['Models']:
            assert (REPO / model['Config']).is_file(), model['Name']
            names.append(model['Name'])
    assert sorted(names) == mmpretrain.list_models('nepa*') and 'nepa_vit-b_ft_in1k' in names
    model = mmpretrain.get_model(
        'nepa_vit-b_ft_in1k', backbone=dict(arch='tiny', init_cfg=None), head=dict(in_channels=192))
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert len(model._dataset_meta['classes']) == 1000


def test_inferencers():
    """mmpretrain's own classes, on a .safetensors file."""
    config, checkpoint = save_classifier()
    save_weights(read_checkpoint(checkpoint)['state_dict'], 'a.safetensors',
                 dataset_meta=dict(classes=list('abcde')))
    result, = ImageClassificationInferencer(config, pretrained='a.safetensors')(IMAGES[0])
    assert result['pred_label'] == 4 and result['pred_class'] == 'e'
    feature, = FeatureExtractor(config, pretrained='a.safetensors')(IMAGES[0], stage='backbone')
    assert feature[0].shape == (32,)


def test_classification(capsys):
    config, checkpoint = save_classifier()
    predict([*IMAGES, '--model', config, '--checkpoint', checkpoint, '--out-dir', 'out'])
    out = capsys.readouterr().out.split(IMAGES[1])[1].splitlines()
    assert [line.split()[-1] for line in out[1:6]] == list('43210')
    scores = torch.arange(5.).softmax(0).flip(0)
    assert [line.split()[0] for line in out[1:6]] == [f'{score:.2%}' for score in scores]
    assert sorted(path.name for path in Path('out').iterdir()) == ['0.png', '1.png']


def test_segmentation():
    pytest.importorskip('mmseg')
    config, checkpoint = save_segmentor()
    predict(['data/images/0.jpg', '--model', config, '--checkpoint', checkpoint])
    assert [path.name for path in Path('predictions').glob('*.*')] == ['0.png']
    with Image.open('predictions/labels/0.png') as label_map:
        assert label_map.size == (32, 28) and set(label_map.getdata()) == {1}


def awkward_folder():
    """Nested files of several formats and one that is cut off; and the names of the good ones."""
    good = ['x/a b.webp', 'x/grey.png', 'x/deep/cmyk.jpg', 'x/deep/UPPER.JPG', 'x/odd.tif']
    Path('x/deep').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, mode in zip(good, ('RGB', 'L', 'CMYK', 'RGB', 'RGB')):
        pixels = Image.fromarray(rng.integers(0, 256, (33, 47, 3), dtype=np.uint8))
        pixels.convert(mode).save(name)
    Path('x/broken.jpg').write_bytes(Path(IMAGES[0]).read_bytes()[:300])
    Path('x/notes.txt').touch()
    Path('x/.hidden.jpg').touch()
    return sorted(good)


@pytest.mark.parametrize('batch_size', [1, 2, 16])
def test_folder_with_a_broken_file(capsys, batch_size):
    """The broken file is named and makes the status 1; all others are in the table."""
    config, checkpoint = save_classifier()
    good = awkward_folder()
    with pytest.raises(SystemExit) as status:
        predict(['x', '--model', config, '--checkpoint', checkpoint, '--out', 'a b.csv',
                 '--topk', '2', '--batch-size', str(batch_size)])
    assert status.value.code == 1
    out, err = capsys.readouterr()
    assert 'error: 1 of 6 images cannot be read: x/broken.jpg' in err and '5 of 6 images' in out
    with open('a b.csv', newline='') as file:
        rows = {row.pop('file'): row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted([*good, 'x/broken.jpg'])
    scores = torch.arange(5.).softmax(0).flip(0)
    for name in good:
        row = rows[name]
        assert list(row) == ['class_1', 'score_1', 'class_2', 'score_2', 'figure', 'error']
        assert (row['class_1'], row['class_2'], row['error']) == ('class 4', 'class 3', '')
        assert [float(row[f'score_{i}']) for i in (1, 2)] == pytest.approx(scores[:2].tolist())
        assert Image.open(row['figure']).width > 500
    assert 'x/broken.jpg cannot be read' in rows['x/broken.jpg']['error']
    assert not rows['x/broken.jpg']['class_1']


def test_patterns_and_json(capsys):
    """Shell patterns, also over folders; each file once; no figures."""
    config, checkpoint = save_classifier()
    predict([IMAGES[1], 'data/val/*/*.jpg', 'data/val/a', '--model', config, '--checkpoint',
             checkpoint, '--out', 'out/a.json', '--no-figures'])
    rows = json.loads(Path('out/a.json').read_text())
    assert [row['file'] for row in rows] == [IMAGES[1], *sorted(
        str(path) for path in Path('data/val').rglob('*.jpg') if str(path) != IMAGES[1])]
    assert all(len(row['classes']) == 5 and sum(row['scores']) == pytest.approx(1)
               and 'figure' not in row for row in rows)
    assert not Path('predictions').exists() and IMAGES[1] not in capsys.readouterr().out


def test_segmentation_table():
    pytest.importorskip('mmseg')
    config, checkpoint = save_segmentor()
    shutil.copy('data/images/0.jpg', 'data/images/a b.jpg')
    Path('data/images/broken.png').write_bytes(b'no image')
    for name in ('a.csv', 'a.json'):
        code, out = run_script('predict.py', 'data/images', '--model', config, '--checkpoint',
                               checkpoint, '--out', name, cwd='.')
        assert code == 1 and 'error: 1 of 4 images cannot be read: data/images/broken.png' in out
        for junk in ('OneDL', 'MultiScaleDeformable', 'Cityscapes', 'Failed to'):
            assert junk not in out, junk
    with open('a.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert (rows[1]['file'], rows[1]['share_corner']) == ('data/images/1.jpg', '1.0')
    rows = json.loads(Path('a.json').read_text())
    assert rows[2]['shares'] == dict(background=0., corner=1.) and 'error' in rows[3]
    with Image.open(rows[2]['mask']) as label_map:
        assert label_map.size == (32, 28) and set(label_map.getdata()) == {1}


def test_progress_is_shown_on_a_terminal_only():
    config, checkpoint = save_classifier()
    command = [sys.executable, find_script('predict.py'), 'data/val', '--model', config,
               '--checkpoint', checkpoint, '--no-figures', '--batch-size', '3']
    env = dict(os.environ, PYTHONPATH=str(REPO), CUDA_VISIBLE_DEVICES='', TERM='xterm')
    screen, terminal = pty.openpty()
    process = subprocess.Popen(command, env=env, stdout=terminal, stderr=subprocess.PIPE)
    shown = b''
    while b'8 of 8 images predicted' not in shown:
        shown += os.read(screen, 2 ** 16)
    assert process.wait() == 0 and b'Predicting' in shown and b'100%' in shown
    piped = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert 'Predicting' not in piped.stdout + piped.stderr and '8 of 8 images' in piped.stdout


def test_refusals(capsys):
    config, checkpoint = save_classifier()

    def refuse(*args):
        with pytest.raises(SystemExit):
            predict(list(args))
        return capsys.readouterr().err

    assert 'no image nowhere.jpg' in refuse('nowhere.jpg', '--model', config)
    assert 'give --checkpoint' in refuse(IMAGES[0], '--model', config)
    assert 'Failed to find model "nepa_vit-x"' in refuse(IMAGES[0], '--model', 'nepa_vit-x')
    assert 'has no test_dataloader' in refuse(IMAGES[0], '--model', 'nepa_vit-b', '--checkpoint',
                                              checkpoint)
    known = ('--model', config, '--checkpoint', checkpoint)
    assert 'no image that matches no/*.jpg' in refuse('no/*.jpg', *known)
    Path('empty').mkdir()
    assert 'empty holds no image' in refuse('empty', *known)
    assert 'must end in .csv or .json, got a.txt' in refuse(IMAGES[0], *known, '--out', 'a.txt')
    Path('a.csv').touch()
    assert '--out a.csv exists already' in refuse(IMAGES[0], *known, '--out', 'a.csv')
    assert '--topk and --batch-size must be positive' in refuse(IMAGES[0], *known, '--topk', '0')
    assert not Path('predictions').exists()
    cfg = Config.fromfile(config)
    cfg.model.backbone.arch.num_layers += 1
    cfg.dump('deeper.py')
    assert 'another network: it lacks backbone.layers.3' in refuse(
        IMAGES[0], '--model', 'deeper.py', '--checkpoint', checkpoint)


@pytest.mark.parametrize(
    'page', tables.pages(), ids=lambda path: str(path.relative_to(REPO)).replace('/', '_'))
def test_tables_of_pages(page):
    assert tables.render(page) == page.read_text()


def test_table_content():
    path = REPO / 'tests' / 'README.md'
    text = tables.table('configs/classification/metafile.yml', path.parent)
    row = next(line for line in text.splitlines() if '[nepa_vit-b_ft_in1k]' in line)
    assert '(../configs/classification/nepa_vit-b_ft_in1k.py)' in row and '83.75' in row
