"""--cfg-options through the tools: every option has an effect, or is refused in one sentence."""
import random
import re
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction

from nepa_mm_cli import parse_value

from .conftest import REPO
from .tiny_runs import (
    load_tool,
    options,
    run_script,
    run_test,
    run_train,
    save_classifier,
    save_pretraining,
    save_segmentor,
)

CONFIGS = REPO / 'configs'
RECIPE = CONFIGS / 'classification/nepa_vit-b_ft_in1k.py'
DIGITS = CONFIGS / 'demo/digits_finetune.py'
SCENES = CONFIGS / 'demo/digits_upernet.py'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(capsys, main, argv):
    """The one sentence of a command that ends with status 2 and writes nothing."""
    before = sorted(Path().rglob('*'))
    with pytest.raises(SystemExit) as error:
        main([str(arg) for arg in argv])
    assert error.value.code == 2 and sorted(Path().rglob('*')) == before
    *_, line = capsys.readouterr().err.strip().split('\n')
    assert 'error: ' in line and line.endswith('.')
    return line


# ---------------------------------------------------------------- names of the file alone


@pytest.mark.parametrize('config, option, keys', [
    (RECIPE, 'train_pipeline.1.scale=112', ['train_dataloader.dataset.pipeline.1.scale']),
    (RECIPE, 'test_pipeline.2.crop_size=112', [
        'test_dataloader.dataset.pipeline.2.crop_size',
        'val_dataloader.dataset.pipeline.2.crop_size']),
    (RECIPE, 'base_lr=1e-3', ['optim_wrapper.optimizer.lr']),
    (RECIPE, 'batch=64', ['auto_scale_lr.base_batch_size', 'optim_wrapper.optimizer.lr']),
    (RECIPE, 'vis_backends=[]', ['visualizer.vis_backends']),
    (DIGITS, 'epochs=3', ['default_hooks.checkpoint.interval', 'param_scheduler.end',
                          'train_cfg.max_epochs', 'train_cfg.val_interval']),
    (SCENES, 'data_preprocessor.size=64,64', ['model.data_preprocessor.size']),
])
def test_names_that_only_the_file_reads(capsys, config, option, keys):
    line = refusal(capsys, load_tool('train').main, [config, *options(option)])
    assert f'{option.split(".")[0].split("=")[0]} is read by the config file only' in line
    assert set(re.findall(r'[\w.]+\b', line.partition('; use ')[2])) - {'and'} == set(keys)


def test_names_of_a_file_made_by_the_test(capsys):
    """Through two files, an expression, a tuple assignment and a list within a list."""
    save_pretraining()
    rng = random.Random(0)
    crop, factor = rng.sample(range(30, 60), 2)
    Path('base.py').write_text(
        f"_base_ = ['pretrain.py']\nside, factor = {crop}, {factor}\n"
        "steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(side, side)),\n"
        "         dict(type='PackInputs')]\n")
    Path('child.py').write_text(
        "_base_ = ['base.py']\n"
        'train_dataloader = dict(dataset=dict(pipeline=_base_.steps))\n'
        'optim_wrapper = dict(optimizer=dict(lr=_base_.factor / 1000))\n')
    main = load_tool('train').main
    for option, keys in (
            ('side=28', 'train_dataloader.dataset.pipeline.1.scale.0 and '
                        'train_dataloader.dataset.pipeline.1.scale.1'),
            ('factor=1', 'optim_wrapper.optimizer.lr'),
            ('steps.1.scale=(28,28)', 'train_dataloader.dataset.pipeline.1.scale')):
        assert refusal(capsys, main, ['child.py', *options(option)]).endswith(f'use {keys}.')
    # the same from the file that a run saves, in which values have no names any more
    Config.fromfile('child.py').dump('flat.py')
    assert refusal(capsys, main, ['flat.py', *options('steps.1.scale=(28,28)')]).endswith(
        'use train_dataloader.dataset.pipeline.1.scale.')
    # and the key that the sentence names has the effect
    runner = run_train(['child.py', *options('train_dataloader.dataset.pipeline.1.scale.0=42',
                                             'train_dataloader.dataset.pipeline.1.scale.1=28')])
    assert runner.train_dataloader.dataset[0]['inputs'].shape == (3, 28, 42)
    saved = Config.fromfile('work_dirs/child/child.py')
    assert saved.train_dataloader.dataset.pipeline[1].scale == (42, 28)


# ---------------------------------------------------------------- misspelt keys


