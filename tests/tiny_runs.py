"""Tiny configs with made-up images in the current folder, and how to call the tools on them."""
import importlib.util
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from .conftest import REPO, TINY

TOOLS = REPO / 'tools'
RUNS = count()
NORMALIZE = dict(mean=[127.5] * 3, std=[127.5] * 3)
RUNTIME = dict(custom_imports=dict(imports=['nepa_mm'], allow_failed_imports=False),
               default_hooks=dict(logger=dict(type='LoggerHook', interval=1)))


def find_script(name):
    """The path of a tool, a benchmark or a demo."""
    found, = [file for folder in ('tools', 'benchmarks', 'demo', '.dev_scripts')
              for file in (REPO / folder).rglob(name)]
    return found


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f'nepa_tool_{name}', find_script(f'{name}.py'))
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def named_apart(tool):
    """A tool's ``main``; mmengine keeps loggers by experiment and second, and tests are fast."""
    def main(args):
        named = any('experiment_name' in str(arg) for arg in args)
        return tool.main([*args, *([] if named else options(f'experiment_name=run{next(RUNS)}'))])
    return main


run_train, run_test = named_apart(load_tool('train')), named_apart(load_tool('test'))


def run_script(script, *args, cwd, **env):
    """Run a tool in a process without GPUs, from a folder that is not the repository's."""
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1',
               PYTHONPATH=str(TOOLS.parent), **env)
    env['PATH'] = os.pathsep.join([str(cwd), str(Path(sys.executable).parent), env['PATH']])
    command = [sys.executable] if script.endswith('.py') else []
    result = subprocess.run([*command, find_script(script), *map(str, args)], cwd=cwd, env=env,
                            capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@contextmanager
def refused(message):
    """A tool ends with status 2, because of one sentence about its input."""
    with pytest.raises(SystemExit) as error:
        yield
    assert error.value.code == 2
    sentence = str(error.value.__cause__)
    assert re.search(message, sentence), sentence
    assert '\n' not in sentence


def save_image(path, size=(32, 28)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path).encode()))
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).save(path)


def loader(dataset, steps, batch_size=2):
    return dict(batch_size=batch_size, num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(dataset, pipeline=[dict(type='LoadImageFromFile'), *steps]))


def options(*values):
    return ['--cfg-options', *values]


def save_constant(scope, model, layer, path):
    """Save weights of ``model`` whose last layer ignores its input and says the last class."""
    init_default_scope(scope)
    state = MODELS.build(model).state_dict()
    state[f'{layer}.weight'].zero_()
    state[f'{layer}.bias'].copy_(torch.arange(len(state[f'{layer}.bias'])))
    torch.save(dict(state_dict=state, meta={}), path)


def save_pretraining():
    """A pretraining config of two iterations an epoch, which resumes by default."""
    for index in range(4):
        save_image(Path(f'data/imagenet/train/n{index % 2:08d}/{index}.JPEG'))
    dataset = dict(type='CustomDataset', data_root='data/imagenet', data_prefix='train',
                   with_label=False)
    Config(dict(
        RUNTIME,
        experiment_name=Path.cwd().name,
        default_scope='mmpretrain',
        model=dict(type='NEPA',
                   backbone=dict(type='NEPAViT', arch=TINY, layer_scale_init_value=0.5),
                   head=dict(type='NEPAHead'),
                   data_preprocessor=dict(type='NEPADataPreprocessor', **NORMALIZE)),
        train_dataloader=loader(
            dataset, [dict(type='Resize', scale=(28, 28)), dict(type='PackInputs')]),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
        auto_scale_lr=dict(base_batch_size=16),
        resume=True)).dump('pretrain.py')
    return 'pretrain.py'


def save_classifier():
    """A config for eight images of five classes, and a checkpoint that always says class 4."""
    for index, name in enumerate('abcdeeee'):
        save_image(Path(f'data/val/{name}/{index}.jpg'))
    dataset = dict(type='CustomDataset', data_root='data', data_prefix='val')
    val = loader(dataset, [dict(type='Resize', scale=(28, 28)), dict(type='PackInputs')])
    config = Config(dict(
        RUNTIME,
        experiment_name=Path.cwd().name,
        default_scope='mmpretrain',
        model=dict(type='ImageClassifier',
                   backbone=dict(type='NEPAViT', arch=TINY, out_type='avg_featmap'),
                   head=dict(type='LinearClsHead', num_classes=5, in_channels=32),
                   data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=5,
                                          **NORMALIZE)),
        train_dataloader=val, val_dataloader=val, test_dataloader=val,
        train_cfg=dict(by_epoch=True, max_epochs=1), val_cfg=dict(), test_cfg=dict(),
        val_evaluator=dict(type='Accuracy', topk=(1, 5)),
        test_evaluator=dict(type='Accuracy', topk=(1, 5)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        visualizer=dict(type='UniversalVisualizer')))
    config.default_hooks.visualization = dict(type='VisualizationHook', enable=False)
    config.dump('classify.py')
    save_constant('mmpretrain', config.model, 'head.fc', 'classifier.pth')
    return 'classify.py', 'classifier.pth'


def save_segmentor():
    """Two images, a quarter of them class 1, and a checkpoint that always says class 1."""
    label = np.zeros((28, 32), dtype=np.uint8)
    label[:14, :16] = 1
    for name in '01':
        save_image(Path(f'data/images/{name}.jpg'))
        Path('data/labels').mkdir(exist_ok=True)
        Image.fromarray(label).save(f'data/labels/{name}.png')
    dataset = dict(type='BaseSegDataset', data_root='data', metainfo=dict(
        classes=('background', 'corner'), palette=[[0, 0, 0], [255, 0, 0]]),
        data_prefix=dict(img_path='images', seg_map_path='labels'))
    resize = dict(type='Resize', scale=(28, 28))
    last = [dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    val = loader(dataset, [resize, *last], batch_size=1)
    config = Config(dict(
        RUNTIME,
        experiment_name=Path.cwd().name,
        default_scope='mmseg',
        model=dict(type='EncoderDecoder',
                   backbone=dict(type='NEPAViT', arch=TINY, out_type='featmap', causal=False),
                   decode_head=dict(type='FCNHead', in_channels=32, channels=8, num_convs=1,
                                    num_classes=2, in_index=0, norm_cfg=dict(type='SyncBN'),
                                    loss_decode=dict(type='CrossEntropyLoss')),
                   test_cfg=dict(mode='whole'),
                   data_preprocessor=dict(type='SegDataPreProcessor', size=(28, 28),
                                          **NORMALIZE)),
        train_dataloader=loader(dataset, [last[0], resize, last[1]]),
        test_dataloader=val, test_cfg=dict(),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        visualizer=dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
        tta_model=dict(type='SegTTAModel'),
        tta_pipeline=[dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
            [resize], [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],
            last[:1], last[1:]])]))
    config.default_hooks.visualization = dict(type='SegVisualizationHook')
    config.dump('segment.py')
    save_constant('mmseg', config.model, 'decode_head.conv_seg', 'segmentor.pth')
    return 'segment.py', 'segmentor.pth'
