"""A checkpoint whose two sets of weights say different things: which one speaks, everywhere."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from safetensors import safe_open

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.loading import load_strict

from .conftest import REPO
from .tiny_runs import load_tool, run_test, run_train, save_classifier, save_segmentor

ALONE = ['--cfg-options', 'experiment_name=alone']      # visualizers are kept by this name
CHOICES = dict(ema=[[], ['--weights', 'ema']], raw=[['--weights', 'raw']])
ASKED = [(which, flags) for which, choices in CHOICES.items() for flags in choices]
HOOKS = [dict(type='ModelEMAHook', evaluate_on_origin=True)]
ours = pytest.mark.parametrize('which, flags', ASKED, ids=lambda x: ' '.join(x) or 'default')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def split(config, checkpoint, layer, answer):
    """Add the raw weights to a checkpoint, with which ``layer`` always says ``answer``."""
    read = read_checkpoint(checkpoint)
    raw = {key: 2 * value if value.is_floating_point() else value
           for key, value in read['state_dict'].items()}
    raw[f'{layer}.bias'] = torch.zeros_like(raw[f'{layer}.bias'])
    raw[f'{layer}.bias'][answer] = 9
    read['ema_state_dict'] = {'module.' + key: value for key, value in raw.items()}
    read['ema_state_dict']['steps'] = torch.tensor(3)
    torch.save(read, checkpoint)
    cfg = Config.fromfile(config)
    cfg.custom_hooks = HOOKS[:1] if cfg.default_scope == 'mmseg' else HOOKS
    cfg.dump(config)
    return config, checkpoint, dict(ema=read['state_dict'], raw=raw)


@pytest.fixture
def classifier():
    """The average always says class 4, four of the eight images; raw weights class 0, one."""
    return split(*save_classifier(), 'head.fc', 0)


@pytest.fixture
def segmentor():
    """The average always says class 1, a quarter of the pixels; raw weights class 0."""
    pytest.importorskip('mmseg')
    return split(*save_segmentor(), 'decode_head.conv_seg', 0)


CLASS, TOP1 = dict(ema=4, raw=0), dict(ema=50., raw=12.5)


@ours
@pytest.mark.parametrize('tta', [[], ['--tta']], ids=['', 'tta'])
def test_classifier(classifier, which, flags, tta, capsys):
    config, checkpoint, _ = classifier
    metrics = run_test([config, checkpoint, '--out', 'a.pkl', '--show-dir', 'shown', *flags, *tta])
    assert metrics['accuracy/top1'] == TOP1[which]
    out = capsys.readouterr().out
    assert f'{which} weights of classifier.pth: accuracy/top1 {TOP1[which]}' in out
    samples = pickle.loads(Path('a.pkl').read_bytes())
    assert [int(sample['pred_label']) for sample in samples] == [CLASS[which]] * 8
    assert {sample['weights'] for sample in samples} == {which}

    run_test([config, checkpoint, '--out', 'a.json', '--out-item', 'metrics', *flags, *tta])
    assert json.loads(Path('a.json').read_text()) == dict(metrics, weights=which)
    # the pictures are those of a file that has but one set
    torch.save(dict(state_dict=classifier[2][which]), 'one.pth')
    run_test([config, 'one.pth', '--show-dir', 'alone', *tta, *ALONE])
    shown, alone = (sorted(Path(d).glob('*.png')) for d in ('shown', 'alone'))
    assert len(shown) == len(alone) == 8
    for a, b in zip(shown, alone):
        assert np.array_equal(Image.open(a), Image.open(b))


@ours
@pytest.mark.parametrize('tta', [[], ['--tta']], ids=['', 'tta'])
def test_segmentor(segmentor, which, flags, tta, capsys):
    config, checkpoint, state = segmentor
    metrics = run_test([config, checkpoint, '--out', 'maps', '--show-dir', 'shown', *flags, *tta])
    assert metrics['aAcc'] == dict(ema=25., raw=75.)[which]
    assert f'{which} weights of segmentor.pth' in capsys.readouterr().out
    torch.save(dict(state_dict=state[which]), 'one.pth')
    run_test([config, 'one.pth', '--show-dir', 'alone', *tta, *ALONE])
    for name in '01':
        assert (np.array(Image.open(f'maps/{name}.png')) == dict(ema=1, raw=0)[which]).all()
    shown, alone = (sorted(Path(d).rglob('*.png')) for d in ('shown', 'alone'))
    assert len(shown) == len(alone) == 2
    for a, b in zip(shown, alone):
        assert np.array_equal(Image.open(a), Image.open(b))


@pytest.mark.parametrize('flags', [[], ['--tta']], ids=['', 'tta'])
def test_own_tools_of_mmpretrain(classifier, flags):
    """The hook, which tests both sets there, saves the average's predictions and pictures.

    mmpretrain itself cannot draw with test-time augmentation.
    """
    config, checkpoint, state = classifier
    tool = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'test.py'
    torch.save(dict(state_dict=state['ema']), 'one.pth')
    for name in (checkpoint, 'one.pth'):
        done = subprocess.run(
            [sys.executable, tool, config, name, '--out', f'{name}.pkl',
             *(flags or ['--show-dir', f'{name}.dir'])], capture_output=True, text=True,
            env=dict(os.environ, PYTHONPATH=str(REPO)))
        assert done.returncode == 0, done.stderr
        samples = pickle.loads(Path(f'{name}.pkl').read_bytes())
        assert [int(sample['pred_label']) for sample in samples] == [4] * 8
    assert 'accuracy/top1: 50.0' in done.stdout + done.stderr
    for shown in Path(f'{checkpoint}.dir').glob('*.png'):
        assert np.array_equal(Image.open(shown), Image.open(Path('one.pth.dir') / shown.name))


@ours
def test_predict(classifier, which, flags, capsys):
    config, checkpoint, _ = classifier
    main = load_tool('predict').main
    main(['data/val/a/0.jpg', '--model', config, '--checkpoint', checkpoint, *flags])
    lines = capsys.readouterr().out.split('\n')
    first, = [lines[i + 1] for i, line in enumerate(lines) if line.endswith('data/val/a/0.jpg')]
    assert first.endswith(f'class {CLASS[which]}')
    assert f'{which} weights of classifier.pth' in lines[-2]
    assert Image.open('predictions/0.png').text['Source'] == f'{which} weights of classifier.pth'


@ours
def test_predict_segments(segmentor, which, flags, capsys):
    config, checkpoint, _ = segmentor
    load_tool('predict').main(
        ['data/images/0.jpg', '--model', config, '--checkpoint', checkpoint, *flags])
    label_map, = Path('predictions').rglob('labels/*.png')
    assert (np.array(Image.open(label_map)) == dict(ema=1, raw=0)[which]).all()
    assert f'{which} weights of segmentor.pth' in capsys.readouterr().out


@ours
def test_features_and_pages(classifier, which, flags, capsys, monkeypatch):
    """knn.py and visualize.py: the numbers of a file that has but that set, and its name."""
    config, checkpoint, state = classifier
    torch.save(dict(state_dict=state[which]), 'one.pth')
    knn, visualize = load_tool('knn').main, load_tool('visualize').main
    assert knn([config, checkpoint, '-k', '1', *flags]) == knn([config, 'one.pth', '-k', '1'])
    assert f'{which} weights of classifier.pth' in capsys.readouterr().out
    for name, choice in ((checkpoint, flags), ('one.pth', [])):
        visualize([config, name, 'data/val/a/0.jpg', '--size', '28', '--query', '0', '0',
                   '--out-dir', f'{name}.dir', *choice])
    # below the title, which names the file
    pages = [np.array(Image.open(f'{name}.dir/0.png').convert('RGB')) for name in
             (checkpoint, 'one.pth')]
    assert np.array_equal(*(page[len(page) // 4:] for page in pages))


@ours
@pytest.mark.parametrize('kind', ['onnx', 'torch-export'])
def test_export(classifier, which, flags, kind, capsys):
    """The weights, and what is needed to use the file, stand in it."""
    config, checkpoint, _ = classifier
    read = read_checkpoint(checkpoint)
    read['meta']['dataset_meta'] = dict(classes=list('abcde'))
    torch.save(read, checkpoint)
    if kind == 'onnx':
        onnxruntime = pytest.importorskip('onnxruntime')
        pytest.importorskip('onnxscript')
    load_tool('export').main([config, checkpoint, '--format', kind, '--out', 'out', *flags])
    assert f'the {which} weights of classifier.pth' in capsys.readouterr().out
    image = torch.randn(2, 3, 28, 28)
    if kind == 'onnx':
        session = onnxruntime.InferenceSession('out')
        meta = {key: json.loads(value) for key, value in
                session.get_modelmeta().custom_metadata_map.items()}
        logits, = session.run(None, dict(image=image.numpy()))
    else:
        files = {'nepa_mm.json': ''}
        logits = torch.export.load('out', extra_files=files).module()(image).detach().numpy()
        meta = json.loads(files['nepa_mm.json'])
    assert logits.argmax(1).tolist() == [CLASS[which]] * 2
    assert meta == dict(
        weights=which, input_size=[28, 28], mean=[127.5] * 3, std=[127.5] * 3,
        channel_order='BGR', classes=list('abcde'), resize=[28, 28], crop=None,
        interpolation='bilinear', backend='cv2')


def test_export_of_a_segmentor(segmentor):
    """Class names come from the data set where the checkpoint has none."""
    config, checkpoint, _ = segmentor
    load_tool('export').main([config, checkpoint, '--format', 'torch-export', '--out', 'out'])
    files = {'nepa_mm.json': ''}
    torch.export.load('out', extra_files=files)
    meta = json.loads(files['nepa_mm.json'])
    assert (meta['weights'], meta['input_size']) == ('ema', [28, 28])
    assert meta['classes'] == ['background', 'corner']


@ours
def test_files_for_others(classifier, which, flags, capsys):
    """publish_model.py and convert_checkpoint.py --to hf, and what tools read in their files."""
    config, checkpoint, state = classifier
    cfg = Config.fromfile(config)
    cfg.model.data_preprocessor.to_rgb = True
    cfg.model.backbone.out_type = 'last_token'      # the published format knows it without a norm
    cfg.dump(config)
    final = load_tool('publish_model').main([checkpoint, 'published', *flags])
    convert = load_tool('convert_checkpoint').main
    convert([checkpoint, 'folder', '--to', 'hf', '--config', config, *flags])
    assert capsys.readouterr().out.count(f'the {which} weights') == 2
    for source in (final, 'folder'):
        read = read_checkpoint(source)
        assert read['meta']['weights'] == dict(state_dict=which)
        assert read['state_dict'].keys() == state[which].keys()
        assert all(torch.equal(read['state_dict'][key], value)
                   for key, value in state[which].items())
        assert run_test([config, source])['accuracy/top1'] == TOP1[which]
    with safe_open('folder/model.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['nepa_mm'])['weights'] == dict(state_dict=which)


def test_starting_from_both_sets(classifier):
    """init_cfg takes either set, load_from the average."""
    config, checkpoint, state = classifier
    cfg = Config.fromfile(config)
    init_default_scope('mmpretrain')
    for asked, which in ((None, 'ema'), ('ema', 'ema'), ('raw', 'raw')):
        backbone = dict(cfg.model.backbone, init_cfg=dict(
            type='Pretrained', checkpoint=checkpoint, prefix='backbone.', weights=asked))
        network = MODELS.build(backbone)
        network.init_weights()
        for key, value in network.state_dict().items():
            assert torch.equal(value, state[which]['backbone.' + key])
    run_train([config, '--work-dir', 'run', '--cfg-options', f'load_from={checkpoint}',
               'optim_wrapper.optimizer.lr=0.', 'default_hooks.run_check.type=RunCheckHook',
               'default_hooks.run_check.odd=warn'])
    read = read_checkpoint('run/epoch_1.pth')
    for sets in (read['state_dict'], read['ema_state_dict']):
        for key, value in state['ema'].items():
            assert torch.allclose(sets.get(key, sets.get('module.' + key)), value)


def test_apis_of_openmmlab(classifier):
    """Their readers know the first set, the average."""
    config, checkpoint, state = classifier
    expected = MODELS.build(Config.fromfile(config).model)
    load_strict(expected, checkpoint)
    inferencer = mmpretrain.ImageClassificationInferencer(config, pretrained=checkpoint)
    assert inferencer('data/val/a/0.jpg')[0]['pred_label'] == 4
    for model in (mmpretrain.get_model(config, pretrained=checkpoint),
                  mmpretrain.FeatureExtractor(config, pretrained=checkpoint).model,
                  inferencer.model, expected):
        for key, value in model.state_dict().items():
            if key in state['ema']:
                assert torch.equal(value.cpu(), state['ema'][key]), key


def test_segmentation_api_of_openmmlab(segmentor):
    config, checkpoint, _ = segmentor
    from mmseg.apis import MMSegInferencer
    found = MMSegInferencer(config, checkpoint)('data/images/0.jpg', return_datasamples=True)
    assert (found.pred_sem_seg.data == 1).all()


def test_absent_sets_are_refused(classifier, capsys):
    """In one sentence, by every tool, before anything is written."""
    config, checkpoint, state = classifier
    torch.save(dict(state_dict=state['raw']), 'one.pth')
    image = 'data/val/a/0.jpg'
    for tool, args in (
            ('test', [config, 'one.pth', '--out', 'x.pkl']), ('knn', [config, 'one.pth']),
            ('predict', [image, '--model', config, '--checkpoint', 'one.pth', '--out-dir', 'x']),
            ('visualize', [config, 'one.pth', image, '--out-dir', 'x']),
            ('export', [config, 'one.pth', '--out', 'x']), ('publish_model', ['one.pth', 'x']),
            ('convert_checkpoint', ['one.pth', 'x', '--to', 'hf', '--config', config])):
        with pytest.raises(SystemExit) as status:
            load_tool(tool).main([*args, '--weights', 'ema'])
        assert status.value.code == 2
        error = capsys.readouterr().err
        assert 'one.pth was saved without EMA weights' in error and error.count('\n') == 1, tool
    assert not list(Path().glob('x*'))