@pytest.mark.parametrize('option, key', [
    ('modle.backbone.arch=tiny', 'model.backbone.arch'),
    ('optim_wrappr.optimizer.lr=1', 'optim_wrapper.optimizer.lr'),
    ('max_epochs=3', 'train_cfg.max_epochs'),
    ('lr=1', 'optim_wrapper.optimizer.lr'),
    ('seed=3', 'randomness.seed'),
    ('backbone.drop_path_rate=0.1', 'model.backbone.drop_path_rate'),
    ('model.drop_path_rate=0.1', 'model.backbone.drop_path_rate'),
    ('model.backbone.drop_path_rat=0.2', 'model.backbone.drop_path_rate'),
    ('model.head.num_class=5', 'model.head.num_classes'),
    ('model.head.loss.label_smoth_val=0.2', 'model.head.loss.label_smooth_val'),
    ('model.data_preprocessor.num_class=5', 'model.data_preprocessor.num_classes'),
    ('train_dataloader.batchsize=3', 'train_dataloader.batch_size'),
    ('train_dataloader.num_worker=3', 'train_dataloader.num_workers'),
    ('train_dataloader.dataset.pipeline.1.scal=3', 'train_dataloader.dataset.pipeline.1.scale'),
    ('optim_wrapper.optimizer.wd=1', 'optim_wrapper.optimizer.weight_decay'),
    ('optim_wrapper.accumulative_count=2', 'optim_wrapper.accumulative_counts'),
    ('optim_wrapper.clip_grad.max_nrom=2', 'optim_wrapper.clip_grad.max_norm'),
    ('optim_wrapper.paramwise_cfg.layer_decay=1', 'optim_wrapper.paramwise_cfg.layer_decay_rate'),
    ('param_scheduler.warmup_epoch=3', 'param_scheduler.warmup'),
    ('train_cfg.max_epoch=3', 'train_cfg.max_epochs'),
    ('default_hooks.checkpoint.intervall=3', 'default_hooks.checkpoint.interval'),
    ('default_hooks.chekpoint.interval=3', 'default_hooks.checkpoint'),
    ('randomness.sed=3', 'randomness.seed'),
    ('env_cfg.cudnn_benchmrk=True', 'env_cfg.cudnn_benchmark'),
    ('auto_scale_lr.enabled=True', 'auto_scale_lr.enable'),
    ('val_evaluator.topks=1,3', 'val_evaluator.topk'),
    ('custom_hooks=[dict(type="ModelEMAHook", momentun=0.1)]', 'custom_hooks.0.momentum'),
    ("model.head.loss=dict(type='LabelSmoothLoss', mod='original')", 'model.head.loss.mode'),
    ('optim_wrapper.optimizer._delete_=True optim_wrapper.optimizer.type=SGD '
     'optim_wrapper.optimizer.lr=1 optim_wrapper.optimizer.wd=0', 'weight_decay'),
])
def test_misspelt_keys(capsys, option, key):
    given = [option] if 'dict(' in option else option.split()
    line = refusal(capsys, load_tool('train').main, [DIGITS, *options(*given)])
    assert re.search(rf'nearest key that is read( is|:) .*{re.escape(key)}\b', line)


@pytest.mark.parametrize('option, sentence', [
    ('model.backbone.patch_size.side=3', 'model.backbone.patch_size is 4, which has nothing below'),
    ('optim_wrapper.optimizer.betas.2=0.9', 'betas is a tuple of 2, .* index from 0 to 1'),
    ('train_dataloader.dataset.pipeline.7.scale=3', 'pipeline is a list of 3, .* from 0 to 2'),
    ('train_dataloader.dataset.pipeline.scale=3', 'pipeline is a list of 3, .* from 0 to 2'),
    ('custom_hooks.0.interval=3', 'custom_hooks is a list of 0, .* set custom_hooks itself'),
    ('param_scheduler.0.end=3', 'param_scheduler is a dict, which has names, not indices'),
    ('_delete_=True', 'KEY._delete_=True'),
    ('model.backbone.type=NEPAVit', "no 'NEPAVit' for model.backbone.type; the nearest is NEPAViT"),
    ('optim_wrapper.optimizer.type=SGD', 'SGD does not accept betas, eps .*; .*_delete_=True'),
    ('custom_imports.imports=[no_such_module]', 'custom_imports: .*no_such_module'),
    ('optim_wrapper.optimizer.lr=1e-3x', r"must be a number \(the file has 0.002\), got '1e-3x'"),
    ('train_dataloader.persistent_workers=Flase', r"must be True or False .*, got 'Flase'"),
    ('launcher=slurm', 'use the flag --launcher'),
    ('tta_model.type=X', 'only tools/test.py --tta reads it'),
])
def test_places_that_are_not_there(capsys, option, sentence):
    assert re.search(sentence, refusal(capsys, load_tool('train').main, [DIGITS, *options(option)]))


