"""The same run on other numbers of processes: samples, learning rates, weights, as typed."""
import json
import shutil
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmpretrain.datasets import CustomDataset

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.loading import select_weights
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint

from . import recorder  # noqa: F401  for runs in this process
from .tiny_runs import options, refused, run_script, run_train, save_image, save_pretraining

COUNT = count()
NUM, EPOCHS = 12, 5
# processes, samples of a batch, accumulated batches: two samples an update
LAYOUTS = dict(two_processes=(2, 1, 1), one_process=(1, 2, 1), accumulated=(1, 1, 2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(NUM):
        save_image(Path(f'data/imagenet/train/n{i % 2:08d}/{i}.JPEG'))
    return tmp_path


@DATASETS.register_module()
class Labelled(CustomDataset):
    """What a ClassBalancedDataset asks for, of data without labels."""

    def get_cat_ids(self, idx):
        return [idx % 4 > 0]


def save_run(wrap=None, change=None, param_scheduler=None):
    """Everything that a resumed run has to get right, six updates an epoch."""
    cfg = Config.fromfile(save_pretraining())
    cfg.custom_imports = dict(imports=['nepa_mm', 'tests.recorder'], allow_failed_imports=False)
    cfg.default_hooks.update(
        checkpoint=dict(type='AtomicCheckpointHook', interval=1),
        resume=dict(type='ExactResumeHook'), guard=dict(type='NonFiniteGuardHook'))
    cfg.custom_hooks = [dict(type='RecorderHook'), dict(type='ModelEMAHook', momentum=0.1)]
    cfg.default_hooks.run_check = dict(type='RunCheckHook', odd='warn')
    cfg.randomness = dict(seed=1, diff_rank_seed=True)
    cfg.model.backbone.update(rope_rescale=2., drop_path_rate=0.3)
    cfg.optim_wrapper = dict(
        type='BF16OptimWrapper', constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
        paramwise_cfg=dict(layer_decay_rate=0.7))
    cfg.param_scheduler = dict(type='LayerDecayCosineLR', warmup_ratio=0.3, per_layer_warmup=True,
                               convert_to_iter_based=True, end=EPOCHS)
    data = cfg.train_dataloader.dataset
    data.pipeline = [dict(type='LoadImageWithPillow'), dict(type='RandomResizedCrop', scale=28),
                     dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
    for file in Path('data/imagenet/train').glob('n*/*'):    # not those of save_pretraining
        if int(file.stem) >= NUM:
            file.unlink()
    if wrap:
        cfg.train_dataloader.dataset = wrap(data)
    cfg.train_dataloader.update(sampler=dict(type='DefaultSampler', shuffle=True), num_workers=2)
    cfg.train_cfg.max_epochs = EPOCHS
    if param_scheduler:
        cfg.param_scheduler = param_scheduler
    if change:
        change(cfg)
    cfg.dump('run.py')
    return 'run.py'


def train(config, work_dir, layout, *values, stop_at=None, status=0):
    """Run ``dist_train.sh``, or train.py for one process, and return what it said."""
    processes, batch_size, counts = LAYOUTS[layout]
    values = [f'train_dataloader.batch_size={batch_size}', *values]
    if counts > 1:
        values.append(f'optim_wrapper.accumulative_counts={counts}')
    if stop_at:
        values.append(f'custom_hooks.0.stop_at={stop_at * counts}')
    tool = ['train.py', config] if processes == 1 else ['dist_train.sh', config, processes]
    code, output = run_script(*tool, '--work-dir', work_dir, *options(*values), cwd=Path.cwd())
    assert code == status or status and code, output    # the launcher has a status of its own
    return output


def updates(work_dir):
    """Per update: learning rates, files in their order, sums of pixels, losses."""
    records = [list(map(json.loads, open(file))) for file in
               sorted(Path(work_dir).glob('record_*.jsonl'))]
    rows, micro_steps = [], []
    lengths = set(map(len, records))
    for step in (zip(*records) if len(lengths) == 1 else chain()):
        micro_steps += step
        if step[0]['update']:
            rows.append((step[0]['lr'], *(list(chain(*(row[key] for row in micro_steps)))
                                          for key in ('files', 'pixels')),
                         [row['loss'] for row in micro_steps]))
            micro_steps = []
    return rows


def change(config, work_dir, *layouts):
    """Run on one layout after the other, each stopped in the middle of another epoch."""
    rows, said = [], []
    for i, layout in enumerate(layouts):
        last = i == len(layouts) - 1
        said.append(train(config, work_dir, layout, stop_at=None if last else (4, 15, 22)[i],
                          status=0 if last else 143))
        rows += updates(work_dir)
        for file in Path(work_dir).glob('record_*.jsonl'):
            file.unlink()
    return rows, said


def weights(work_dir):
    state = read_checkpoint(find_resumable_checkpoint(work_dir)[0])
    return [tensor for key in ('state_dict', 'ema_state_dict') for tensor in state[key].values()]


def test_the_same_run_on_other_numbers_of_processes(folder):
    config = save_run()
    train(config, 'straight', 'two_processes')
    expected = updates('straight')
    assert len(expected) == 6 * EPOCHS and len({str(row[0]) for row in expected}) > 25
    assert expected[0][1] != expected[6][1] and expected[-1][0][0] > 0
    # the same additions in the same order: bit for bit
    rows, said = change(config, 'same', 'two_processes', 'accumulated', 'two_processes')
    assert rows == expected
    assert all(map(torch.equal, weights('same'), weights('straight')))
    assert '1 processes x 1 samples x 2 accumulated (it had 2 processes x 1 samples x 1' in said[1]
    assert 'The optimizer follows' not in ''.join(said)
    # of a batch of two the network draws once, and adds in another order
    rows, _ = change(config, 'all', 'two_processes', 'one_process', 'accumulated', 'two_processes')
    assert [row[:3] for row in rows] == [row[:3] for row in expected]


def test_the_same_iterations_on_other_numbers_of_processes(folder):
    config = save_run(change=by_iterations)
    train(config, 'straight', 'one_process')
    rows, _ = change(config, 'work', 'two_processes', 'one_process')
    assert [row[:3] for row in rows] == [row[:3] for row in updates('straight')]


# ---------------------------------------------------------------------- what differs


def rates(work_dir='work_dirs/run'):
    """Learning rates of the last block, per update, of a run in one process."""
    return [row[0][-1] for row in updates(work_dir)]


def run(config, *values, flags=()):
    """Run in this process, under a name of its own: mmengine remembers loggers by name."""
    return run_train([config, *flags, *options(f'experiment_name=resume{next(COUNT)}', *values)])


def stopped(config, stop_at, *values):
    """Run in this process until SIGTERM, and forget what was recorded."""
    with pytest.raises(SystemExit) as ended:
        run(config, f'custom_hooks.0.stop_at={stop_at}', *values)
    assert ended.value.code == 143
    Path('work_dirs/run/record_0.jsonl').unlink()


def said(runner):
    """Warnings and worse in the log of a run."""
    return [line.split(' - ', 3)[-1] for file in Path(runner.log_dir).glob('*.log')
            for line in file.read_text().splitlines() if ' - WARNING - ' in line]


ALONE = ('train_dataloader.num_workers=0', 'train_dataloader.batch_size=2')
SMALLER = ('train_dataloader.num_workers=0', 'train_dataloader.batch_size=1')


@pytest.mark.parametrize('scheduler', [
    dict(type='LayerDecayCosineLR', warmup=1, convert_to_iter_based=True, end=EPOCHS),
    dict(type='CosineAnnealingLR', T_max=EPOCHS, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=EPOCHS),
    [dict(type='LinearLR', start_factor=0.1, end=1, convert_to_iter_based=True),
     dict(type='PolyLR', begin=1, end=EPOCHS, convert_to_iter_based=True)]])
def test_the_schedule_is_a_function_of_the_samples(folder, scheduler):
    """A batch of one, then of two: every second of the rates, and from there all."""
    config = save_run(param_scheduler=scheduler)
    run(config, *ALONE)
    straight = rates()
    shutil.rmtree('work_dirs')
    stopped(config, 14, *SMALLER)
    runner = run(config, *ALONE)
    assert rates() == straight[7:] and runner.iter == 6 * EPOCHS
    assert any('1 processes x 2 samples x 1 accumulated (it had 1 processes x 1 sample' in line
               for line in said(runner))


def test_a_checkpoint_of_an_earlier_version(folder):
    """Then the loader of images and the depth of a parameter group had other names."""
    config = save_run()
    run(config, *ALONE)
    straight = updates('work_dirs/run')
    shutil.rmtree('work_dirs')
    stopped(config, 14, *ALONE)
    path = 'work_dirs/run/interrupted.pth'
    checkpoint = torch.load(path, weights_only=False)
    text = checkpoint['meta']['cfg']
    checkpoint['meta']['cfg'] = text.replace('LoadImageWithPillow', 'LoadWholeImage')
    assert checkpoint['meta']['cfg'] != text
    for group in checkpoint['optimizer']['param_groups']:
        group['layer_scale'] = group.pop('depth_from_top')
    torch.save(checkpoint, path)
    runner = run(config, *ALONE)
    assert updates('work_dirs/run') == straight[14:]
    assert not any('LoadImageWithPillow' in line for line in said(runner))


def test_the_config_says_length_and_learning_rate(folder):
    config = save_run()
    longer = [f'train_cfg.max_epochs={2 * EPOCHS}', f'param_scheduler.end={2 * EPOCHS}',
              'optim_wrapper.optimizer.lr=0.02', 'optim_wrapper.optimizer.weight_decay=0.2']
    run(config, *ALONE, *longer)
    straight = rates()
    shutil.rmtree('work_dirs')
    stopped(config, 8, *ALONE)
    runner = run(config, *ALONE, *longer)
    assert rates() == straight[8:] and len(straight) == 12 * EPOCHS
    line, = [line for line in said(runner) if 'The optimizer follows the config' in line]
    assert 'weight_decay is 0.2 and was 0.05' in line and 'lr is' in line
    assert {group['weight_decay'] for group in runner.optim_wrapper.param_groups} == {0.2, 0.}


def test_another_seed_or_number_of_samples_is_said(folder):
    config = save_run()
    seed = 'randomness.seed=None'       # drawn at every start
    run(config, *ALONE, seed)
    order = [row[1] for row in updates('work_dirs/run')]
    checkpoint = read_checkpoint(f'work_dirs/run/epoch_{EPOCHS}.pth')
    drawn = checkpoint['meta']['run']['seed']
    Path('work_dirs/run/record_0.jsonl').unlink()
    runner = run(config, *ALONE, seed, flags=['--resume', 'work_dirs/run/epoch_2.pth'])
    assert [row[1] for row in updates('work_dirs/run')] == order[12:]
    assert any(f'The seed {drawn} of the checkpoint is used' in line for line in said(runner))
    save_image(Path('data/imagenet/train/n00000000/more.JPEG'))
    runner = run(config, *ALONE, seed, flags=['--resume', 'work_dirs/run/epoch_2.pth'])
    assert any('has 13 samples and had 12' in line for line in said(runner))


@pytest.mark.parametrize('wrap', [
    lambda data: dict(type='RepeatDataset', times=2, dataset=data),
    lambda data: dict(type='ConcatDataset', datasets=[data, data]),
    lambda data: dict(type='KFoldDataset', fold=0, num_splits=3, dataset=data),
    lambda data: dict(type='ClassBalancedDataset', oversample_thr=0.9, dataset=dict(
        data, type='Labelled'))], ids=['repeat', 'concat', 'fold', 'balanced'])
def test_samples_of_wrapped_data_sets_draw_the_same(folder, wrap):
    config = save_run(wrap)
    for workers in (0, 2):
        run(config, *ALONE[1:], f'train_dataloader.num_workers={workers}',
            'train_cfg.max_epochs=2', 'param_scheduler.end=2', flags=['--work-dir', f'{workers}'])
    assert updates('0') == updates('2')
    pixels = [tuple(row[2]) for row in updates('0')]
    assert len(set(pixels)) == len(pixels) >= 2 * 4     # augmented anew every time


def by_iterations(cfg):
    cfg.train_cfg = dict(by_epoch=False, max_iters=30)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5),
        dict(type='PolyLR', power=1., by_epoch=False, begin=5, end=30)]
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=10)
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'


