"""Checkpoints that are whole, resuming exactly, SIGTERM, a full disk."""
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.utils.data import DataLoader

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint
from nepa_mm.utils.signals import shield_workers

from .conftest import REPO
from .tiny_runs import (
    options,
    refused,
    run_test,
    run_train,
    save_classifier,
    save_pretraining,
)


@HOOKS.register_module()
class RecordHook(Hook):
    """Every loss and every file, and a SIGTERM after iteration ``stop_at``."""

    priority = 'HIGHEST'

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def before_train(self, runner):
        runner.losses, runner.files = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.losses.append(outputs['loss'].item())
        runner.files += [Path(sample.img_path).name for sample in data_batch['data_samples']]
        RecordHook.last = runner
        if runner.iter + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two iterations of two images an epoch, everything in it that draws random numbers."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(save_pretraining())
    cfg.default_hooks.checkpoint = dict(
        type='AtomicCheckpointHook', interval=1, max_keep_ckpts=2)
    cfg.default_hooks.resume = dict(type='ExactResumeHook')
    cfg.default_hooks.run_check = dict(type='RunCheckHook', odd='warn')     # runs are cut
    cfg.custom_hooks = [dict(type='RecordHook'), dict(type='ModelEMAHook', momentum=0.1)]
    cfg.randomness = dict(seed=1, diff_rank_seed=True)
    cfg.model.backbone.update(rope_rescale=2., drop_path_rate=0.3)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-2)
    cfg.param_scheduler = dict(type='CosineAnnealingLR', T_max=8, by_epoch=True,
                               convert_to_iter_based=True)
    cfg.train_dataloader.sampler.shuffle = True
    cfg.train_dataloader.dataset.pipeline[1:2] = [
        dict(type='RandomResizedCrop', scale=28), dict(type='RandomFlip', prob=0.5)]
    cfg.train_cfg.max_epochs = 4
    cfg.dump('run.py')
    yield 'run.py'
    signal.signal(signal.SIGTERM, signal.SIG_DFL)   # a run that SIGTERM ended goes on noting it


def epochs(num, *more):
    return options(f'train_cfg.max_epochs={num}', *more)