@pytest.mark.parametrize('given, sentence', [
    (['train_cfg.max_epochs'], "'train_cfg.max_epochs' is not KEY=VALUE"),
    (['train_cfg.max_epochs=[1,', '2]'], 'brackets of .* do not match'),
    (['train_cfg.max_epochs', '=', '3'], 'is not KEY=VALUE'),
    (['=3'], 'no proper key'),
    (['train_cfg..max_epochs=3'], 'no proper key'),
    (['model.head.loss=dict(type=LabelSmoothLoss)'], 'quote the text in it'),
    (['resume=True', 'resume=False'], 'resume is given twice, as True and as False'),
    (['resume=True', '--cfg-options', 'resume=False'], 'resume is given twice'),
    (['train_cfg=3', 'train_cfg.max_epochs=3'], 'train_cfg is 3, which has nothing below'),
])
def test_what_is_no_option(capsys, given, sentence):
    line = refusal(capsys, load_tool('train').main, [DIGITS, *options(*given)])
    assert re.search(sentence, line)


def test_every_tool_refuses(capsys):
    """As a user types it, too."""
    config, checkpoint = save_classifier()
    Path('image.jpg').write_bytes(next(Path('data').rglob('*.jpg')).read_bytes())
    for tool, argv in (('test', [config, checkpoint]), ('knn', [config, checkpoint]),
                       ('visualize', [config, checkpoint, 'image.jpg'])):
        line = refusal(capsys, load_tool(tool).main, [*argv, *options('modle.backbone.arch=b')])
        assert 'nearest key that is read: model.backbone.arch' in line
    for tool, option, sentence in (
            ('test', 'load_from=a.pth', 'CHECKPOINT names the weights'),
            ('test', 'tta_model.type=A', 'give --tta, too'),
            ('knn', 'train_dataloader.dataset.pipeline.1.scale=8', 'set test_dataloader.dataset'),
            ('knn', 'optim_wrapper.optimizer.lr=1', 'does not read optim_wrapper')):
        assert sentence in refusal(capsys, load_tool(tool).main,
                                   [config, checkpoint, *options(option)])
    status, output = run_script('train.py', config, *options('optim_wrappr.type=X'),
                                cwd=Path.cwd())
    assert status == 2 and 'Traceback' not in output and not Path('work_dirs').exists()
    assert output.strip().split('\n')[-1] == (
        'error: nothing reads optim_wrappr.type; the nearest key that is read: optim_wrapper.type.')


# ---------------------------------------------------------------- values


def test_blanks_survive():
    """In a folder's name, through the command line, to the images that are read."""
    config, checkpoint = save_classifier()
    Path('data').rename('my photos, 2 [b]=c')
    status, output = run_script(
        'test.py', config, checkpoint,
        *options("test_dataloader.dataset.data_root='my photos, 2 [b]=c'"), cwd=Path.cwd())
    assert status == 0 and 'accuracy/top1: 50.0' in output
    Path('my photos, 2 [b]=c').rename('my photos')
    metrics = run_test([config, checkpoint,
                        *options('test_dataloader.dataset.data_root=my photos')])
    assert metrics['accuracy/top1'] == 50


@pytest.mark.parametrize('text, value', [
    ('my photos', 'my photos'), (' a ', ' a '), ('a=b', 'a=b'), ("'1e-3'", '1e-3'), ("'12'", '12'),
    ("'a,b'", 'a,b'), ('"[1,2]"', '[1,2]'), ('', ''), ("''", ''), ('None', None), ('none', 'none'),
    ('True', True), ('false', False), ('1e-3', 1e-3), ('-5', -5), ('-.5', -.5), ('007', 7),
    ('a,b', ['a', 'b']), ('1,2', [1, 2]), ('my photos,b c', ['my photos', 'b c']), ('a,', ['a']),
    ('[a b, c]', ['a b', 'c']), ("['a, b', c]", ['a, b', 'c']), ('(1,2)', (1, 2)), ('(a,)', ('a',)),
    ('[(a,b),(c,d)]', [('a', 'b'), ('c', 'd')]), ('(1,2),(3,4)', [(1, 2), (3, 4)]),
    ('[[1, 2], (3, [4])]', [[1, 2], (3, [4])]), ('[]', []), ('()', ()), ('{}', {}),
    ("[dict(type='A', n=1), dict(type='B')]", [dict(type='A', n=1), dict(type='B')]),
    ("{'a': dict(b=(1, None))}", dict(a=dict(b=(1, None)))), ("dict(a='b c')", dict(a='b c')),
    ('photos (1)', 'photos (1)'), ('photos (1, 2)', 'photos (1, 2)'), ("it's, b", ["it's", 'b']),
    ('(old) photos', '(old) photos'), ('...', '...'), ('~/a b', '~/a b'), ('2j', '2j'),
    ('s3://a?b=c', 's3://a?b=c'), (r'C:\new', r'C:\new'), ('hf://a/b@c', 'hf://a/b@c'),
])
def test_values(text, value):
    got = parse_value(text)
    assert got == value and type(got) is type(value) and repr(got) == repr(value)


