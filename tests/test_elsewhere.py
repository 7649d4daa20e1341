"""Configs of ours where nobody imports nepa_mm first, inherited, dumped, and converted."""
import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from make_digit_scenes import write_digit_scenes
from nepa_mm.apis.input_spec import input_of, pipeline_of, preprocessor_config
from nepa_mm.checkpoints.io import read_checkpoint

from .conftest import REPO
from .tiny_runs import load_tool, run_test, run_train, save_image

FROM = "_base_ = [__import__('nepa_mm') and 'nepa_mm::{}']\n"
convert = load_tool('convert_checkpoint').main
EXAMPLE = dict(resize=256, crop=[224, 224], interpolation='bicubic', backend='pillow',
               mean=[127.5] * 3, std=[127.5] * 3, channel_order='RGB')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def python(*args):
    """A process that imports nothing of ours by itself."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


DIGITS = FROM.format('demo/digits_finetune.py') + """
model = dict(backbone=dict(init_cfg=None))
num_labels = 50
train_dataloader = dict(dataset=dict(num_labels=50))
val_dataloader = dict(dataset=dict(num_labels=50))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = dict(warmup=0, end=1)
"""


def test_mmpretrain_trains_and_tests_an_inherited_config():
    Path('a.py').write_text(DIGITS)
    tools = Path(mmpretrain.__file__).parent / '.mim' / 'tools'
    python(tools / 'train.py', 'a.py', '--work-dir', 'run')
    out = python(tools / 'test.py', 'run/a.py', 'run/epoch_1.pth', '--out', 'p.pkl')
    metrics = run_test(['a.py', 'run/epoch_1.pth'])     # as our own tools do
    assert f'accuracy/top1: {metrics["accuracy/top1"]:.4f}' in out
    assert len(pickle.loads(Path('p.pkl').read_bytes())) == 50


def test_apis_of_openmmlab_take_an_inherited_config():
    Path('a.py').write_text(DIGITS)
    out = python('-c', 'import mmpretrain; '
                 'print(type(mmpretrain.get_model("a.py", pretrained=False)).__name__)')
    assert 'ImageClassifier' in out


@pytest.mark.skipif(not find_spec('mmseg'), reason='needs mmseg')
def test_mmseg_takes_our_segmentors():
    """From the file itself, which inherits mmseg::, and inherited."""
    name = 'segmentation/nepa_vit-b_upernet_160k_ade20k-512x512.py'
    Path('a.py').write_text(FROM.format(name))
    for config in ('a.py', REPO / 'configs' / name):
        out = python('-c', 'import sys, mmseg; from mmengine import Config; '
                     f'cfg = Config.fromfile({str(config)!r}); cfg.dump("d.py"); '
                     'assert Config.fromfile("d.py")._cfg_dict == cfg._cfg_dict; print("read")')
        assert 'read' in out


@pytest.mark.skipif(not find_spec('mmseg'), reason='needs mmseg')
def test_tools_with_an_inherited_segmentor():
    write_digit_scenes('scenes', 4, 2)
    part = "dataset=dict(data_root='scenes')"
    Path('a.py').write_text(FROM.format('demo/digits_upernet.py') + f"""
