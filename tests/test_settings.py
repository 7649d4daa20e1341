"""Settings: literals at the top of a config, which --cfg-options sets with all that follows."""
from pathlib import Path

import pytest
from mmengine.config import Config

from nepa_mm import apis
from nepa_mm.apis.settings import evaluate_with

from .conftest import REPO
from .tiny_runs import load_tool, options, refused, run_train, save_pretraining

CONFIGS = [str(path.relative_to(REPO / 'configs')) for path in sorted(
    (REPO / 'configs').rglob('*.py')) if '_base_' not in path.parts]


@pytest.fixture
def child(folder):
    """A file with four settings, in a folder with a blank; its base is given by a relative path."""
    save_pretraining()
    Path('my configs').mkdir()
    path = Path('my configs/child.py')
    path.write_text(
        '"""Docstring."""\n'
        "_base_ = ['../pretrain.py']\n"
        "data_root = 'data/imagenet'     # any folder\n"
        'epochs, unused = 1, 2\n')
    path.write_text(path.read_text().replace('epochs, unused = 1, 2', 'epochs = 1\nsides = [28]\n')
                    + 'flip = False\n'
                    'side = sides[-1]\n'
                    'train_cfg = dict(max_epochs=epochs)\n'
                    'train_dataloader = dict(dataset=dict(data_root=data_root))\n'
                    'optim_wrapper = dict(optimizer=dict(lr=0.1 / epochs, nesterov=flip))\n'
                    'model = dict(backbone=dict(patch_size=side // 2))\n')
    return path


def test_what_is_derived_follows(child):
    runner = run_train([str(child), *options('epochs=2', 'sides=28,56'), '--work-dir', 'work'])
    assert runner.max_epochs == 2 and runner.model.backbone.patch_embed.patch_size == (28, 28)
    assert runner.optim_wrapper.get_lr()['lr'] == [0.05]
    recorded = Config.fromfile('work/child.py')
    assert recorded.epochs == 2 and recorded.sides == [28, 56]
    assert recorded.train_cfg.max_epochs == 2 and recorded.optim_wrapper.optimizer.lr == 0.05
    assert Config.fromfile(child).epochs == 1       # the file stays


def test_options_below_follow_the_settings(child):
    cfg = apis.load_config(child, {'optim_wrapper.optimizer.lr': 3., 'epochs': 4})
    assert cfg.train_cfg.max_epochs == 4 and cfg.optim_wrapper.optimizer.lr == 3.
    assert cfg.filename == child or str(cfg.filename) == str(child)


@pytest.mark.parametrize('option, message', [
    ('epochs=many', r"epochs must be a number \(the file has 1\), got 'many'"),
    ('epochs=1.5', r'epochs must be an integer \(the file has 1\), got 1.5'),
    ('epochs=True', 'epochs must be a number'),
    ('epochs=0', 'child.py cannot be evaluated with epochs=0: float division by zero'),
    ('data_root=2024', 'data_root must be text .* got 2024; write data_root="\'2024\'"'),
    ('sides=28', r'sides must be a list such as a,b,c \(the file has \[28\]\), got 28'),
    ('flip=1', 'flip must be True or False'),
    ('epoch=3', 'nothing reads epoch; the nearest setting of my configs/child.py is epochs'),
    ('side=3', 'side is read by the config file only, .* use model.backbone.patch_size'),
])
def test_values_that_do_not_fit(child, option, message):
    with refused(message):
        load_tool('train').main([str(child), *options(option)])
    assert not Path('work_dirs').exists()


def test_a_recorded_config_derives_nothing(child):
    apis.load_config(child).dump('flat.py')
    with refused('epochs is read by the config file only, .* use train_cfg.max_epochs'):
        load_tool('train').main(['flat.py', *options('epochs=3')])


def test_the_same_value_is_no_error(child):
    assert apis.load_config(child, {'epochs': 1}).train_cfg.max_epochs == 1


def test_a_setting_that_the_tool_does_not_read(child):
    with refused(r'epochs has no effect here: this tool reads custom_imports, .* follows it'):
        load_tool('knn').main([str(child), 'none.pth', *options('epochs=2')])
    with refused('no labelled train_dataloader'):       # the next check
        load_tool('knn').main([str(child), 'none.pth', *options('data_root=elsewhere')])


def test_a_demo(folder):
    cfg = apis.load_config(REPO / 'configs/demo/digits_finetune.py', {'num_labels': 50})
    assert cfg.train_dataloader.dataset.num_labels == 50


# inheritance

@pytest.mark.parametrize('base', ['my configs/child.py', 'my configs/between.py'])
def test_an_option_reaches_the_bases(child, base):
    Path('my configs/between.py').write_text("_base_ = './child.py'\n")
    Path('heir.py').write_text(f"_base_ = ['{base}']\nmodel = dict(backbone=dict(causal=False))\n")
    runner = run_train(['heir.py', *options('epochs=2', 'sides=28,56')])
    assert runner.max_epochs == 2 and runner.model.backbone.patch_embed.patch_size == (28, 28)
    assert Config.fromfile('work_dirs/heir/heir.py').optim_wrapper.optimizer.lr == 0.05
    assert Config.fromfile(child).epochs == 1


def test_an_option_reaches_a_base_of_another_package(folder):
    Path('heir.py').write_text("_base_ = ['nepa_mm::custom/pretrain.py']\n")
    before, cfg = (apis.load_config('heir.py', options) for options in ({}, {'epochs': 7}))
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler.end == 7
    assert cfg.model == before.model and cfg.train_cfg._scope_ == before.train_cfg._scope_


@pytest.mark.parametrize('line', ['epochs = 7', "data_root = 'elsewhere'"])
def test_a_child_cannot_change_what_its_base_has_read(child, line):
    Path('heir.py').write_text(f"_base_ = ['my configs/child.py']\n{line}\n")
    name, _, value = line.partition(' = ')
    with refused(f'heir.py sets {name} = {value}, but its base has derived the rest from '
                 f'.* give {name} by --cfg-options'):
        load_tool('train').main(['heir.py'])
    assert not Path('work_dirs').exists()
    Path('grandchild.py').write_text("_base_ = ['heir.py']\n")
    with refused(f'heir.py sets {name} = {value}'):
        load_tool('train').main(['grandchild.py'])
    assert not Path('work_dirs').exists()
    Path('heir.py').write_text(Path('heir.py').read_text() + f'resume = {name} == 3\n')
    apis.load_config('heir.py')     # the child reads it


def test_a_child_may_set_all_that_follows_itself(child):
    Path('heir.py').write_text("_base_ = ['my configs/child.py']\ndata_root = 'here'\n"
                               "train_dataloader = dict(dataset=dict(data_root='here'))\n")
    assert apis.load_config('heir.py').data_root == 'here'


@pytest.mark.parametrize('path', CONFIGS)
def test_evaluating_again_changes_what_was_asked(path):
    """Nothing at first; then ``data_root`` moves all data of a recipe."""
    cfg = Config.fromfile(REPO / 'configs' / path)
    assert evaluate_with(cfg, {})._cfg_dict == cfg._cfg_dict
    if path.split('/')[0] in ('pretrain', 'classification', 'segmentation'):
        cfg = evaluate_with(cfg, {'data_root': 'elsewhere'})
        datasets = [cfg[name].dataset for name in cfg if name.endswith('_dataloader') and cfg[name]]
        assert datasets and all(dataset.data_root == 'elsewhere' for dataset in datasets)