def test_values_of_openmmlab():
    """Numbers, names, lists and tuples without blanks and quotes are what DictAction makes."""
    rng = random.Random(0)

    def draw(depth):
        kinds = ['3', '-2', '0.5', '1e-4', 'a', 'b/c.pth', 'True', 'false', 'None']
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(kinds)
        inner = ','.join(draw(depth - 1) for _ in range(rng.randint(2, 4)))
        return rng.choice(['[{}]', '({})']).format(inner)

    for _ in range(300):
        text = draw(3)
        assert parse_value(text) == DictAction._parse_iterable(text), text
        assert parse_value(f'a,{text}') == DictAction._parse_iterable(f'a,{text}'), text


# ---------------------------------------------------------------- what is accepted takes effect


def test_options_take_effect_once_and_are_saved():
    config = save_pretraining()
    runner = run_train([
        config, *options('optim_wrapper.optimizer.lr=0.3', 'optim_wrapper.optimizer.type=AdamW',
                         'optim_wrapper.optimizer._delete_=True', 'train_cfg.max_epochs=2'),
        *options("custom_hooks=[dict(type='EMAHook', momentum=0.5)]", 'default_hooks.timer=None',
                 'model.data_preprocessor.mean=1,2,3')])
    assert runner.optim_wrapper.get_lr()['lr'] == [0.3] and runner.max_epochs == 2
    assert type(runner.optim_wrapper.optimizer).__name__ == 'AdamW'
    hooks = [type(hook).__name__ for hook in runner.hooks]
    assert 'EMAHook' in hooks and 'IterTimerHook' not in hooks
    saved = Config.fromfile('work_dirs/pretrain/pretrain.py')
    assert saved.optim_wrapper.optimizer == dict(type='AdamW', lr=0.3)
    assert saved.custom_hooks == [dict(type='EMAHook', momentum=0.5)]
    assert saved.model.data_preprocessor.mean == [1, 2, 3]
    assert saved.model.backbone.arch == Config.fromfile(config).model.backbone.arch


def test_dict_replaces_text_and_goes_into_a_dict():
    config = save_pretraining()
    runner = run_train([config, *options(
        'model.backbone.arch=dict(num_layers=2)',
        'train_dataloader.dataset.pipeline.1.scale.0=42', 'train_dataloader.batch_size=4')])
    assert len(runner.model.backbone.layers) == 2 and runner.model.backbone.embed_dims == 32
    batch = next(iter(runner.train_dataloader))
    assert [tuple(image.shape) for image in batch['inputs']] == [(3, 28, 42)] * 4


def test_keys_of_own_modules_are_read(monkeypatch, capsys):
    """A hook of the user's may look at any key of the config."""
    config = save_pretraining()
    Path('own_hook_of_options.py').write_text(
        'from mmengine.hooks import Hook\nfrom mmengine.registry import HOOKS\n\n\n'
        '@HOOKS.register_module()\nclass OwnHook(Hook):\n'
        '    def __init__(self, **kwargs):\n        self.rest = kwargs\n\n'
        '    def before_train(self, runner):\n        print("own", runner.cfg.get("own_key"))\n')
    Path('own.py').write_text(
        f"_base_ = ['{config}']\ncustom_imports = dict(imports=['own_hook_of_options'])\n"
        "custom_hooks = [dict(type='OwnHook')]\n")
    monkeypatch.syspath_prepend('.')
    run_train(['own.py', *options('own_key=a b', 'custom_hooks.0.anything=1')])
    assert 'own a b' in capsys.readouterr().out


def test_tta_options_of_segmentation(capsys):
    config, checkpoint = save_segmentor()
    argv = [config, checkpoint, '--tta']
    metrics = run_test([*argv, *options('tta_pipeline.1.transforms.1=[dict(type="RandomFlip", '
                                        'prob=1.)]')])
    assert 'mIoU' in metrics
    assert 'tta_pipeline.1.transforms' in refusal(
        capsys, load_tool('test').main, [*argv, *options('tta_pipeline.1.transform=[]')])
