"""Published weights to ours and back: every tensor, every option, and what is refused."""
import contextlib
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nepa_mm.checkpoints.huggingface import (
    check_and_complete,
    fold_layer_scale,
    from_published,
    to_published,
)
from nepa_mm.checkpoints.huggingface_config import (
    DEFAULTS,
    backbone_cfg,
    complete_config,
    model_cfg,
    published_config,
)
from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.recorded_config import recorded_model

from .test_parity import CASES, assert_agrees
from .tiny_runs import TOOLS, load_tool, run_test

convert = load_tool('convert_checkpoint').main
SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
             patch_size=14)
# what the format allows beyond the parity cases
OPTIONS = [
    dict(), dict(qk_norm=True, qk_norm_affine=True, qk_norm_bias=True),
    dict(layerscale_value=None), dict(qkv_bias=False), dict(use_gated_mlp=True),
    dict(use_gated_mlp=True, hidden_act='gelu_new', qkv_bias=False, layerscale_value=None),
    dict(hidden_act='quick_gelu'), dict(num_channels=1), dict(patch_size=[8, 4]),
    dict(num_attention_heads=3, intermediate_size=50, is_causal=False, rope_theta=10000.),
    dict(pos_embed_shift=0.5, pos_embed_jitter=1.5, pos_embed_rescale=None, layer_norm_eps=1e-6),
    dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, drop_path_prob=0.3),
    dict(hidden_act='swish', image_size=448)]


