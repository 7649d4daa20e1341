"""What tools/train.py and tools/test.py see before the first step, as a user types them."""
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from . import tiny_runs
from .conftest import REPO, TINY
from .tiny_runs import (
    load_tool,
    options,
    run_script,
    run_test,
    run_train,
    save_constant,
    save_image,
    save_pretraining,
)

COUNT = itertools.count()


def classes(**counts):
    """Folders of images, e.g. ``classes(train=dict(ant=2, bee=1))``."""
    for split, names in counts.items():
        for name, count in names.items():
            for i in range(count):
                save_image(Path(f'data/{split}/{name}/{i}.jpg'))


def save_config(name='run.py', **changes):
    """The released fine-tuning recipe, tiny, on data/train and data/val, for two epochs."""
    cfg = Config.fromfile(REPO / 'configs/classification/nepa_vit-b_ft_in1k.py')
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    cfg.merge_from_dict({
        'model.head.in_channels': 32, 'model.head.num_classes': 3, 'train_cfg.max_epochs': 2,
        'param_scheduler.end': 2,
        'custom_hooks': [dict(type='ModelEMAHook', momentum=0.5, evaluate_on_origin=True)]})
    for split in ('train', 'val'):
        pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(28, 28)),
                    dict(type='PackInputs')]
        cfg[f'{split}_dataloader'].pop('dataset')
        cfg[f'{split}_dataloader'].update(
            batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
                type='CustomDataset', data_root='data', data_prefix=split, pipeline=pipeline))
    cfg.test_dataloader = cfg.val_dataloader
    cfg.merge_from_dict(changes)
    cfg.dump(name)
    return name


def save_classifier(names, config='run.py', path='last.pth'):
    """A checkpoint that always says the last of ``names``."""
    save_constant('mmpretrain', Config.fromfile(config).model, 'head.fc', path)
    checkpoint = torch.load(path)
    torch.save(dict(checkpoint, meta=dict(dataset_meta=dict(classes=names))), path)
    return path


def refused(sentence, tool, *args):
    """The command ends with status 2, one sentence, and nothing written."""
    before = sorted(Path().rglob('*'))
    args = [*map(str, args)]
    if tool in (run_train, run_test):       # mmengine keeps a logger for every name
        args += options(f'experiment_name=refused{next(COUNT)}')
    with tiny_runs.refused(sentence):
        tool(args)
    assert sorted(Path().rglob('*')) == before


def warnings(runner):
    return [line.partition('WARNING - ')[2]
            for line in next(Path(runner.log_dir).glob('*.log')).read_text().split('\n')
            if ' WARNING - ' in line]


# ---------------------------------------------------------------- classes are names


def test_unknown_class(folder):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(bee=2, cat=2, dog=2))
    config = save_config()
    refused('val_dataloader has the class dog.*train_dataloader.*ant, bee, cat',
            run_train, config)
    checkpoint = save_classifier(('ant', 'bee', 'cat'))
    refused('test_dataloader has the class dog.*last.pth.*ant, bee, cat', run_test, config,
            checkpoint)


def test_fewer_classes_in_validation(folder):
    """The network says cat, as three of the four images are."""
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(bee=1, cat=3))
    config = save_config(**{'load_from': 'last.pth', 'optim_wrapper.optimizer.lr': 0.,
                            'optim_wrapper.paramwise_cfg.head_lr': 0.})
    checkpoint = save_classifier(('ant', 'bee', 'cat'))
    runner = run_train([config])
    assert runner.message_hub.get_scalar('val/accuracy/top1').current() == 75.
    assert run_test([config, checkpoint])['accuracy/top1'] == 75.
    # as a later test of what was trained says
    assert run_test([config, 'work_dirs/run/epoch_2.pth'])['accuracy/top1'] == 75.


