"""Exported networks give PyTorch's numbers for any batch size, or nothing is written."""
import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from nepa_mm.checkpoints.loading import load_strict

from .tiny_runs import load_tool, save_classifier, save_pretraining, save_segmentor

tool = load_tool('export')
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('onnx', 'onnxscript', 'onnxruntime')),
    reason='needs the extra `export`')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def classifier():
    """Config, checkpoint and the model itself, with weights that matter."""
    config, checkpoint = save_classifier()
    model = MODELS.build(Config.fromfile(config).model).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return config, checkpoint, model


@needs_onnx
def test_onnx(classifier):
    from onnxruntime import InferenceSession
    config, checkpoint, model = classifier
    tool.main([config, checkpoint, '--size', '28', '42', '--out', 'a.onnx'])
    session = InferenceSession('a.onnx')
    for batch in (1, 4):
        image = torch.randn(batch, 3, 28, 42)
        logits, = session.run(None, dict(image=image.numpy()))
        assert torch.allclose(torch.from_numpy(logits), model(image), atol=1e-4)
    assert sorted(path.name for path in Path().glob('*.onnx*')) == ['a.onnx']


@pytest.mark.parametrize('size', [(28, 42), (14, 14)])
def test_torch_export(classifier, size):
    config, checkpoint, model = classifier
    tool.main([config, checkpoint, '--format', 'torch-export', '--size', *map(str, size)])
    program = torch.export.load(f'classify_{size[0]}x{size[1]}.pt2').module()
    for batch in (1, 4):
        image = torch.randn(batch, 3, *size)
        assert torch.allclose(program(image), model(image), atol=1e-4)


def test_other_models():
    """A pretraining model gives its tokens, a segmentor its score maps."""
    config = save_pretraining()
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), 'a.pth')
    tool.main([config, 'a.pth', '--format', 'torch-export', '--size', '28', '42', '--out', 'a.pt2'])
    assert torch.export.load('a.pt2').module()(torch.randn(2, 3, 28, 42)).shape == (2, 7, 32)
    if importlib.util.find_spec('mmseg'):
        tool.main([*save_segmentor(), '--format', 'torch-export', '--size', '28', '28', '--out',
                   'b.pt2'])
        assert torch.export.load('b.pt2').module()(torch.randn(2, 3, 28, 28)).shape == (2, 2, 2, 2)


def test_refusals(classifier, capsys, monkeypatch):
    config, checkpoint, model = classifier

    def refuse(*args):
        with pytest.raises(SystemExit):
            tool.main([config, checkpoint, *args, '--out', 'out/a'])
        assert not list(Path('out').glob('*'))
        return capsys.readouterr().err

    flags = ['--format', 'torch-export', '--size', '28', '28']
    assert 'not a multiple of the patch' in refuse('--format', 'torch-export', '--size', '28', '30')
    wrong = lambda model, image, file, meta: lambda x: model(x) + 1e-2    # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(tool, 'export_torch', wrong)
        assert 'differs from PyTorch by' in refuse(*flags)
    with monkeypatch.context() as patch:
        patch.setattr(tool.importlib.util, 'find_spec', lambda name: None)
        assert 'run: pip install onnx onnxscript onnxruntime' in refuse('--size', '28', '28')
    torch.save(dict(state_dict={'head.fc.weight': torch.zeros(5, 32)}), checkpoint)
    assert 'it lacks backbone.cls_token' in refuse(*flags)
    with pytest.raises(ValueError, match='another network'):
        load_strict(model, checkpoint)
