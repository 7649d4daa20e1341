"""Starting from another run: what is read, chosen, matched, reported and refused."""
import pickle

import pytest
import torch
from safetensors.torch import save_file

from nepa_mm.backbone import NEPAViT
from nepa_mm.checkpoint import load_pretrained, read_checkpoint, select_weights

from .conftest import TINY


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
    with pytest.raises(ValueError, match="No tensor of .* below the prefix 'encoder.' fits"):
        load_pretrained(vit(), path, 'encoder')
    with pytest.raises(ValueError, match=r'has shape \(32, 3, 14, 14\), but \(32, 3, 7, 7\)'):
        load_pretrained(vit(patch_size=7), path, 'backbone.')
    with pytest.raises(ValueError, match="weights must be one of .* got 'best'"):
        load_pretrained(vit(), path, 'backbone.', weights='best')
    with pytest.raises(ValueError, match='was saved without an average'):
        select_weights(dict(state_dict={}), 'ema')

    torn = tmp_path / 'torn.pth'
    torn.write_bytes(path.read_bytes()[:5000])
    (tmp_path / 'torn.safetensors').write_bytes(b'\x40\0\0\0')
    for file in (torn, tmp_path / 'torn.safetensors'):
        with pytest.raises(ValueError, match='no checkpoint that can be read safely'):
            read_checkpoint(file)
    torch.save(dict(epoch=3, state_dict=dict(step=3)), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='holds no state dict of tensors'):
        read_checkpoint(tmp_path / 'other.pth')


class Payload:
    """Unpickling this would write a file."""

    def __reduce__(self):
        return open, ('payload_ran', 'w')


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps(dict(state_dict=Payload())))
    torch.save(dict(state_dict=dict(w=torch.ones(1)), meta=Payload()), tmp_path / 'evil2.pth')
    for name in ('evil.pth', 'evil2.pth'):
        with pytest.raises(ValueError, match='read safely'):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / 'payload_ran').exists()


def test_a_refused_checkpoint_changes_nothing(trained):
    model = vit(patch_size=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        load_pretrained(model, trained[0], 'backbone.')
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