def test_folders_follow_the_names_of_the_config(folder):
    """metainfo.classes in another order than the folders: labels follow the names."""
    classes(train=dict(ant=1, bee=2, cat=3), val=dict(ant=1, bee=2, cat=3))
    order = dict(metainfo=dict(classes=('cat', 'ant', 'bee')))
    config = save_config(**{'train_dataloader.dataset': order, 'val_dataloader.dataset': order,
                            'test_dataloader.dataset': order})
    names = ('cat', 'ant', 'bee')
    metrics = run_test([config, save_classifier(names), '--out', 'pred.pkl'])
    assert metrics['accuracy/top1'] == pytest.approx(100 / 3)      # bee: two of six
    runner = run_train([config])
    dataset = runner.train_dataloader.dataset
    assert sorted(dataset.get_gt_labels()) == [0, 0, 0, 1, 2, 2]
    saved = torch.load('work_dirs/run/epoch_2.pth', weights_only=False)['meta']['dataset_meta']
    assert tuple(saved['classes']) == names


@pytest.mark.parametrize('names, message', [
    (('ant', 'bee', 'dog'), 'has the class cat.* ant, bee, dog'),
    (('ant', 'bee'), r'subfolders \(3\).* classes \(2\)')])
def test_names_of_the_config_that_fit_in_part(folder, names, message):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1))
    config = save_config(**{'train_dataloader.dataset': dict(metainfo=dict(classes=names))})
    refused(f'train_dataloader.*{message}', run_train, config)


def test_checkpoint_of_other_names(folder):
    classes(val=dict(ant=1, bee=2, cat=3))
    config = save_config()
    # the same set in another order: the network says bee
    other = save_classifier(('cat', 'ant', 'bee'))
    assert run_test([config, other])['accuracy/top1'] == pytest.approx(100 / 3)
    refused('test_dataloader has the class cat.*last.pth.*ant, bee, dog', run_test, config,
            save_classifier(('ant', 'bee', 'dog')))
    refused(r'3 classes \(ant, bee, cat\) and last.pth 2 \(x, y\)', run_test, config,
            save_classifier(('x', 'y')))


def test_classes_of_segmentors(folder):
    """Masks hold numbers, so another order of the names is refused."""
    config, checkpoint = tiny_runs.save_segmentor()
    assert run_test([config, checkpoint])['mIoU'] == 12.5
    saved = torch.load(checkpoint)
    names = dict(dataset_meta=dict(classes=('corner', 'background')))
    torch.save(dict(saved, meta=names), 'other.pth')
    refused('test_dataloader has its classes in another order than other.pth.*corner, background',
            run_test, config, 'other.pth')
    cfg = Config.fromfile(config)
    cfg.val_dataloader, cfg.val_evaluator, cfg.val_cfg = (
        cfg.test_dataloader, cfg.test_evaluator, dict())
    cfg.val_dataloader.dataset.metainfo.classes = ('background', 'middle')
    cfg.dump(config)
    refused('val_dataloader has the class middle, and train_dataloader does not', run_train, config)


def test_names_in_predictions(folder):
    classes(val=dict(ant=1, bee=1, cat=1))
    config, predict = save_config(), load_tool('predict').main
    refused('other.pth names 2 classes, but the head of the config has 3 outputs', predict,
            'data/val/ant/0.jpg', '--model', config, '--checkpoint',
            save_classifier(('ant', 'bee'), path='other.pth'))


def test_head_of_another_size(folder):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1, bee=1, cat=1))
    refused('model.head.num_classes is 5, but train_dataloader has 3 classes: ant, bee, cat',
            run_train, save_config(**{'model.head.num_classes': 5}))


def test_one_number_of_classes_and_fewer_than_five(folder):
    """model.head.num_classes is all that a user states; topk=(1, 5) is cut to what there is."""
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1, bee=1, cat=1))
    runner = run_train([save_config()])
    assert 0 <= runner.message_hub.get_scalar('val/accuracy/top1').current() <= 100
    assert runner.model.data_preprocessor.num_classes == 3
    assert any('topk' in line for line in warnings(runner))
    assert 'accuracy/top1' in run_test(['run.py', 'work_dirs/run/epoch_2.pth'])