def build(config, num_classes):
    torch.manual_seed(0)
    model = MODELS.build(model_cfg(config, num_classes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_published(folder, config, state_dict, name='model.safetensors'):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    if name.endswith('.safetensors'):
        save_file({k: v.clone() for k, v in state_dict.items()}, folder / name)
    else:
        torch.save(state_dict, folder / name)
    return folder


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.fixture
def published(tmp_path):
    """A published classifier with affine QK-norm, and its logits for an image."""
    config = DEFAULTS | SMALL | dict(
        qk_norm=True, qk_norm_affine=True, add_pooling_layer=True, is_causal=False,
        model_type='vit_nepa', id2label={'0': 'cat', '1': 'dog'}, torch_dtype='float32')
    model = build(config, 2)
    image = torch.rand(2, 3, 56, 42)
    return write_published(tmp_path / 'published', config, to_published(model.state_dict())), \
        image, model(image)


def logits_of(config, checkpoint, image):
    model = MODELS.build(Config.fromfile(config).model).eval()
    model.load_state_dict(read_checkpoint(checkpoint)['state_dict'])
    return model(image)


@pytest.mark.parametrize('folder', CASES, ids=lambda path: path.name)
@pytest.mark.parametrize('classifier', [True, False])
def test_parity_cases(folder, classifier, tmp_path, capsys):
    """Through both files and back: every bit, the config, and the reference's logits."""
    config = json.loads((folder / 'case.json').read_text())['config'] | dict(model_type='vit_nepa')
    weights = load_file(folder / 'weights.safetensors')
    if not classifier:
        weights = {key: value for key, value in weights.items() if key.startswith('vit_nepa.')}
    source = write_published(tmp_path / 'a', config, weights)
    convert([str(source), str(tmp_path / 'b.safetensors')])
    convert([str(tmp_path / 'b.safetensors'), str(tmp_path / 'c'), '--to', 'hf'])
    assert_equal(load_file(tmp_path / 'c' / 'model.safetensors'), weights)
    with safe_open(tmp_path / 'c' / 'model.safetensors', 'pt') as file:
        assert file.metadata()['format'] == 'pt'        # which transformers asks for
    assert json.loads((tmp_path / 'c' / 'config.json').read_text()) == config
    out = capsys.readouterr().out
    assert f'mapped: {len(weights)} published tensors' in out and 'dropped: none' in out
    if classifier:
        golden = load_file(folder / 'golden.safetensors')
        logits = logits_of(tmp_path / 'b.py', tmp_path / 'b.safetensors', golden['in/pixel_values'])
        assert_agrees(logits, golden['out/logits'], 'logits')


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('num_classes', [7, None])
def test_options(options, num_classes):
    """Without stored fields, too: config -> model -> config -> the same model and tensors."""
    config = DEFAULTS | SMALL | options
    if num_classes:
        config['add_pooling_layer'] = 'image_size' in options
    model = model_cfg(config, num_classes)
    assert model_cfg(published_config(model), num_classes) == model
    assert published_config(model, stored=config) == config
    state_dict = build(config, num_classes).state_dict()
    there = to_published(state_dict)
    back = from_published(there)
    assert_equal(state_dict, back)
    assert_equal(there, to_published(back))
    assert not check_and_complete(back, model)


@pytest.mark.parametrize('arch', ['base', 'large'])
def test_released_sizes(arch):
    """The configs of this package, and a config.json, describe one network."""
    backbone = dict(type='NEPAViT', arch=arch, causal=False, qk_norm='affine',
                    out_type='avg_featmap', fc_norm=True)
    config = published_config(dict(type='ImageClassifier', backbone=backbone,
                                   head=dict(type='LinearClsHead', num_classes=1000)))
    large = arch == 'large'
    assert config['hidden_size'] == (1024 if large else 768)
    assert config['num_hidden_layers'] == (24 if large else 12)
    assert config['qk_norm'] and config['qk_norm_affine'] and not config['is_causal']
    assert len(config['id2label']) == 1000
    with torch.device('meta'):
        ours, theirs = (MODELS.build(cfg) for cfg in (backbone, backbone_cfg(config)))
    assert ({k: v.shape for k, v in ours.state_dict().items()}
            == {k: v.shape for k, v in theirs.state_dict().items()})


def test_missing_fields(tmp_path, capsys):
    """The format's own defaults take their place, and are named."""
    config = SMALL | dict(model_type='vit_nepa')
    weights = to_published(build(config, None).state_dict())
    source = write_published(tmp_path / 'a', config, weights)
    convert([str(source), str(tmp_path / 'b.safetensors')])
    out = capsys.readouterr().out
    assert 'is_causal=True' in out and 'rope_theta=100.0' in out and 'hidden_size' not in out
    convert([str(tmp_path / 'b.safetensors'), str(tmp_path / 'c'), '--to', 'hf'])
    assert json.loads((tmp_path / 'c' / 'config.json').read_text()) == config


def test_pickles_and_ema(published, tmp_path):
    """pytorch_model.bin and the average beside it; bf16 stays bf16."""
    folder, _, _ = published
    raw = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    torch.save(raw, folder / 'pytorch_model.bin')
    ema = {key: (value + 1).bfloat16() for key, value in raw.items()}
    torch.save(ema, folder / 'pytorch_model_ema.bin')
    convert([str(folder), str(tmp_path / 'raw.safetensors')])
    convert([str(folder), str(tmp_path / 'ema.safetensors'), '--weights', 'ema'])
    for name, expected in dict(raw=raw, ema=ema).items():
        checkpoint = read_checkpoint(tmp_path / f'{name}.safetensors')
        assert_equal(checkpoint['state_dict'], from_published(expected))
        assert checkpoint['meta']['weights'] == dict(state_dict=name)
        assert checkpoint['meta']['dataset_meta'] == dict(classes=['cat', 'dog'])


def test_own_checkpoint(tmp_path):
    """A checkpoint of a run records its config; the average is taken unless raw is asked for."""
    model = build(DEFAULTS | SMALL, None)
    raw = model.state_dict()
    ema = {key: value + 1 for key, value in raw.items()}
    text = f'model = {model_cfg(DEFAULTS | SMALL)}'
    torch.save(dict(meta=dict(cfg=text), state_dict=ema,
                    ema_state_dict={f'module.{k}': v for k, v in raw.items()}), tmp_path / 'a.pth')
    for name, expected, flag in (
            ('raw', raw, ['--weights', 'raw']), ('ema', ema, []),
            ('same', ema, ['--weights', 'ema'])):
        convert([str(tmp_path / 'a.pth'), str(tmp_path / name), '--to', 'hf', *flag])
        assert_equal(load_file(tmp_path / name / 'model.safetensors'), to_published(expected))
    assert json.loads((tmp_path / 'raw' / 'config.json').read_text())['model_type'] == 'vit_nepa'


def test_fold_layer_scale(published, tmp_path):
    folder, image, logits = published
    convert([str(folder), str(tmp_path / 'b.safetensors'), '--fold-layer-scale'])
    assert_agrees(logits_of(tmp_path / 'b.py', tmp_path / 'b.safetensors', image), logits, 'folded')
    convert([str(tmp_path / 'b.safetensors'), str(tmp_path / 'c'), '--to', 'hf'])
    config = json.loads((tmp_path / 'c' / 'config.json').read_text())
    assert config['layerscale_value'] is None and config['id2label'] == {'0': 'cat', '1': 'dog'}
    assert not [key for key in load_file(tmp_path / 'c' / 'model.safetensors') if 'lambda' in key]
    convert([str(folder), str(tmp_path / 'd.safetensors')])
    convert([str(tmp_path / 'd.safetensors'), str(tmp_path / 'e'), '--to', 'hf',
             '--fold-layer-scale'])
    assert_equal(*(load_file(tmp_path / name / 'model.safetensors') for name in 'ce'))
    with pytest.raises(ValueError, match='no LayerScale to fold'):
        fold_layer_scale(read_checkpoint(tmp_path / 'b.safetensors')['state_dict'])


def test_missing_qk_norm(published, tmp_path, capsys):
    """Base pretraining weights under the affine fine-tuning config: ones, and said so."""
    folder, _, _ = published
    weights = load_file(folder / 'model.safetensors')
    plain = {key: value.clone() for key, value in weights.items()
             if '_norm.weight' not in key or 'fc_norm' in key}
    save_file(plain, folder / 'model.safetensors')
    convert([str(folder), str(tmp_path / 'b.safetensors')])
    assert 'backbone.layers.1.attn.k_norm.weight' in capsys.readouterr().out
    tensors = read_checkpoint(tmp_path / 'b.safetensors')['state_dict']
    assert all((tensors[f'backbone.layers.{i}.attn.{n}_norm.weight'] == 1).all()
               for i in range(2) for n in 'qk')


def test_evaluation(published, tmp_path, image_folder, monkeypatch, capsys):
    """tools/test.py takes the converted pair, and the published folder as it is."""
    monkeypatch.chdir(tmp_path)
    folder, _, _ = published
    convert([str(folder), 'b.safetensors'])
    Path('test.py').write_text(f"""
_base_ = './b.py'
test_dataloader = dict(num_workers=0, persistent_workers=False, batch_size=4, dataset=dict(
    _delete_=True, type='CustomDataset', data_root={str(image_folder)!r}, data_prefix='val',
    pipeline=_base_.test_pipeline))
test_evaluator = dict(topk=1)
""")
    metrics = [run_test(['test.py', checkpoint]) for checkpoint in ('b.safetensors', str(folder))]
    assert metrics[0] == metrics[1] and 'accuracy/top1' in metrics[0]

    weights = load_file(folder / 'model.safetensors')
    save_file({k: v for k, v in weights.items() if 'vit_nepa' in k}, 'headless.safetensors')
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_test(['test.py', 'headless.safetensors'])
    assert 'untrained weights cannot predict: backbone.fc_norm.weight' in capsys.readouterr().err


def refuse(capsys, *args):
    with pytest.raises(SystemExit):
        convert([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    return error


def test_refusals(published, tmp_path, capsys):
    folder, _, _ = published
    # copies, because safetensors maps the file, which is cut below
    weights = {k: v.clone() for k, v in load_file(folder / 'model.safetensors').items()}
    config = json.loads((folder / 'config.json').read_text())
    dst = tmp_path / 'out' / 'b.safetensors'

    def attempt(tensors=weights, **changes):
        source = write_published(tmp_path / 'c', config | changes, tensors)
        return refuse(capsys, source, dst)

    assert "hidden_act 'softplus' has no counterpart" in attempt(hidden_act='softplus')
    assert "model_type 'vit' is another architecture" in attempt(model_type='vit')
    assert "qkv_bias cannot be 'yes'" in attempt(qkv_bias='yes')
    assert 'rope_theta cannot be None' in attempt(rope_theta=None)
    assert 'no tensor backbone.layers.2.ln1.weight' in attempt(num_hidden_layers=3)
    assert 'is in the file, but not in the network' in attempt(num_hidden_layers=1)
    assert 'has shape (48, 3, 14, 14)' in attempt(patch_size=7)
    unknown = 'vit_nepa.encoder.layer.0.gate.weight'
    assert f'{unknown} belongs to no NEPA' in attempt(weights | {unknown: torch.ones(1)})
    key = 'vit_nepa.encoder.layer.0.attention.attention.key.weight'
    assert f'{key} is missing' in attempt({k: v for k, v in weights.items() if k != key})
    other = {'vit.encoder.layer.0.norm1.weight': torch.ones(4)}
    assert 'holds no published NEPA weights' in attempt(other)

    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:len(data) // 2])
    assert 'not a checkpoint that can be read safely' in refuse(capsys, folder, dst)
    (folder / 'config.json').unlink()
    assert 'need their config.json' in refuse(capsys, folder, dst)
    assert not dst.parent.exists()      # nothing was begun

    (tmp_path / 'c' / 'config.json').write_text(json.dumps(config))
    save_file(weights, tmp_path / 'c' / 'model.safetensors')
    convert([str(tmp_path / 'c'), str(dst)])
    assert 'exists already' in refuse(capsys, tmp_path / 'c', dst)
    assert sorted(path.name for path in dst.parent.iterdir()) == ['b.py', 'b.safetensors']
    capsys.readouterr()
    torch.save(dict(state_dict=weights | {'head.fc.weight': torch.ones(1)}), tmp_path / 'd.pth')
    assert refuse(capsys, tmp_path / 'd.pth', tmp_path / 'e', '--to', 'hf')
    assert not (tmp_path / 'e').exists()


@pytest.mark.parametrize('meta', [
    dict(cfg='model = __import__("os").mkdir("pwned")'),
    dict(cfg='import os\nos.mkdir("pwned")\nmodel = dict(type="NEPA", backbone=os)'),
    dict(cfg='model = dict(type="NEPA", backbone=dict(x=open("pwned", "w")))'),
    dict(cfg='model = dict(**dict(type="NEPA"))'), dict(cfg='model = ('), dict(cfg='lr = 1'),
    dict(cfg=7), dict(model=[]), dict(model=dict(type='NEPA')),
    dict(model=dict(type='os.mkdir', path='pwned')),
    dict(model=dict(type='NEPA', backbone=dict(type='os.mkdir', path='pwned'))),
    dict(model=dict(type='NEPA', backbone=dict(type='NEPAViT', act_cfg=dict(
        type='os.mkdir', path='pwned')))),
    dict(model=dict(type='NEPA', backbone=dict(type='NEPAViT'), head=dict(
        type='os.mkdir', path='pwned')))], ids=str)
@pytest.mark.parametrize('tool', ['convert_checkpoint', 'publish_model'])
def test_a_checkpoint_executes_nothing(meta, tool, tmp_path, monkeypatch, capsys):
    """Neither the text of its config nor the classes that it names."""
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=build(DEFAULTS | SMALL, None).state_dict(), meta=meta), 'a.pth')
    if tool == 'convert_checkpoint':
        assert refuse(capsys, 'a.pth', 'b', '--to', 'hf')
    else:
        with contextlib.suppress(SystemExit):       # it writes values, and builds nothing
            load_tool(tool).main(['a.pth', 'c'])
    assert not Path('pwned').exists() and not Path('b').exists()


def test_recorded_configs_are_read_without_executing_them():
    for file in TOOLS.parent.glob('configs/*/*.py'):
        cfg = Config.fromfile(file)
        if 'model' in cfg:
            meta = dict(config_text=cfg.pretty_text)
            assert recorded_model(meta, '') == cfg.model.to_dict(), file
    assert recorded_model({}, '') is None


def test_inexpressible_options():
    backbone = dict(type='NEPAViT', arch='tiny', out_type='avg_featmap', fc_norm=True)
    head = dict(type='LinearClsHead', num_classes=2, in_channels=192)
    for name, value in dict(final_norm=False, act_cfg=dict(type='HSwish'), out_indices=3,
                            out_type='cls_token', rope_theta=None, use_abs_pos_emb=True,
                            num_register_tokens=4, scan='snake').items():
        with pytest.raises(ValueError, match=f'{name}=.* cannot be expressed'):
            published_config(dict(type='ImageClassifier', backbone=backbone | {name: value},
                                  head=head))
    assert complete_config({}) == DEFAULTS