@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_iteration_based_runs_go_on_exactly(folder, sampler):
    """Five passes over the data, of which the first of 12 samples ends within a batch of five."""
    config = save_run(change=by_iterations)
    sampler = f'train_dataloader.sampler.type={sampler}'
    run(config, *ALONE, sampler)
    straight = updates('work_dirs/run')
    final = weights('work_dirs/run')
    assert sorted(chain(*(row[1] for row in straight[:6]))) == sorted(
        f'{i}.JPEG' for i in range(NUM))
    assert straight[0][1:3] != straight[6][1:3]
    shutil.rmtree('work_dirs')
    stopped(config, 14, *ALONE, sampler)
    run(config, *ALONE, sampler)
    assert updates('work_dirs/run') == straight[14:]
    assert all(map(torch.equal, weights('work_dirs/run'), final))
    shutil.rmtree('work_dirs')
    twice = ['train_cfg.max_iters=60', 'param_scheduler.0.end=10', 'param_scheduler.1.begin=10',
             'param_scheduler.1.end=60']
    stopped(config, 28, *SMALLER, sampler, *twice)
    runner = run(config, *ALONE, sampler)
    assert [row[1] for row in updates('work_dirs/run')] == [row[1] for row in straight[14:]]
    assert any('14 of 30 iterations (28 of 60 samples) are done' in line
               for line in said(runner))
    shutil.rmtree('work_dirs')
    stopped(config, 20, *ALONE, sampler)
    with refused('has seen 40 samples, and train_cfg.max_iters=30 ends this run after 30'):
        run(config, *SMALLER, sampler)