model = dict(backbone=dict(init_cfg=None))
train_dataloader = dict(batch_size=2, num_workers=2, {part})
val_dataloader = dict({part})
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
param_scheduler = [dict(type='ConstantLR', factor=1., by_epoch=False)]
default_hooks = dict(checkpoint=dict(interval=2))
""")
    assert run_train(['a.py', '--work-dir', 'run']).iter == 2
    metrics = run_test(['a.py', 'run/iter_2.pth', '--show-dir', 'shown'])
    assert len(list(Path('shown').rglob('*.png'))) == 2
    tools = Path(find_spec('mmseg').origin).parent / '.mim' / 'tools'
    assert f'mIoU: {metrics["mIoU"]:.4f}' in python(tools / 'test.py', 'a.py', 'run/iter_2.pth')
    load_tool('predict').main(['scenes/images/validation/00000.jpg', '--model', 'a.py',
                               '--checkpoint', 'run/iter_2.pth'])


@pytest.mark.parametrize('file', sorted((REPO / 'configs').glob('[!_]*/*.py')),
                         ids=lambda file: file.stem)
def test_dumped_configs_are_the_same(file):
    """Inherited through the package, written to work_dirs, and read again."""
    Path('a.py').write_text(FROM.format(file.relative_to(REPO / 'configs')))
    cfg = Config.fromfile('a.py')
    cfg.dump('b.py')
    assert Config.fromfile('b.py').to_dict() == cfg.to_dict()
    Config.fromfile('b.py').dump('c.py')
    assert Path('b.py').read_text() == Path('c.py').read_text()


def test_tools_with_an_inherited_config(capsys):
    """knn, visualize, predict and export build what carries the scope of the package."""
    Path('a.py').write_text(DIGITS)
    init_default_scope('mmpretrain')
    model = MODELS.build(Config.fromfile('a.py').model)
    torch.save(dict(state_dict=model.state_dict()), 'a.pth')
    local = Path('b.py')
    local.write_text(DIGITS.replace(FROM.format('demo/digits_finetune.py'),
                                    f'_base_ = ["{REPO}/configs/demo/digits_finetune.py"]\n'))
    knn = load_tool('knn').main
    assert knn(['a.py', 'a.pth', '-k', '3']) == knn(['b.py', 'a.pth', '-k', '3'])
    save_image(Path('x.png'), (16, 16))
    load_tool('visualize').main(['a.py', 'a.pth', 'x.png', '--size', '16'])
    load_tool('export').main(['a.py', 'a.pth', '--format', 'torch-export', '--out', 'a.pt2'])
    files = {'nepa_mm.json': ''}
    torch.export.load('a.pt2', extra_files=files)
    assert json.loads(files['nepa_mm.json'])['input_size'] == [16, 16]
    assert run_test(['a.py', 'a.pth']) == run_test(['b.py', 'a.pth'])


def test_probe_with_an_inherited_config():
    """Its loaders carry the scope, too."""
    loader = ('dict(batch_size=25, num_workers=0, collate_fn=_base_.val_dataloader.collate_fn, '
              'sampler=_base_.val_dataloader.sampler, dataset=_base_.val_dataloader.dataset)')
    Path('a.py').write_text(DIGITS + 'custom_hooks = [dict(type="OnlineProbeHook", interval=1, '
                            f'bank_dataloader={loader}, query_dataloader={loader})]\n')
    run_train(['a.py', '--work-dir', 'run', '--cfg-options', 'default_hooks.logger.interval=1'])
    assert 'knn_top1' in next(Path('run').glob('*/*.log')).read_text()


# Conversion: the scores of the original

RECIPE = """_base_ = ['{base}']
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, num_layers=2, num_heads=2,
                            feedforward_channels=64),
                  layer_scale_init_value=0.5, init_cfg=None, {backbone}),
    head=dict(num_classes={classes}, in_channels=32),
    data_preprocessor=dict(num_classes={classes}, {pixels}))
pipeline = [dict(type='LoadImageFromFile'), {steps} dict(type='PackInputs')]
test_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(
    data_root='data', pipeline=pipeline, metainfo=dict(classes={names})))
