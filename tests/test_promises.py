"""docs/long_runs.md: each promise, tried by the command that a user types.

`make faults` tries more of each kind.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint

from .conftest import REPO
from .faults.disks import can_mount, full_disk, mounted
from .faults.disks import save_config as save_disks_config
from .test_resume import save_run, updates, weights
from .tiny_runs import TOOLS, options, run_script, save_classifier, save_image

FAST = ('train_dataloader.num_workers=0', 'train_dataloader.batch_size=2')
SLOW = ('train_dataloader.num_workers=2', 'train_dataloader.batch_size=2',
        'custom_hooks.0.seconds=0.2')


@pytest.fixture(scope='module')
def origin(tmp_path_factory):
    """Twelve images, a config of five epochs with the hooks of our configs, and its run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('origin'))
        for i in range(12):
            save_image(Path(f'data/imagenet/train/n{i % 2:08d}/{i}.JPEG'))
        save_run(change=lambda cfg: cfg.default_hooks.update(
            Config.fromfile(REPO / 'configs/_base_/runtime.py').default_hooks))
        train('straight', *FAST)
        return Path.cwd()


@pytest.fixture
def folder(origin, tmp_path, monkeypatch):
    """A copy of it, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    return tmp_path


def train(work_dir, *values, config='run.py', status=0, flags=()):
    code, output = run_script('train.py', config, '--work-dir', work_dir, *flags,
                              *(options(*values) if values else ()), cwd=Path.cwd())
    assert code == status, output
    return output


def begin(work_dir, *values, before=()):
    """Start the same command in a process group of its own, and wait for its first iterations."""
    shutil.rmtree(work_dir, ignore_errors=True)
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PYTHONPATH=str(REPO))
    program = subprocess.Popen(
        [*before, sys.executable, TOOLS / 'train.py', 'run.py', '--work-dir', work_dir,
         *options(*values)], env=env, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    record = Path(work_dir, 'record_0.jsonl')
    while not (record.is_file() and len(record.read_text().splitlines()) > 7):
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.05)
    return program


def sentence(output):
    """The one line that tells a user what is wrong."""
    assert 'Traceback' not in output, output
    found, = [line for line in output.splitlines() if line.startswith('error: ')]
    return found


def same_weights(one, other):
    return all(map(torch.equal, weights(one), weights(other)))


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(folder):
    program = begin('killed', *SLOW)
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    newest = Path(find_resumable_checkpoint('killed')[0])
    assert newest.name == 'epoch_1.pth'
    torn = Path('killed/epoch_2.pth')
    torn.write_bytes(newest.read_bytes()[:-10])
    output = train('killed', *FAST)
    assert 'Not resumed: ' in output and 'killed/epoch_2.pth is truncated or corrupt.' in output
    assert same_weights('killed', 'straight')


def test_sigterm_saves_and_ends_with_143(folder):
    """Sent to ``timeout``, which sends it on to the run and to the workers of its loader."""
    program = begin('work', *SLOW, before=['timeout', '--preserve-status', '600'])
    os.kill(program.pid, signal.SIGTERM)
    output = program.communicate(timeout=60)[0]
    assert program.returncode == 143 and 'SIGTERM: saving interrupted.pth' in output, output
    assert 'Traceback' not in output
    half = len(updates('work'))
    assert 7 < half < 30
    assert 'interrupted.pth' in train('work', *FAST)
    assert updates('work') == updates('straight')       # no sample twice, none lost
    assert same_weights('work', 'straight')


def test_it_goes_on_with_another_number_of_processes(folder):
    """See test_resume.py for every update."""
    program = begin('work', *SLOW)
    os.kill(program.pid, signal.SIGTERM)
    assert program.wait(60) == 143
    before = len(updates('work'))
    Path('work/record_0.jsonl').unlink()
    code, output = run_script('dist_train.sh', 'run.py', 2, '--work-dir', 'work', *options(
        'train_dataloader.batch_size=1'), cwd=folder)
    assert code == 0, output
    assert '2 processes x 1 samples x 1 accumulated (it had 1 processes x 2 samples' in output
    assert before + len(updates('work')) == 30


def test_the_config_says_what_goes_on(folder):
    save_image(Path('data/imagenet/train/n00000000/more.JPEG'))
    output = train('straight', *FAST, 'train_cfg.max_epochs=6', 'param_scheduler.end=6',
                   'optim_wrapper.optimizer.lr=0.02', 'randomness.seed=2')
    assert 'The training data has 13 samples and had 12' in output
    assert 'of the checkpoint is used, not the 2 of this run' in output
    assert re.search('The optimizer follows the config .*lr is', output)


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not can_mount():
        pytest.skip('only root may mount a file system')
    save_disks_config()
    assert full_disk() is None


def test_a_full_disk_is_an_error_if_asked_for(folder):
    if not can_mount():
        pytest.skip('only root may mount a file system')
    with mounted('disk', 'size=3m'):
        output = train('disk', *FAST, 'default_hooks.checkpoint.on_write_error=raise',
                       'default_hooks.checkpoint.max_keep_ckpts=-1', status=1)
        assert 'No space left on device' in output
        assert find_resumable_checkpoint('disk')[0] and not list(Path('disk').glob('.*.pth'))


def test_one_run_in_a_folder(folder):
    program = begin('work', *SLOW)
    os.killpg(program.pid, signal.SIGSTOP)      # it does not end while the other one starts
    assert 'Another run writes into' in sentence(train('work', *FAST, status=2))
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    train('work', *FAST)


def test_a_copied_run_leaves_the_other_alone(folder):
    save_classifier()
    cfg = Config.fromfile('classify.py')
    cfg.default_hooks.update(resume=dict(type='ExactResumeHook'), checkpoint=dict(
        type='AtomicCheckpointHook', save_best='accuracy/top1'))
    cfg.resume, cfg.optim_wrapper.optimizer.lr = True, 0.
    cfg.dump('classify.py')
    train('a', config='classify.py')
    best, = Path('a').glob('best_*')
    shutil.copytree('a', 'b')
    cfg.train_cfg.max_epochs, cfg.optim_wrapper.optimizer.lr = 8, 0.1     # it learns
    cfg.dump('classify.py')
    train('b', config='classify.py')
    newer, = Path('b').glob('best_*')
    assert best.is_file() and newer.name != best.name


def test_a_step_that_is_not_finite_is_left_out(folder):
    """A loss that is infinite in iteration 5 ends the run with its files, or is skipped."""
    broken = 'custom_hooks.0.broken=4'
    output = train('work', *FAST, broken, status=1)
    assert 'The loss or a gradient is not finite in iteration 5' in output
    assert re.search(r'rank 0: \S+JPEG, \S+JPEG', output)
    assert 'Step skipped, 1 of 5' in train('b', *FAST, broken, 'default_hooks.guard.max_skipped=5')
    assert all(tensor.isfinite().all() for tensor in weights('b'))


def test_an_unreadable_image_is_replaced(folder):
    Path('data/imagenet/train/n00000000/4.JPEG').write_bytes(b'\xff\xd8\xff\xe0')
    short = ('train_cfg.max_epochs=2', 'param_scheduler.end=2',
             'default_hooks.unreadable.max_share=0.1')
    for work_dir, workers in (('a', 0), ('b', 2)):
        output = train(work_dir, FAST[1], f'train_dataloader.num_workers={workers}', *short)
        assert '4.JPEG' in output and '1 of 12 samples were replaced' in output
    assert same_weights('a', 'b')
    assert 'max_share' in sentence(train('c', *FAST, status=2))


def test_another_state_is_refused(folder):
    state = read_checkpoint('straight/epoch_5.pth')
    state['optimizer']['state'][0]['exp_avg'] = torch.zeros(2)
    torch.save(state, 'odd.pth')
    assert 'exp_avg of' in sentence(train(
        'other', *FAST, flags=('--resume', 'odd.pth'), status=2))
    assert 'model.backbone.patch_size' in sentence(train(
        'straight', *FAST, 'model.backbone.patch_size=7', status=2))
    assert not Path('other').exists()


def test_a_strangers_checkpoint_executes_nothing(folder):
    """See test_safety.py for every entrance."""
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path('executed'),)

    torch.save(dict(state_dict=dict(a=torch.zeros(1)), meta={}, evil=Evil()), 'evil.pth')
    for values in (('load_from=evil.pth',), (
            'model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=evil.pth'
            )):
        assert 'can be read safely' in sentence(train('work', *FAST, *values, status=2))
    assert not Path('executed').exists()
