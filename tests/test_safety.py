"""What a stranger supplies is not executed: through the commands that a user types."""
import functools
import http.server
import json
import threading
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from mmpretrain import FeatureExtractor
from mmseg.apis import MMSegInferencer
from safetensors.torch import load_file

from nepa_mm.checkpoints.huggingface import to_published
from nepa_mm.checkpoints.huggingface_config import DEFAULTS
from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.safe_load import safe_load

from .faults.hostile import Call, tensor, zipped
from .test_convert import SMALL, build, convert, write_published
from .tiny_runs import (
    refused,
    run_script,
    run_train,
    save_classifier,
    save_image,
    save_pretraining,
    save_segmentor,
)


def call_by_getattr():
    """Names that mmengine and torch allow, and that run any code together."""
    names = Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__')
    evaluate = Call(getattr, Call(Call(getattr, names, 'get'), '__builtins__'), 'get')
    return Call(torch._tensor._rebuild_from_type_v2, Call(evaluate, 'eval'), torch.Tensor,
                ('open("pwned", "w")',), {})


PRETRAIN = ['train.py', 'pretrain.py', '--work-dir', 'w']
COMMANDS = dict(
    resume=[*PRETRAIN, '--resume', 'evil.pth'],
    load_from=[*PRETRAIN, '--cfg-options', 'load_from=evil.pth', 'resume=False'],
    init_cfg=[*PRETRAIN, '--cfg-options', 'model.head.init_cfg.type=Pretrained',
              'model.head.init_cfg.checkpoint=evil.pth', 'resume=False'],
    test=['test.py', 'classify.py', 'evil.pth'],
    predict=['predict.py', '--model', 'classify.py', '--checkpoint', 'evil.pth',
             'data/val/a/0.jpg'],
    publish=['publish_model.py', 'evil.pth', 'out'])


@pytest.mark.parametrize('command', COMMANDS)
def test_a_pickle_of_allowed_names_runs_nothing(folder, command):
    save_pretraining()
    _, honest = save_classifier()
    torch.save(dict(torch.load(honest), meta=dict(epoch=0, iter=0), x=call_by_getattr()),
               'evil.pth')
    code, said = run_script(*COMMANDS[command], cwd=folder)
    assert code == 2 and 'Traceback' not in said, said
    assert said.count('error: ') == 1 and 'can be read safely: it holds torch._tensor.' in said
    assert not Path('pwned').exists()