def test_other_labels_than_outputs(folder):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1, bee=1, cat=1))
    Path('data/list.txt').write_text('train/ant/0.jpg 0\ntrain/ant/1.jpg 7\n')
    config = save_config(**{'train_dataloader.dataset.ann_file': 'list.txt',
                            'train_dataloader.dataset.data_prefix': ''})
    refused('Labels of train_dataloader must be 0 to 2, .* go from 0 to 7', run_train, config)


def test_folders_without_a_common_class(folder):
    classes(train=dict(ant=2, bee=2), val=dict(cow=1, dog=1))
    refused('val_dataloader has the classes cow, dog and train_dataloader ant, bee: .* none',
            run_train, save_config(**{'model.head.num_classes': 2}))


def test_start_from_a_classifier_of_other_classes(folder):
    """Its head does not fit and is not loaded, so its names say nothing."""
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1, bee=1, cat=1))
    checkpoint = save_classifier(tuple('wxyz'), save_config(**{'model.head.num_classes': 4}))
    assert run_train([save_config(load_from=checkpoint)]).iter == 6


@pytest.mark.parametrize('lines, sentence', [
    ('', 'list.txt is empty'), ('ant/0.jpg 0\n\n', "line 2 of data/list.txt is ''"),
    ('ant/0.jpg ant\n', "line 1 of data/list.txt is 'ant/0.jpg ant'"),
    ('ant/0.jpg 0\nant/9.jpg 0\n', 'no image data/train/ant/9.jpg, which data/list.txt names')])
def test_annotation_files(folder, lines, sentence):
    classes(train=dict(ant=2), val=dict(ant=1))
    Path('data/list.txt').write_text(lines)
    refused(sentence, run_train, save_config(**{'train_dataloader.dataset.ann_file': 'list.txt'}))


def test_numbers_against_names(folder):
    """An annotation file without metainfo.classes cannot be compared, which is said."""
    classes(train=dict(ant=2, bee=2), val=dict(ant=1, bee=1))
    Path('data/list.txt').write_text('bee/0.jpg 0\nbee/1.jpg 0\nant/0.jpg 1\nant/1.jpg 1\n')
    runner = run_train([save_config(**{'train_dataloader.dataset.ann_file': 'list.txt',
                                       'model.head.num_classes': 2})])
    assert sum('train_dataloader names no class: its numbers are taken to be those of '
               'val_dataloader (ant, bee)' in line for line in warnings(runner)) == 1


def test_two_processes_say_it_once(folder):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(bee=2, dog=2))
    before = sorted(Path().rglob('*')) + [Path(save_config())]
    code, output = run_script('dist_train.sh', 'run.py', 2, cwd=folder)
    assert code == 2 and output.count('error: ') == 1 and 'has the class dog' in output
    assert 'Traceback' not in output and 'exitcode' not in output
    assert sorted(Path().rglob('*')) == sorted(before)


# ---------------------------------------------------------------- nothing vanishes


def test_every_suffix_is_read(folder):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1, bee=1, cat=1))
    for suffix in ('webp', 'tif', 'tiff', 'gif', 'jfif', 'PNG'):
        save_image(Path(f'data/train/ant/0.{suffix}'))
    Path('data/train/notes.txt').write_text('none')
    runner = run_train([save_config()])
    assert len(runner.train_dataloader.dataset) == 12
    assert not any('are skipped' in line for line in warnings(runner))
    save_image(Path('data/train/lost.png'))     # in no class
    runner = run_train(['run.py', '--no-resume'])
    assert any(re.search('train_dataloader.*1 .*are skipped.*lost.png', line)
               for line in warnings(runner))


def test_evaluation_of_a_part(folder):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1, bee=1, cat=1))
    refused('val_dataloader.drop_last skips 1 of 3 images', run_train,
            save_config(**{'val_dataloader.drop_last': True}))


