"""The model index, inference from Python, tools/predict.py, and the tables of the pages."""
from pathlib import Path

import mmpretrain
import pytest
import torch
import yaml
from mmengine.config import Config
from mmpretrain import FeatureExtractor, ImageClassificationInferencer
from PIL import Image

from nepa_mm.checkpoints.io import read_checkpoint, save_weights

from .conftest import REPO
from .tiny_runs import load_tool, save_classifier, save_segmentor

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