# ---------------------------------------------------------------------- what does not fit


def narrower(state):
    state['state_dict']['backbone.layers.0.mlp.fc1.weight'] = torch.zeros(3, 3)


def damaged_average(state):
    del state['ema_state_dict']['module.backbone.layers.1.mlp.fc1.weight']


def damaged_moment(state):
    state['optimizer']['state'][1]['exp_avg'] = torch.zeros(2)


def other_groups(state):
    state['optimizer']['param_groups'].pop()


def no_moment(state):
    del state['optimizer']['state'][2]['exp_avg_sq']


def no_optimizer(state):
    del state['optimizer']


def odd_place(state):
    state['meta']['run']['position'] = 'x'


def empty_optimizer(state):
    state['optimizer'] = {}


@pytest.mark.parametrize('damage, sentence', [
    (narrower, r'layers.0.mlp.fc1.weight has shape \(3, 3\)'),
    (damaged_average, 'layers.1.mlp.fc1.weight'),
    (damaged_moment, r'exp_avg of \S+ has shape \(2,\)'),
    (other_groups, 'has groups of .* paramwise_cfg'),
    (no_moment, 'its optimizer lacks'),
    (no_optimizer, 'holds no optimizer state'),
    (odd_place, 'has no valid progress of the run'),
    (empty_optimizer, 'its optimizer holds no parameter groups')])
def test_what_does_not_fit_is_refused(folder, damage, sentence):
    config = save_run()
    run(config, *ALONE, 'train_cfg.max_epochs=1')
    state = read_checkpoint('work_dirs/run/epoch_1.pth')
    damage(state)
    torch.save(state, 'odd.pth')
    before = sorted(Path('work_dirs/run').iterdir())
    with refused(sentence):
        run(config, *ALONE, flags=['--resume', 'odd.pth'])
    assert sorted(Path('work_dirs/run').iterdir()) == before


def test_without_an_average_the_raw_weights_go_on(folder):
    run(save_run(), *ALONE)
    expected = select_weights(read_checkpoint(f'work_dirs/run/epoch_{EPOCHS}.pth'), 'raw')
    config = save_run(change=lambda cfg: cfg.custom_hooks.pop())
    runner = run(config, *ALONE, flags=[
        '--work-dir', 'raw', '--resume', 'work_dirs/run/epoch_2.pth'])
    assert any('this run has no EMA hook' in line for line in said(runner))
    found = read_checkpoint(f'raw/epoch_{EPOCHS}.pth')['state_dict']
    assert all(torch.equal(found[name], expected[name]) for name in expected)