test_evaluator = dict(type='Accuracy', topk=(1, 2))
custom_hooks = [dict(type='ModelEMAHook', evaluate_on_origin=True)]
"""
PIXELS = 'mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True'
CASES = [
    dict(steps="dict(type='ResizeEdge', scale=256, edge='short', interpolation='bicubic', "
         "backend='pillow'), dict(type='CenterCrop', crop_size=224),"),
    dict(steps="dict(type='Resize', scale=(42, 28)),", names=['ant', 'bee', 'cat', 'dog', 'eel',
                                                              'fox'],
         backbone="patch_size=7, out_type='last_token', fc_norm=False"),
    dict(steps="dict(type='ResizeEdge', scale=60, interpolation='bilinear', backend='pillow'), "
         "dict(type='CenterCrop', crop_size=(56, 42)),", names=['no', 'yes'],
         pixels='mean=[123.5, 116.25, 103.5], std=[58.5, 57., 57.5], to_rgb=True'),
    dict(steps="dict(type='Resize', scale=(72, 64), interpolation='nearest', backend='pillow'), "
         "dict(type='CenterCrop', crop_size=56),", backbone='causal=True, gated_mlp=True'),
]


@pytest.mark.parametrize('number, recorded', [
    (0, True), (1, True), (2, True), (3, True), (1, False)])
def test_converted_files_give_the_scores_of_the_original(number, recorded, capsys):
    case = CASES[number]
    names = case.get('names', ['ant', 'bee', 'cat'])
    for i in range(4 * len(names)):
        save_image(Path(f'data/val/{names[i // 4]}/{i}.jpg'), (70 + i, 90 - i))
    base = REPO / 'configs' / 'classification' / 'nepa_vit-b_ft_in1k.py'
    Path('run.py').write_text(RECIPE.format(
        base=base, classes=len(names), names=names, steps=case['steps'],
        backbone=case.get('backbone', ''), pixels=case.get('pixels', PIXELS)))
    cfg = Config.fromfile('run.py')
    init_default_scope('mmpretrain')
    sets = []
    for _ in range(2):
        model = MODELS.build(cfg.model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        sets.append(model.state_dict())
    meta = dict(dataset_meta=dict(classes=tuple(names)))
    if recorded:
        meta['cfg'] = cfg.pretty_text
    torch.save(dict(state_dict=sets[0], meta=meta, ema_state_dict={
        f'module.{key}': value for key, value in sets[1].items()}), 'run.pth')
    convert(['run.pth', 'hf', '--to', 'hf', *([] if recorded else ['--config', 'run.py'])])
    convert(['hf', 'back.safetensors'])
    published = load_tool('publish_model').main(['run.pth', 'published'])
    if recorded:        # what is published knows as much as the run
        convert([published, 'hf2', '--to', 'hf'])
        for name in ('config.json', 'preprocessor_config.json'):
            assert Path('hf', name).read_text() == Path('hf2', name).read_text()

    config = json.loads(Path('hf/config.json').read_text())
    assert config['id2label'] == {str(i): name for i, name in enumerate(names)}
    assert config['label2id'] == {name: i for i, name in enumerate(names)}
    images = input_of(cfg)
    height, width = images['crop'] or images['resize']
    assert config['image_size'] == (height if height == width else [height, width])
    preprocessor = json.loads(Path('hf/preprocessor_config.json').read_text())
    assert preprocessor == preprocessor_config(images)
    own = ['test_dataloader.dataset.data_root=data', 'test_dataloader.batch_size=4',
           'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']
    results = []
    for config, checkpoint, options in (('run.py', 'run.pth', own), ('run.py', 'hf', own),
                                        ('back.py', 'back.safetensors', own),
                                        ('back.py', 'hf', own), ('run.py', published, own)):
        if config == 'back.py':
            options = [*options, 'test_evaluator.topk=[1,2]']
        Path('a.pkl').unlink(missing_ok=True)
        metrics = run_test([config, checkpoint, '--out', 'a.pkl', '--cfg-options', *options])
        scores = [sample['pred_score'] for sample in pickle.loads(Path('a.pkl').read_bytes())]
        results.append((metrics, torch.stack(scores)))
    for metrics, scores in results[1:]:
        assert metrics == results[0][0] and torch.equal(scores, results[0][1])
    assert read_checkpoint('back.safetensors')['meta']['dataset_meta'] == dict(classes=names)
    assert len(results[0][1]) == 4 * len(names)
    if number == 0:     # a config that anybody's tool can read
        python('-c', 'from mmengine import Config; Config.fromfile("back.py")')


def test_preprocessor_gives_the_pixels_of_the_pipeline():
    """The fields of preprocessor_config.json, followed by hand, and OpenMMLab's transforms."""
    from mmengine.dataset import Compose
    init_default_scope('mmpretrain')
    save_image(Path('x.png'), (90, 61))
    for images in (EXAMPLE | dict(resize=60, crop=[42, 56]), EXAMPLE | dict(
            resize=[70, 64], crop=None, interpolation='bilinear', mean=[1., 2., 3.])):
        sample = Compose(pipeline_of(images)[:-1])(dict(img_path='x.png'))
        expected = (sample['img'][..., ::-1] - images['mean']) / images['std']
        config = preprocessor_config(images)
        image = Image.open('x.png').convert('RGB')
        size = config['size']
        if 'shortest_edge' in size:
            short = min(image.size)
            new = [int(size['shortest_edge'] * side / short) for side in image.size]
        else:
            new = [size['width'], size['height']]
        image = image.resize(new, config['resample'])
        if config['do_center_crop']:
            height, width = config['crop_size']['height'], config['crop_size']['width']
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        found = np.array(image) * config['rescale_factor']
        found = (found - config['image_mean']) / config['image_std']
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_inputs_that_others_cannot_have(capsys):
    step = dict(type='RandomFlip', prob=0.5)
    model = dict(type='ImageClassifier', backbone=dict(type='NEPAViT'))
    cfg = dict(model=model, test_dataloader=dict(dataset=dict(pipeline=[step])))
    with pytest.raises(ValueError, match='RandomFlip.* of the test pipeline cannot be expressed'):
        input_of(cfg)
    assert input_of(dict(model=model)) is None
    for change in (dict(crop=['a', 1]), dict(mean='x'), dict(backend='os.system'), dict(std=[0.])):
        with pytest.raises(ValueError, match='Not a valid input spec'):
            input_of(dict(input=EXAMPLE | change))
    with pytest.raises(ValueError, match='supports neither'):
        preprocessor_config(EXAMPLE | dict(channel_order='BGR'))
    for images in (EXAMPLE, EXAMPLE | dict(crop=None), EXAMPLE | dict(resize=[30, 40])):
        cfg = dict(model=dict(model, data_preprocessor=dict(
            mean=images['mean'], std=images['std'], to_rgb=True)),
            test_dataloader=dict(dataset=dict(pipeline=pipeline_of(images))))
        assert input_of(cfg) == images


def test_input_of_pretraining_is_that_of_its_crops():
    """A network that was trained on antialiased images is not shown others."""
    expected = dict(resize=224, crop=[224, 224], interpolation='bilinear', backend='pillow',
                    mean=[127.5] * 3, std=[127.5] * 3, channel_order='RGB')
    cfg = Config.fromfile(REPO / 'configs' / 'pretrain' / 'nepa_vit-b.py')
    assert input_of(cfg) == expected
    cfg.train_dataloader.dataset.pipeline[0].type = 'nepa_mm.datasets.LoadRandomResizedCrop'
    assert input_of(cfg) == expected