def test_flat_folder_without_labels(folder):
    """Pretraining reads no label: images in one folder, or in folders at any depth."""
    config = save_pretraining()
    for name in ('a.jpg', 'b.png', 'deep/er/c.webp', 'deep/d.jpg'):
        save_image(Path('photos') / name)
    for labelled in ('False', 'True'):
        runner = run_train([config, '--no-resume', *options(
            'train_dataloader.dataset.data_root=photos', 'train_dataloader.dataset.data_prefix=',
            f'train_dataloader.dataset.with_label={labelled}')])
        assert len(runner.train_dataloader.dataset) == 4
    classes(val=dict(ant=1))
    save_image(Path('data/train/a.jpg'))
    refused("train_dataloader: 'data/train' has images, but no folders of classes", run_train,
            save_config())


def test_knn_compares_names_and_uses_every_image(folder):
    """Grey levels are the classes, so that a neighbour of the same class is always the nearest."""
    levels = dict(ant=20, bee=120, cat=220)
    for split, names in dict(train=('ant', 'bee', 'cat'), val=('bee', 'cat')).items():
        for name in names:
            for i in range(3):
                path = Path(f'data/{split}/{name}/{i}.png')
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(i).integers(0, 9, (28, 28, 3), dtype=np.uint8)
                Image.fromarray(noise + levels[name]).save(path)
    # nine images in batches of two: drop_last of the training loader would lose one of cat
    config = save_config(**{'train_dataloader.drop_last': True,
                            'model.backbone.layer_scale_init_value': None})
    checkpoint = save_classifier(('ant', 'bee', 'cat'))
    knn = load_tool('knn').main
    assert knn([config, checkpoint, '-k', '3', '--block', '0'])['top1'] == 100.
    classes(val=dict(dog=1))
    refused('test_dataloader has the class dog', knn, config, checkpoint)


def test_probe_compares_names(folder):
    config = save_pretraining()
    classes(train=dict(ant=2, bee=2), val=dict(bee=1, cow=1))
    cfg = Config.fromfile(config)
    loaders = {f'{name}_dataloader': dict(batch_size=2, dataset=dict(
        type='CustomDataset', data_root='data', data_prefix=split,
        pipeline=cfg.train_dataloader.dataset.pipeline))
        for name, split in dict(bank='train', query='val').items()}
    cfg.custom_hooks = [dict(type='OnlineProbeHook', interval=1, **loaders)]
    cfg.dump(config)
    refused('query_dataloader has the class cow, and bank_dataloader', run_train, config)


# ---------------------------------------------------------------- the run as a whole


@pytest.fixture
def trainable(folder):
    classes(train=dict(ant=2, bee=2, cat=2), val=dict(ant=1, bee=1, cat=1))
    return save_config


def test_batch_larger_than_the_data_set(trainable):
    refused('train_dataloader.batch_size is 8, but the data set has 6 images', run_train,
            trainable(**{'train_dataloader.batch_size': 8}))


def test_odd_batches(trainable):
    refused('Mixup.* even.*3', run_train, trainable(**{'train_dataloader.batch_size': 3}))
    refused('Mixup.*drop_last', run_train, trainable(**{
        'train_dataloader.batch_size': 4, 'train_dataloader.drop_last': False,
        'train_dataloader.dataset.indices': 5}))


@pytest.mark.parametrize('end, length', [(1600, 2), (1, 2)])
def test_schedule_and_length(trainable, end, length):
    refused(rf'ends after epoch {end}.* run after {length}; set param_scheduler.end={length}',
            run_train, trainable(**{'param_scheduler.end': end}))


