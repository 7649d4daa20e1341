"""Full and read-only disks, odd things in place of files, two runs in a folder, killed writers.

Each case is a command in a process of its own, on real file systems. A run that cannot go on ends
with status 2 and one sentence, never with a traceback, and never hangs.
"""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config

from ..tiny_runs import save_image, save_pretraining
from .signals import SECONDS, command, descendants

FILL = """
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class FillHook(Hook):
    priority = 'VERY_LOW'       # after the logger

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        filler = Path(runner.work_dir, 'filler')
        if runner.iter == 3:
            with filler.open('wb', buffering=0) as file:
                for size in (1 << 16, 1):
                    try:
                        while file.write(bytes(size)):
                            pass
                    except OSError:
                        pass
        elif runner.iter == 70:
            filler.unlink()

"""


def save_config():
    """Two iterations an epoch; a variant fills the disk in iteration 4 and empties it in 71."""
    cfg = Config.fromfile(save_pretraining())
    cfg.default_hooks.update(
        checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=2),
        resume=dict(type='ExactResumeHook'), run_check=dict(type='RunCheckHook', odd='warn'))
    cfg.custom_hooks = [dict(type='UnreadableImageHook', max_share=1.)]
    cfg.train_dataloader.dataset.pipeline[0] = dict(type='LoadImageWithPillow')
    cfg.train_cfg.max_epochs = 3
    cfg.dump('run.py')
    cfg.train_cfg.max_epochs = 40
    Path('fill.py').write_text(FILL)
    cfg.custom_imports.imports.append('fill')
    cfg.custom_hooks.append(dict(type='FillHook'))
    cfg.dump('filled.py')


def train(folder, *more):
    """Run the tool to its end: (status, all that it and runs in this folder before it said)."""
    program = command(folder, more)
    try:
        status = program.wait(SECONDS)
    except subprocess.TimeoutExpired:
        status = 'a hang'
        for pid in descendants(program.pid):
            os.kill(pid, signal.SIGKILL)
    return status, Path(f'{folder}.log').read_text()


def judge(status, said, *allowed):
    """None if the status is as allowed, with one sentence for status 2; else what was seen."""
    sentences = [line for line in said.splitlines() if line.startswith('error: ')]
    if (status not in allowed or 'Traceback' in said or 'Logging error' in said
            or len(sentences) != (status == 2)):
        return f'status {status}: {said[-1500:]}'
    return None


@contextmanager
def mounted(folder, options):
    """A small file system of its own."""
    Path(folder).mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], check=True)
    try:
        yield
    finally:
        subprocess.run(['umount', folder], check=True)


def can_mount():
    """Whether this process may mount file systems."""
    Path('probe').mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', 'probe'], capture_output=True)
    if not done.returncode:
        subprocess.run(['umount', 'probe'], check=True)
    return not done.returncode


def full_disk():
    """It is full for a while in the middle of a run."""
    with mounted('full', 'size=8m'):
        status, said = train('full', 'filled.py')
        lost = judge(status, said, 0)
        if lost:
            return lost
        for text in ('LocalVisBackend cannot write', 'the run continues without it',
                     'LocalVisBackend can write again'):
            if text not in said:
                return f'{text!r} is missing'
        scalars = next(Path('full').glob('*/vis_data/scalars.json')).read_text()
        log = next(Path('full').glob('*/*.log')).read_text()
        if not Path('full/epoch_40.pth').is_file() or '"step": 80' not in scalars:
            return 'nothing was written when there was space again'
        return None if 'Epoch(train) [40][2/2]' in log else f'the log did not go on: {log[-500:]}'


def start_on_full_disk():
    """It has no space left for the first file."""
    with mounted('none', 'size=4k'):
        Path('none/filler').write_bytes(bytes(4096))
        return judge(*train('none', 'run.py'), 2)


def start_on_read_only_disk():
    """It may not be written."""
    with mounted('fixed', 'ro'):
        return judge(*train('fixed', 'run.py'), 2)


