"""Starting from another run: what is read, chosen, matched, reported and refused."""
import json
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from mmengine.runner import CheckpointLoader
from safetensors.torch import load_file, save_file

from nepa_mm.checkpoints.hub import sha256
from nepa_mm.checkpoints.huggingface import to_published
from nepa_mm.checkpoints.io import locate, read_checkpoint, save_weights
from nepa_mm.checkpoints.loading import load_pretrained, select_weights
from nepa_mm.models.vit import NEPAViT
from nepa_mm.utils.files import atomic_write

from .conftest import TINY
from .tiny_runs import load_tool


def vit(**kwargs):
    return NEPAViT(arch=TINY, **kwargs)


def weights_of(model):
    return {f'backbone.{key}': value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def trained(tmp_path):
    """A checkpoint as an EMA run writes it: state_dict is the average."""
    ema, raw = vit(), vit()
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(meta={}, state_dict=weights_of(ema),
                    ema_state_dict={f'module.{k}': v for k, v in weights_of(raw).items()}
                    | {'steps': torch.tensor(3)}), path)
    return path, ema, raw


@pytest.mark.parametrize('weights, which', [(None, 0), ('ema', 0), ('raw', 1)])
def test_ema_or_raw(trained, weights, which):
    path, *models = trained
    model = vit(init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.',
                              weights=weights))
    model.init_weights()
    expected = models[which].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert not torch.equal(models[0].cls_token, models[1].cls_token)


def test_report(trained, caplog):
    """Affine QK-norm and fc_norm are new and start as no-ops; nothing else is."""
    model = vit(qk_norm='affine', out_type='avg_featmap', fc_norm=True)
    matched, new, unused = load_pretrained(model, trained[0], 'backbone')
    norms = [f'layers.{i}.attn.{n}_norm.weight' for i in range(3) for n in 'qk']
    assert sorted(new) == sorted(norms + ['fc_norm.weight', 'fc_norm.bias']) and not unused
    assert len(matched) + len(new) == len(model.state_dict())
    assert all((model.get_parameter(name) == 1).all() for name in norms)

    matched, new, unused = load_pretrained(vit(final_norm=False), trained[0], 'backbone.')
    assert sorted(unused) == ['norm.bias', 'norm.weight'] and not new


def test_safetensors(trained, tmp_path):
    _, ema, _ = trained
    save_file(weights_of(ema), tmp_path / 'model.safetensors')
    model = vit()
    load_pretrained(model, tmp_path / 'model.safetensors', 'backbone.')
    assert torch.equal(model.layers[2].mlp.fc2.weight, ema.layers[2].mlp.fc2.weight)


def test_refusals(trained, tmp_path):
    path, ema, _ = trained
    with pytest.raises(FileNotFoundError, match='nowhere.pth does not exist'):
        read_checkpoint(tmp_path / 'nowhere.pth')
    with pytest.raises(ValueError, match="No tensor of .* below the prefix 'encoder' fits"):
        load_pretrained(vit(), path, 'encoder')
    with pytest.raises(ValueError, match=r'has shape \(32, 3, 14, 14\), but \(32, 3, 7, 7\)'):
        load_pretrained(vit(patch_size=7), path, 'backbone.')
    with pytest.raises(ValueError, match="weights must be one of .* got 'best'"):
        load_pretrained(vit(), path, 'backbone.', weights='best')
    with pytest.raises(ValueError, match='was saved without EMA weights'):
        select_weights(dict(state_dict={}), 'ema')

    torn = tmp_path / 'torn.pth'
    torn.write_bytes(path.read_bytes()[:5000])
    (tmp_path / 'torn.safetensors').write_bytes(b'\x40\0\0\0')
    for file in (torn, tmp_path / 'torn.safetensors'):
        with pytest.raises(ValueError, match='not a checkpoint that can be read safely'):
            read_checkpoint(file)
    torch.save(dict(epoch=3, state_dict=dict(step=3)), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='contains no state dict of tensors'):
        read_checkpoint(tmp_path / 'other.pth')


class Payload:
    """Unpickling this would write a file."""

    def __reduce__(self):
        return open, ('payload_ran', 'w')


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps(dict(state_dict=Payload())))
    torch.save(dict(state_dict=dict(w=torch.ones(1)), meta=Payload()), tmp_path / 'evil2.pth')
    for name, why in (('evil.pth', 'Unsupported operand'),
                      ('evil2.pth', 'it holds _?io.open, .*add_safe_globals')):
        with pytest.raises(ValueError, match=f'can be read safely: {why}'):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / 'payload_ran').exists()


