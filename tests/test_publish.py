"""What leaves the house: a folder for the Hub, and an ONNX file that runs without OpenMMLab."""
import contextlib
import io
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

from nepa_mm.checkpoints.io import read_checkpoint

from .conftest import REPO
from .test_docs import blocks
from .tiny_runs import load_tool, options, refused, run_train, save_classifier, save_pretraining

publish = load_tool('publish_model').main


@pytest.fixture
def tuned(folder):
    """A fine-tuned classifier that the published format knows."""
    config, _ = save_classifier()
    cfg = Config.fromfile(config)
    cfg.model.data_preprocessor.to_rgb = True
    cfg.model.backbone.fc_norm = True       # of the mean of the patches
    cfg.dump(config)
    run_train([config, '--work-dir', 'run', *options('train_cfg.max_epochs=2')])
    return 'run/epoch_2.pth'


def run_code(code):
    names = {}
    exec(code, names)
    return names


def test_folder(tuned, capsys):
    """Complete; its card says what is recorded; its snippets load it with the same outputs."""
    publish([tuned, 'my "nepa"', '--to', 'hf', '--license', 'apache-2.0'])
    assert sorted(path.name for path in Path('my "nepa"').iterdir()) == [
        'README.md', 'config.json', 'model.safetensors', 'preprocessor_config.json']
    card = Path('my "nepa"/README.md').read_text()
    front = yaml.safe_load(card.split('---')[1])
    assert (front['license'], front['pipeline_tag']) == ('apache-2.0', 'image-classification')
    recorded = read_checkpoint(tuned)['message_hub']['log_scalars']['val/accuracy/top1']
    for row in ('| Length | 2 epochs, 8 iterations |', '| Training data | CustomDataset (data) |',
                '| Optimizer | SGD, learning rate 0.1 |',
                f'| accuracy/top1 | {recorded.current():.4g} |'):
        assert row in card
    assert str(Path.cwd()) not in card
    with_ours, with_timm = blocks(card, 'python')
    image = torch.randn(2, 3, 28, 28)
    ours = run_code(with_ours)['model']
    timm = run_code(with_timm)['model'].eval()
    expected = MODELS.build(Config.fromfile('classify.py').model).eval()
    expected.load_state_dict(read_checkpoint(tuned)['state_dict'])
    with torch.no_grad():
        assert torch.equal(ours(image), expected(image))
        assert torch.allclose(timm(image), expected(image), atol=1e-5)
    config = json.loads(Path('my "nepa"/config.json').read_text())
    assert list(config['id2label'].values()) == list('abcde')


def test_folder_of_a_backbone(folder):
    """Without classes, without validation: the card claims neither."""
    run_train([save_pretraining(), '--work-dir', 'run',
               *options('model.data_preprocessor.to_rgb=True')])
    publish(['run/epoch_1.pth', 'out', '--to', 'hf'])
    card = Path('out/README.md').read_text()
    assert 'license: unknown' in card and 'image-feature-extraction' in card
    assert 'The checkpoint records no validation.' in card and 'accuracy' not in card
    assert run_code(blocks(card, 'python')[0])['model'].backbone.num_layers == 3


def test_refusals(tuned):
    with refused("--license must be a name of the Hub's"):
        publish([tuned, 'x', '--to', 'hf', '--license', 'my: own'])
    with refused('--license needs --to hf'):
        publish([tuned, 'x', '--license', 'mit'])
    Path('taken').mkdir()
    with refused('taken exists already'):
        publish([tuned, 'taken', '--to', 'hf'])
    assert not Path('x').exists() and not list(Path('taken').iterdir())


@pytest.mark.parametrize('resize', [dict(type='ResizeEdge', scale=33, edge='short'),
                                    dict(type='Resize', scale=(33, 31))], ids=['edge', 'size'])
def test_onnx_example_of_the_page(folder, resize):
    """The snippet of docs/weights.md, word for word, gives the class of tools/predict.py."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    config, checkpoint = save_classifier()
    cfg = Config.fromfile(config)
    cfg.model.data_preprocessor.to_rgb = True
    how = dict(backend='pillow', interpolation='bicubic')
    load, *_, pack = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [
        load, dict(resize, **how),
        dict(type='CenterCrop', crop_size=28), pack]
    cfg.dump(config)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(
        dataset_meta=dict(classes=['ant', 'bee', 'cow', 'dog', 'elk']))), checkpoint)
    load_tool('export').main([config, checkpoint, '--out', 'model.onnx'])
    code, = (body for body in blocks((REPO / 'docs/weights.md').read_text(), 'python')
             if 'onnxruntime' in body)
    assert 'nepa_mm' not in code and len(code.strip().splitlines()) <= 20
    Path('example.py').write_text(code)
    seen = set()
    for seed, size in enumerate([(40, 31), (200, 333), (90, 90), (33, 64)]):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save('cat.jpg')
        out = f'{seed}.json'
        with contextlib.redirect_stdout(io.StringIO()):
            load_tool('predict').main(['cat.jpg', '--model', config, '--checkpoint', checkpoint,
                                       '--out', out, '--no-figures'])
        row, = json.loads(Path(out).read_text())
        predicted = row['classes'][0]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            names = runpy.run_path('example.py')
        assert printed.getvalue().strip() == predicted and re.fullmatch('[a-z]{3}', predicted)
        scores = torch.from_numpy(names['logits'][0]).softmax(0)    # of the same pixels
        assert scores.max().item() == pytest.approx(row['scores'][0], abs=1e-5)
        seen.add(predicted)
    assert len(seen) > 1        # not one class for all