def test_addresses_are_read_as_safely(folder, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', 'torch')
    save_pretraining()
    torch.save(dict(state_dict=dict(a=torch.ones(1)), x=call_by_getattr()), 'evil.pth')
    torch.save(dict(state_dict=dict(a=torch.ones(1))), 'good.pth')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        assert read_checkpoint(f'{address}/good.pth')['state_dict']['a'] == 1
        assert Path('torch/hub/checkpoints/good.pth').is_file()
        for source in (f'{address}/none.pth', f'{address}/evil.pth'):
            code, said = run_script('train.py', 'pretrain.py', '--cfg-options', 'resume=False',
                                    f'load_from={source}', cwd=folder)
            assert code == 2 and said.count('error: ') == 1 and 'Traceback' not in said, said
    finally:
        server.shutdown()
    assert not Path('pwned').exists()
    assert {loader.__module__ for loader in CheckpointLoader._schemes.values()} == {
        'nepa_mm.checkpoints.io'}


def test_texts_of_a_config_are_not_evaluated(folder):
    save_pretraining()
    run_train(['pretrain.py', '--work-dir', 'w'])
    run = torch.load('w/epoch_1.pth', weights_only=False)
    code = 'open("pwned", "w")'
    run['meta']['config'] = run['meta']['cfg'] = run['message_hub']['runtime_info']['cfg'] = code
    torch.save(run, 'evil.pth')
    code, said = run_script(*COMMANDS['resume'], '--cfg-options', 'train_cfg.max_epochs=2',
                            cwd=folder)
    assert code == 0 and Path('w/epoch_2.pth').is_file(), said
    config, weights = save_segmentor()
    torch.save(dict(torch.load(weights), **{key: run[key] for key in ('meta', 'message_hub')}),
               'evil.pth')
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        MMSegInferencer(None, 'evil.pth')
    assert not Path('pwned').exists()


def test_features_of_a_strangers_checkpoint(folder):
    config, _ = save_classifier()
    torch.save(dict(state_dict=dict(a=torch.ones(1)), x=call_by_getattr()), 'evil.pth')
    with pytest.raises(ValueError, match='can be read safely'):
        FeatureExtractor(config, pretrained='evil.pth')
    assert not Path('pwned').exists()


def published(folder, **changes):
    init_default_scope('mmpretrain')
    config = DEFAULTS | SMALL | dict(model_type='vit_nepa', id2label={'0': 'a', '1': 'b'})
    return write_published(folder, config | changes, to_published(build(config, 2).state_dict()))


def test_load_from_a_published_folder(folder):
    published(folder / 'released')
    cfg = Config.fromfile(save_pretraining())
    cfg.model.backbone.arch = dict(
        embed_dims=48, num_layers=2, num_heads=4, feedforward_channels=96)
    cfg.model.backbone.update(patch_size=14, layer_scale_init_value=1e-5, qk_norm=None)
    cfg.dump('pretrain.py')
    code, said = run_script(*PRETRAIN, '--cfg-options', 'load_from=released', 'resume=False',
                            'optim_wrapper.optimizer.lr=0', cwd=folder)
    assert code == 0, said
    trained = torch.load('w/epoch_1.pth', weights_only=False)['state_dict']
    loaded = load_file('released/model.safetensors')
    assert torch.equal(trained['backbone.cls_token'], loaded['vit_nepa.embeddings.cls_token'])


@pytest.mark.parametrize('name', [
    '"""+open("pwned", "w").name+"""', "'+open('pwned', 'w').name+'", 'a\\', '\\x', 'a\nb = 1', 'ö',
    "{{$NOWHERE:'+open('pwned','w').name+'}}"], ids=ascii)
def test_names_in_a_written_config_are_texts(folder, name):
    released = published(folder / name, id2label={'0': name, '1': 'b'})
    convert([str(released), 'out.safetensors'])
    cfg = Config.fromfile('out.py')
    assert list(cfg.train_dataloader.dataset.metainfo.classes) == [name, 'b']
    assert not Path('pwned').exists()


def test_numbers_that_no_network_has_are_refused(folder):
    released = published(folder / 'released')
    config = json.loads((released / 'config.json').read_text())
    for key, value in dict(rope_theta=0, layer_norm_eps=-1e-6, hidden_dropout_prob=1.5,
                           drop_path_prob=-0.1, pos_embed_jitter=0.5, image_size=2 ** 30,
                           num_attention_heads=-4).items():
        (released / 'config.json').write_text(json.dumps(config | {key: value}))
        with refused(f'^{key} cannot be {value} in a published config.* at least .* below'):
            convert(['released', 'out.safetensors'])
    tensors = load_file(released / 'model.safetensors')
    tensors['classifier.bias'] = torch.tensor([1., float('nan')])
    write_published(released, config, tensors)
    with refused('The tensor head.fc.bias holds NaN or infinity'):
        convert(['released', 'out.safetensors'])


def test_memory_is_bounded_by_the_file(folder):
    head, tail = b'\x80\x02}X\x0a\0\0\0state_dict}(', b'us.'
    zipped('good.pth', head + tensor(16, 0, [4, 2], [1, 4]) + tail, [bytes(64)])
    assert safe_load('good.pth')['state_dict']['a'].shape == (4, 2)
    for claim in [(16, 0, [1 << 40], [0]), (1 << 40, 0, [1], [1]), (16, 9, [8], [1])]:
        zipped('bad.pth', head + tensor(*claim) + tail, [bytes(64)])
        with pytest.raises(ValueError, match='can be read safely: .*(tensor|entry)'):
            read_checkpoint('bad.pth')
    for name, numel, content in (('bomb.pth', 1 << 20, bytes(4 << 20)),
                                 ('small.pth', 16, bytes(range(64)))):
        zipped(name, head + tensor(numel, 0, [1], [1]) + tail, [content], zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match='it is compressed, which torch.save never does'):
            read_checkpoint(name)


@pytest.mark.parametrize('call', [Counter, set, OrderedDict, torch.Size])
def test_a_tensor_of_any_length_is_not_iterated(folder, call):
    torch.save(dict(state_dict=Call(call, torch.ones(1).expand(1000))), 'bad.pth')
    with pytest.raises(ValueError, match='can be read safely'):
        read_checkpoint('bad.pth')


def test_a_class_that_the_user_trusts(folder, monkeypatch):
    torch.save(dict(state_dict=dict(a=torch.ones(1)), x=Trusted()), 'own.pth')
    with pytest.raises(ValueError, match='it holds tests.test_safety.Trusted, .*add_safe_globals'):
        read_checkpoint('own.pth')
    torch.serialization.add_safe_globals([Trusted])
    try:
        assert read_checkpoint('own.pth')['x'].value == 3
    finally:
        torch.serialization.clear_safe_globals()


class Trusted:
    def __init__(self):
        self.value = 3


def test_files_of_old_torch(folder):
    save_image(Path('x.png'))
    state = dict(a=torch.randn(3, 4), b=torch.ones(2, dtype=torch.bfloat16))
    state['c'] = state['a'].T
    torch.save(dict(state_dict=state), 'old.pth', _use_new_zipfile_serialization=False)
    read = read_checkpoint('old.pth')['state_dict']
    assert all(torch.equal(read[key], value) for key, value in state.items())
    assert read['c'].data_ptr() == read['a'].data_ptr()