def test_schedules_of_others(trainable):
    cosine = dict(type='CosineAnnealingLR', T_max=10, by_epoch=True, begin=0, end=10)
    refused('param_scheduler.*ends after epoch 10', run_train,
            trainable(param_scheduler=[cosine]))
    warm = [dict(type='LinearLR', start_factor=0.1, by_epoch=True, end=1),
            dict(cosine, begin=1, end=2, T_max=1)]
    assert run_train([trainable(param_scheduler=warm)]).iter == 6
    assert run_train([trainable(param_scheduler=[dict(type='ConstantLR', factor=1.)]),
                      '--no-resume']).iter == 6


@pytest.mark.parametrize('scheduler', [
    dict(type='CosineAnnealingLR', T_max=90), dict(type='MultiStepLR', milestones=[30, 60, 90]),
    dict(type='StepLR', step_size=90)])
def test_schedules_whose_shape_is_longer_than_the_run(trainable, scheduler):
    """mmengine ends each of them with the run."""
    refused('ends after epoch 90, but the run after 2', run_train,
            trainable(param_scheduler=[dict(scheduler, by_epoch=True)]))


def test_what_only_mmengine_would_find_later(trainable):
    for change, sentence in (
            ({'train_cfg.max_epochs': -1}, 'max_epochs must be an integer from 1, got -1'),
            ({'train_cfg.val_interval': 0}, 'val_interval must be an integer from 1, got 0'),
            ({'train_dataloader.sampler': dict(type='InfiniteSampler')}, 'sampler is infinite'),
            ({'default_hooks.checkpoint.save_best': 'accuracy/top5'}, 'returns accuracy/top1[.]'),
            ({'val_evaluator': None}, 'no val_evaluator; a run that validates needs'),
            ({'train_dataloader.dataset.data_root': 5}, 'not int'),
            # in the first step
            ({'model.backbone.patch_size': 13}, 'not a multiple of the patch of 13x13'),
            ({'train_dataloader.dataset.pipeline': []}, 'inputs')):
        refused(sentence, run_train, trainable(**change))


@pytest.mark.parametrize('topk', [5, (5,)])
def test_no_k_is_left(trainable, topk):
    runner = run_train([trainable(**{'val_evaluator.topk': topk, 'model.head.cal_acc': True,
                                     'model.head.topk': (1, 5),
                                     'model.data_preprocessor.batch_augments': None,
                                     'model.head.loss': dict(
                                         type='CrossEntropyLoss', _delete_=True)})])
    assert runner.val_evaluator.metrics[0].topk == (1,) and runner.model.head.topk == (1,)


def test_average_that_stays_where_it_began(trainable):
    average = [dict(type='ModelEMAHook', momentum=1e-3)]
    refused('ModelEMAHook.*momentum 0.001.*6 updates.*99 %', run_train,
            trainable(custom_hooks=average))
    average[0]['momentum'] = 0.2
    assert any('ModelEMAHook' in line for line in warnings(run_train(
        [trainable(custom_hooks=average)])))


def test_monitor_that_never_speaks(folder):
    config = save_pretraining()
    monitor = [dict(type='NEPAMonitorHook', interval=100)]
    Config(dict(Config.fromfile(config), custom_hooks=monitor)).dump(config)
    found = warnings(run_train([config]))
    assert sum('NEPAMonitorHook' in line and '100' in line for line in found) == 1


def test_errors_of_what_the_runner_builds_late(trainable):
    for change, sentence in (
            ({'train_dataloader.dataset.type': 'CustomDatset'}, 'train_dataloader.*CustomDatset'),
            ({'train_dataloader.dataset.extension': ['.jpg']}, 'train_dataloader.*extension'),
            ({'optim_wrapper.optimizer.type': 'AdamWW'}, 'optim_wrapper.*AdamWW'),
            ({'optim_wrapper.optimizer.wd': 0.1}, 'optim_wrapper.*wd'),
            ({'optim_wrapper.paramwise_cfg.layer_decay': 0.5}, 'optim_wrapper.*layer_decay'),
            ({'param_scheduler.warmups': 2}, 'param_scheduler.*warmups'),
            ({'val_dataloader.sampler.type': 'Sampler'}, 'val_dataloader.*Sampler'),
            ({'model.backbone.drop_path': 0.1}, 'drop_path'),
            ({'train_dataloader.dataset.pipeline': [dict(type='Rezise')]},
             'train_dataloader.*Rezise'),
            ({'train_dataloader.dataset.pipeline': [dict(type='RandomResizedCrop', scale=28)]},
             'train_dataloader: .*img'),
            ({'val_dataloader.dataset.pipeline': [dict(type='LoadImageWithPillow'),
                                                  dict(type='CenterCrop', crop_size='a')]},
             'val_dataloader'),
            ({'val_evaluator.type': 'Acuracy'}, 'Acuracy')):
        refused(sentence, run_train, trainable(**change))