def two_runs():
    """The second in the same folder is refused; after a SIGKILL the next one is not."""
    first = command('both', ('run.py', 'train_cfg.max_epochs=100000'))
    try:
        while not any(Path('both').glob('epoch_*.pth')) and first.poll() is None:
            time.sleep(0.1)
        Path('both.log').rename('first.log')
        lost = judge(*train('both', 'run.py'), 2)
        if lost or 'Another run writes into' not in Path('both.log').read_text():
            return lost or 'the sentence does not say why'
    finally:
        first.kill()
        first.wait()
    Path('both.log').unlink()
    return judge(*train('both', 'run.py', 'train_cfg.max_epochs=1'), 0)


def killed_writers():
    """What processes that were killed while they wrote left behind goes with the next run."""
    Path('killed').mkdir()
    for name in ('epoch_9.pth', 'best_x_epoch_1.pth', 'interrupted.pth', 'last_checkpoint'):
        subprocess.run([sys.executable, '-c', (
            'import os\nfrom nepa_mm.utils.files import atomic_write\n'
            f'with atomic_write("killed/{name}") as file:\n'
            '    file.write_bytes(bytes(1000))\n    os.kill(os.getpid(), 9)')])
    if len(list(Path('killed').glob('.*'))) != 4:
        return 'nothing was left to clean up'
    lost = judge(*train('killed', 'run.py', 'train_cfg.max_epochs=1'), 0)
    left = [file.name for file in Path('killed').glob('.*.*')]
    return lost or (f'{left} are left' if left else None)


def place(kind, path):
    """Put something odd in the place of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == 'dangling link':
        path.symlink_to('nowhere')
    elif kind == 'loop of links':
        path.symlink_to(path.name)
    elif kind == 'folder':
        path.mkdir()
        (path / 'precious').write_text('precious')
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    else:
        path.write_bytes(b'\0garbage')


def odd_work_dir(kind, name):
    """Something else lies in place of a file of the run, or of its folder."""
    folder = f'odd {kind} {name}'.replace(' ', '_').replace('/', '')
    place(kind, Path(folder, name) if name else Path(folder))
    lost = judge(*train(folder, 'run.py', 'train_cfg.max_epochs=2'), 0, 2)
    precious = Path(folder, name, 'precious')
    if kind == 'folder' and not precious.is_file():
        return f'{precious} was removed'
    return lost


def odd_data(kind):
    """Something else lies in place of an image."""
    place(kind, Path('data/imagenet/train/n00000000/odd.JPEG'))
    try:
        return judge(*train(f'data_{kind}'.replace(' ', '_'), 'run.py',
                            'train_cfg.max_epochs=1'), 0, 2)
    finally:
        shutil.rmtree('data/imagenet/train/n00000000')
        for index in (0, 2):
            save_image(Path(f'data/imagenet/train/n00000000/{index}.JPEG'))


KINDS = ('dangling link', 'loop of links', 'folder', 'pipe', 'socket', 'garbage')
NAMES = ('epoch_1.pth', 'interrupted.pth', 'last_checkpoint', 'run.py', '.lock', '')
CASES = [(full_disk,), (two_runs,), (killed_writers,), (start_on_full_disk,),
         (odd_work_dir, 'pipe', 'epoch_1.pth'), (odd_data, 'pipe'), (start_on_read_only_disk,),
         *((odd_data, kind) for kind in KINDS if kind != 'pipe'),
         *((odd_work_dir, kind, name) for name in NAMES for kind in KINDS
           if (kind, name) != ('pipe', 'epoch_1.pth'))]


def disks(rng, num):
    """Yield, for each of the first ``num`` cases, what was lost, or None."""
    save_config()
    mounts = can_mount()
    for case, *args in CASES[:num]:
        if case in (full_disk, start_on_full_disk, start_on_read_only_disk) and not mounts:
            print(f'{case.__name__} was not tried: only root may mount a file system.')
            yield None
            continue
        lost = case(*args)
        yield lost and f'{case.__name__} {args}: {lost}'