def test_a_refused_checkpoint_changes_nothing(trained):
    model = vit(patch_size=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        load_pretrained(model, trained[0], 'backbone.')
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def published(tmp_path):
    """A folder as published, with raw and averaged weights, and the two models."""
    raw, ema = vit(), vit()
    folder = tmp_path / 'published'
    folder.mkdir()
    (folder / 'config.json').write_text('{}')
    save_file({k: v.clone() for k, v in to_published(weights_of(raw)).items()},
              folder / 'model.safetensors')
    torch.save(to_published(weights_of(ema)), folder / 'pytorch_model_ema.bin')
    return folder, raw, ema


@pytest.mark.parametrize('weights', [None, 'raw', 'ema'])
@pytest.mark.parametrize('file', ['', 'model.safetensors', 'pytorch_model_ema.bin'])
def test_published(published, file, weights):
    """init_cfg takes a published folder or file; a file holds one of the two sets."""
    folder, raw, ema = published
    only = dict([('model.safetensors', 'raw'), ('pytorch_model_ema.bin', 'ema')]).get(file)
    model = vit(init_cfg=dict(type='Pretrained', checkpoint=str(folder / file),
                              prefix='backbone.', weights=weights))
    if only and weights not in (None, only):
        with pytest.raises(ValueError, match=f"weights='{weights}' is not in it"):
            model.init_weights()
        return
    model.init_weights()
    expected = (ema if (only or weights) == 'ema' else raw).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_mmengine_loads_them(published):
    """So `load_from`, get_model(pretrained=...) and the inferencers do."""
    folder, raw, _ = published
    for name in ('model.safetensors', 'pytorch_model_ema.bin'):
        tensors = CheckpointLoader.load_checkpoint(str(folder / name), 'cpu')['state_dict']
        assert tensors.keys() == weights_of(raw).keys()


def test_incomplete_folders(published):
    folder, _, _ = published
    (folder / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no model.safetensors and no pytorch_model.bin'):
        locate(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='has no config.json'):
        read_checkpoint(folder)


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out: large files are links to blobs named by hash."""
    folder, _, _ = published

    def hf_hub_download(repo, name, revision=None):
        if (repo, revision) != ('owner/nepa', 'v1') or not (folder / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        blob = tmp_path / 'blobs' / sha256(folder / name)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, blob)
        link = tmp_path / 'snapshot' / name
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        return str(link)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
    return tmp_path / 'snapshot'


def test_hub(hub, published, monkeypatch):
    _, raw, ema = published
    for weights, model in (('raw', raw), ('ema', ema)):
        tensors = read_checkpoint('hf://owner/nepa@v1', weights=weights)['state_dict']
        assert all(torch.equal(tensors[key], value) for key, value in weights_of(model).items())
    tensors = CheckpointLoader.load_checkpoint('hf://owner/nepa@v1', 'cpu')['state_dict']
    assert torch.equal(tensors['backbone.cls_token'], raw.cls_token)

    with pytest.raises(ValueError, match='has no model.safetensors and no pytorch_model.bin'):
        locate('hf://owner/other')
    with pytest.raises(ValueError, match='not an address of the form hf://owner/name'):
        locate('hf://nepa')
    original = huggingface_hub.hf_hub_download

    def damaged(*args, **kwargs):
        file = original(*args, **kwargs)
        with open(file, 'r+b') as opened:
            opened.write(b'x')
        return file

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', damaged)
    with pytest.raises(ValueError, match='is corrupt: its SHA-256 is not'):
        locate('hf://owner/nepa@v1')


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match='the Hugging Face Hub does not answer'):
        read_checkpoint('hf://owner/nepa')


def test_atomic_write(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / 'a') as file:
        file.write_text('half')
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    save_weights(dict(w=torch.ones(1)), tmp_path / 'a.safetensors', epoch=3)
    assert read_checkpoint(tmp_path / 'a.safetensors')['meta'] == dict(epoch=3)
    with pytest.raises(FileExistsError, match='exists already'):
        save_weights(dict(w=torch.zeros(1)), tmp_path / 'a.safetensors')
    assert read_checkpoint(tmp_path / 'a.safetensors')['state_dict']['w'] == 1
    assert [path.name for path in tmp_path.iterdir()] == ['a.safetensors']


@pytest.mark.parametrize('weights, which', [(None, 0), ('ema', 0), ('raw', 1)])
def test_publish_model(trained, tmp_path, weights, which):
    """Weights and what describes them stay, the state of the run goes."""
    path, *models = trained
    publish = load_tool('publish_model').main
    run = torch.load(path) | dict(optimizer=dict(lr=1.), message_hub={}, param_schedulers=[])
    run['meta'] = dict(cfg="model = dict(type='NEPA')", epoch=7, seed=1,
                       dataset_meta=dict(classes=['a', 'b']))
    torch.save(run, path)
    flags = ['--weights', weights] if weights else []
    out = publish([str(path), str(tmp_path / 'nepa'), *flags])
    assert out == publish([str(path), str(tmp_path / 'nepa'), *flags])      # same name, same bytes
    name, _, digest = out.rpartition('-')
    assert digest == sha256(out)[:8] + '.safetensors' and name[-8:].isdigit()
    tensors, expected = load_file(out), weights_of(models[which])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert read_checkpoint(out)['meta'] == dict(
        weights=dict(state_dict=weights or 'ema'), model=dict(type='NEPA'), epoch=7,
        dataset_meta=dict(classes=['a', 'b']))
    assert json.dumps(read_checkpoint(out)['meta'])
    assert len(list(tmp_path.glob('nepa*'))) == 1