def equal(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize('workers', [0, 2])
def test_resumed_at_the_end_of_an_epoch_bit_for_bit(config, workers):
    workers = f'train_dataloader.num_workers={workers}'
    straight = run_train([config, '--work-dir', 'a', *epochs(4, workers)])
    with pytest.raises(SystemExit):
        run_train([config, '--work-dir', 'b', *options('custom_hooks.0.stop_at=5')])
    Path('b/interrupted.pth').unlink()      # as if it had been killed
    resumed = run_train([config, '--work-dir', 'b', *epochs(4, workers)])
    assert len(straight.losses) == 8 and len(set(straight.losses)) == 8
    assert resumed.losses == straight.losses[4:] and resumed.files == straight.files[4 * 2:]
    one, two = (read_checkpoint(f'{folder}/epoch_4.pth') for folder in 'ab')
    assert equal(one['state_dict'], two['state_dict'])
    assert equal(one['ema_state_dict'], two['ema_state_dict'])


def test_sigterm_in_the_middle_of_an_epoch(config):
    straight = run_train([config, '--work-dir', 'a'])
    stop = options('custom_hooks.0.stop_at=3')
    with pytest.raises(SystemExit) as ended:
        run_train([config, '--work-dir', 'b', *stop])
    assert ended.value.code == 143
    first = RecordHook.last
    resumed = run_train([config, '--work-dir', 'b'])
    assert first.losses + resumed.losses == straight.losses     # bit for bit, here too
    assert first.files + resumed.files == straight.files
    assert resumed.iter == 8 and not Path('b/interrupted.pth').exists()
    log = ''.join(path.read_text() for path in Path('b').glob('*/*.log'))
    assert 'SIGTERM: saving interrupted.pth' in log
    assert 'Continuing epoch 2 after 1 iterations' in log


def test_resumed_with_another_batch_size(config):
    """As on another number of GPUs: epochs have other lengths, and every sample its turn."""
    straight = run_train([config, '--work-dir', 'a', *epochs(3)])
    with pytest.raises(SystemExit):
        run_train([config, '--work-dir', 'b', *options('custom_hooks.0.stop_at=3')])
    first = RecordHook.last
    resumed = run_train([config, '--work-dir', 'b', *epochs(3, 'train_dataloader.batch_size=1')])
    assert first.files + resumed.files == straight.files and len(straight.files) == 12
    assert len(resumed.losses) == 2 + 4
    with pytest.raises(SystemExit):     # now with larger batches, at the end of an epoch
        run_train([config, '--work-dir', 'c', *options(
            'train_dataloader.batch_size=1', 'custom_hooks.0.stop_at=9')])
    Path('c/interrupted.pth').unlink()
    resumed = run_train([config, '--work-dir', 'c', *epochs(3)])
    assert resumed.files == straight.files[8:] and len(resumed.losses) == 2


def torn(path):
    os.truncate(path, path.stat().st_size - 10)


def flipped(path):
    """One bit within a tensor; what lies between tensors is padding."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + entry.file_size // 2] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('damage', [torn, flipped, emptied])
def test_the_newest_whole_checkpoint_is_resumed(config, damage):
    straight = run_train([config])
    damage(Path('work_dirs/run/epoch_4.pth'))
    assert find_resumable_checkpoint('work_dirs/run')[0].endswith('work_dirs/run/epoch_3.pth')
    resumed = run_train([config])
    assert resumed.losses == straight.losses[6:]
    log = next(Path(resumed.log_dir).glob('*.log')).read_text()
    assert 'Not resumed: ' in log and 'work_dirs/run/epoch_4.pth' in log
    assert find_resumable_checkpoint('work_dirs/run')[0].endswith('work_dirs/run/epoch_4.pth')


def test_a_pickle_that_executes_is_not_resumed(config):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path('executed'),)

    run_train([config, *epochs(1)])
    state = read_checkpoint('work_dirs/run/epoch_1.pth')
    torch.save(dict(state, evil=Evil()), 'work_dirs/run/epoch_2.pth')
    Path('work_dirs/run/last_checkpoint').write_text('work_dirs/run/epoch_2.pth')
    assert len(run_train([config, *epochs(2)]).losses) == 2
    torch.save(dict(state, evil=Evil()), 'evil.pth')
    with refused('evil.pth is not a checkpoint that can be read safely'):
        run_train([config, '--resume', 'evil.pth'])
    assert not Path('executed').exists()


def test_outdated_files_go_after_the_new_one_is_complete(config):
    """A write that fails removes nothing."""
    Path('work_dirs/run/epoch_3.pth').mkdir(parents=True)       # no file can take its place
    with pytest.raises(OSError, match='epoch_3.pth'):
        run_train([config, *options('default_hooks.checkpoint.on_write_error=raise')])

    def left():
        return {path.name for path in Path('work_dirs/run').glob('[!.]*') if path.is_file()}

    assert left() == {'epoch_1.pth', 'epoch_2.pth', 'last_checkpoint', 'run.py'}
    Path('work_dirs/run/epoch_3.pth').rmdir()
    run_train([config])
    assert left() == {'epoch_3.pth', 'epoch_4.pth', 'last_checkpoint', 'run.py'}
    assert Path('work_dirs/run/last_checkpoint').read_text().endswith('epoch_4.pth')


@HOOKS.register_module()
class DiskHook(Hook):
    """A disk that is busy until iteration ``free_at`` is over, or that iteration's error."""

    busy = threading.Event()

    def __init__(self, free_at, fail=False):
        self.free_at, self.fail = free_at, fail

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.free_at:
            DiskHook.files = sorted(path.name for path in Path(runner.work_dir).glob('*.pth'))
            if self.fail:
                raise ArithmeticError('the run failed')
            self.busy.set()


@pytest.fixture
def busy_disk(monkeypatch):
    """Nothing is serialised while the disk is busy; tells whether it became free in time."""
    waits, save = [], torch.save

    def wait(*args, **kwargs):
        waits.append(DiskHook.busy.wait(3))
        save(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', wait)
    DiskHook.busy.clear()
    return waits


def add_disk_hook(config, **kwargs):
    cfg = Config.fromfile(config)
    cfg.custom_hooks.append(dict(type='DiskHook', **kwargs))
    cfg.dump('disk.py')
    return 'disk.py'


def test_training_continues_while_a_checkpoint_is_written(config, busy_disk):
    """The file holds the state of its iteration, though the weights have changed since."""
    waits, disk = busy_disk, add_disk_hook(config, free_at=4)
    run_train([disk, '--work-dir', 'b', *epochs(3)])
    assert DiskHook.files == [] and waits == 3 * [True]
    run_train([config, '--work-dir', 'a', *epochs(3)])
    for epoch in (2, 3):    # the last two are kept
        one, two = (torch.load(f'{folder}/epoch_{epoch}.pth', weights_only=False)
                    for folder in 'ab')
        assert equal(one['state_dict'], two['state_dict'])
        assert equal(one['ema_state_dict'], two['ema_state_dict'])
        for states in zip(*(x['optimizer']['state'].values() for x in (one, two))):
            assert equal(*states)
        assert one['meta']['run'] == two['meta']['run']
        for state in (one, two):
            assert len(state['message_hub']['log_scalars']['train/loss'].data[0]) == 2 * epoch


def test_the_state_is_copied_before_training_continues(config, busy_disk):
    """The first checkpoint is serialised after two more updates of its weights."""
    run_train([add_disk_hook(config, free_at=4), '--work-dir', 'b', *epochs(
        2, 'default_hooks.checkpoint.max_keep_ckpts=-1')])
    run_train([config, '--work-dir', 'a', *epochs(1)])
    one, two = (read_checkpoint(f'{folder}/epoch_1.pth') for folder in 'ab')
    assert equal(one['state_dict'], two['state_dict']) and two['meta']['iter'] == 2
    assert equal(one['optimizer']['state'][0], two['optimizer']['state'][0])


def test_an_error_and_sigterm_wait_for_the_checkpoint(config, busy_disk):
    """Both happen in the iteration after a save."""
    with pytest.raises(ArithmeticError):
        run_train([add_disk_hook(config, free_at=3, fail=True), '--work-dir', 'a'])
    assert DiskHook.files == []
    resumed = run_train([config, '--work-dir', 'a', *epochs(2)])    # in the same process
    assert len(resumed.losses) == 2     # of epoch 2 alone
    with pytest.raises(SystemExit) as ended:
        run_train([config, '--work-dir', 'b', *options('custom_hooks.0.stop_at=3')])
    assert ended.value.code == 143
    for name, iteration in (('epoch_1', 2), ('interrupted', 3)):
        assert read_checkpoint(f'b/{name}.pth')['meta']['iter'] == iteration


def test_a_write_that_failed_in_the_thread_is_forgotten(config):
    """The run says so, removes nothing for it, and the next file names no missing one."""
    Path('work_dirs/run/epoch_3.pth').mkdir(parents=True)       # no file can take its place
    runner = run_train([config])
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert 'could not be written, the run continues without it: ' in log
    assert {path.name for path in Path('work_dirs/run').glob('*.pth') if path.is_file()} == {
        'epoch_2.pth', 'epoch_4.pth'}
    info = read_checkpoint('work_dirs/run/epoch_4.pth')['message_hub']['runtime_info']
    assert info['keep_ckpt_ids'] == [2, 4] and info['last_ckpt'] == 'epoch_4.pth'


def test_settings_are_checked():
    hook = HOOKS.get('AtomicCheckpointHook')
    with pytest.raises(ValueError, match="'warn' or 'raise', got 'ignore'"):
        hook(on_write_error='ignore')
    with pytest.raises(ValueError, match='local files only'):
        hook(out_dir='s3://bucket')


@pytest.fixture(scope='module')
def best_run(tmp_path_factory):
    """A run in folder a, with its best checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('best'))
        cfg = Config.fromfile(save_classifier()[0])
        cfg.default_hooks.checkpoint = dict(type='AtomicCheckpointHook', interval=1,
                                            max_keep_ckpts=2, save_best='accuracy/top1')
        cfg.resume = True
        cfg.dump('run.py')
        run_train(['run.py', '--work-dir', 'a'])
        return Path.cwd()


@pytest.mark.parametrize('best', ['a/best_accuracy_top1_epoch_1.pth', 'precious', 'a/precious.pth',
                                  '../b/epoch_1.pth', None, 3])
def test_a_run_removes_its_own_files_only(best_run, tmp_path, monkeypatch, best):
    """Whatever a checkpoint of another folder, or of a stranger, says about files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(best_run, tmp_path, dirs_exist_ok=True)
    shutil.copytree('a', 'b')
    Path('precious').mkdir()
    for path in ('precious/one.pth', 'a/precious.pth'):
        Path(path).write_text('precious')
    state = torch.load('b/epoch_1.pth', weights_only=False)
    assert state['message_hub']['runtime_info']['best_ckpt'] == 'best_accuracy_top1_epoch_1.pth'
    state['message_hub']['runtime_info'] |= dict(
        best_score=-1., best_ckpt=best and str(tmp_path / best) if best != 3 else 3,
        keep_ckpt_ids=[1, '../../a/epoch_1', '/'])
    torch.save(state, 'b/epoch_1.pth')
    before = {path: path.read_bytes() for path in Path().glob('[ap]*/**/*') if path.is_file()}
    run_train(['run.py', '--work-dir', 'b', *options('train_cfg.max_epochs=3')])
    assert before == {path: path.read_bytes() for path in Path().glob('[ap]*/**/*')
                      if path.is_file()}
    left = {path.name for path in Path('b').glob('*.pth')}
    assert {'epoch_2.pth', 'epoch_3.pth'} <= left and 'epoch_1.pth' not in left
    assert left & {f'best_accuracy_top1_epoch_{epoch}.pth' for epoch in (2, 3)}
    assert ('best_accuracy_top1_epoch_1.pth' in left) == (not str(best).startswith('a/best'))


def hold_workers():
    """Read from a loader with workers that stay, as a run's, and end while they wait."""
    loader = DataLoader(list(range(4)), num_workers=2, persistent_workers=True)
    shield_workers(loader)
    multiprocessing.current_process().batches = loader, iter(loader)


@pytest.mark.parametrize('method', ['spawn', 'fork'])
def test_a_process_of_a_pool_ends_although_its_workers_ignore_sigterm(method):
    """multiprocessing sends SIGTERM to the daemons of a process that ends, and waits for them."""
    process = multiprocessing.get_context(method).Process(target=hold_workers)
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def test_a_process_kills_its_workers_before_it_collects_garbage(tmp_path):
    """Else the exit of several CPU processes waits 10 s for each, after SIGTERM or an error."""
    (tmp_path / 'exits.py').write_text(
        'import atexit, multiprocessing\n'
        'from torch.utils.data import DataLoader\n'
        'from nepa_mm.utils.signals import shield_workers\n'
        'atexit.register(lambda: print(len(multiprocessing.active_children())))\n'
        'loader = DataLoader([1, 2], num_workers=2, persistent_workers=True)\n'
        'shield_workers(loader)\n'
        'assert list(loader) and len(multiprocessing.active_children()) == 2\n'
        'raise SystemExit(3)\n')
    ended = subprocess.run([sys.executable, tmp_path / 'exits.py'], capture_output=True, text=True,
                           env=dict(os.environ, PYTHONPATH=str(REPO)))
    assert (ended.returncode, ended.stdout) == (3, '0\n'), ended.stderr


def test_runs_stop_their_workers(tmp_path, monkeypatch):
    """Else the garbage collector finds them, and waits 5 s and more for each."""
    monkeypatch.chdir(tmp_path)
    config, checkpoint = save_classifier()
    cfg = Config.fromfile(config)
    hooks = Config.fromfile(REPO / 'configs/_base_/runtime.py').default_hooks
    cfg.default_hooks = dict(hooks, checkpoint=None,
                             run_check=dict(type='RunCheckHook', odd='warn'))
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'].update(num_workers=2, persistent_workers=True)
    cfg.dump('run.py')
    before = set(multiprocessing.active_children())
    runner = run_train(['run.py', '--work-dir', 'a'])
    assert set(multiprocessing.active_children()) <= before
    assert runner.val() and set(multiprocessing.active_children()) <= before    # others started
    run_test(['run.py', checkpoint, '--work-dir', 'b'])
    assert set(multiprocessing.active_children()) <= before