def test_a_refused_run_keeps_what_was_there(trainable):
    run_train([trainable()])
    before = {path: path.read_bytes() for path in Path('work_dirs').rglob('*') if path.is_file()}
    refused('param_scheduler', run_train, trainable(**{'param_scheduler.end': 7}), '--no-resume')
    assert before == {path: path.read_bytes()
                      for path in Path('work_dirs').rglob('*') if path.is_file()}


@pytest.mark.parametrize('load', ['LoadImageWithPillow', 'LoadImageFromFile'])
def test_damaged_image_in_a_worker_ends_in_one_sentence(trainable, folder, load):
    Path('data/train/cat/1.jpg').write_bytes(b'\xff\xd8\xff nothing')
    pipeline = [dict(type=load), dict(type='Resize', scale=(28, 28)), dict(type='PackInputs')]
    config = trainable(**{'train_dataloader.dataset.pipeline': pipeline,
                          'train_dataloader.num_workers': 2})
    code, output = run_script('train.py', config, cwd=folder)
    assert code == 2 and 'Traceback' not in output
    assert re.search('error: The image data/train/cat/1.jpg cannot be read', output)


# ---------------------------------------------------------------- what loads


def test_weights_of_another_network(folder):
    config = save_pretraining()
    run_train([config])
    start = ('model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.prefix=backbone.',
             'model.backbone.init_cfg.checkpoint=work_dirs/pretrain/epoch_1.pth')
    for change, sentence in (
            ('model.backbone.gated_mlp=True', 'another network.*layers.0.mlp'),
            ('model.backbone.arch.num_layers=4', 'another network.*layers.3'),
            ('model.backbone.arch.num_layers=2', 'another network.*layers.2'),
            ('model.backbone.num_register_tokens=1', 'another network.*register_tokens'),
            ('model.backbone.patch_size=7', 'patch_embed.projection.weight has shape')):
        refused(sentence, run_train, config, '--work-dir', 'b', *options(*start, change))
        refused(sentence, run_train, config, '--work-dir', 'b', *options(
            'load_from=work_dirs/pretrain/epoch_1.pth', change))
    assert run_train([config, '--work-dir', 'b', *options(*start)]).iter == 2
    # the same tensors, another function
    found = warnings(run_train([config, '--work-dir', 'c', *options(
        *start, 'model.backbone.rope_theta=50.', 'experiment_name=theta')]))
    assert any('rope_theta' in line and '50' in line and '100' in line for line in found)


def test_resume_of_another_experiment(folder):
    config = save_pretraining()
    run_train([config])
    two = 'train_cfg.max_epochs=2'
    change = options(two, 'model.head.shift=2')
    refused('work_dirs/pretrain.*model.head.shift.*--no-resume.*--resume', run_train, config,
            *change)
    refused('data_root', run_train, config, *options(
        two, 'train_dataloader.dataset.data_root=./data/imagenet'))
    assert run_train([config, '--resume', *change]).iter == 4      # asked for
    runner = run_train([config, *options('train_cfg.max_epochs=3', 'model.head.shift=2',
                                         'optim_wrapper.optimizer.lr=0.2')])
    assert any('optim_wrapper.optimizer.lr' in line for line in warnings(runner))
