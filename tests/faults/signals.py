"""Send SIGTERM to training as users type it, in every phase, and see that nothing is lost.

Each run is a command in a process group of its own. A hook marks the moment and stays in it for a
while, the signal goes to the process, to its group, or to every process; then the same command
resumes, and must end with the weights of a run that nobody interrupted, bit for bit.
"""
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmengine.config import Config

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint

from ..tiny_runs import TOOLS, options, save_classifier
from .kills import same

SECONDS = 240       # more for one command is a hang
PACE = """
import os
import time
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

MOMENT, _, SECONDS = os.environ.get('PACE', '::').rpartition(':')


def reach(moment):
    if moment == MOMENT:
        Path(os.environ['MARK']).touch()
        time.sleep(float(SECONDS))


@HOOKS.register_module()
class PaceHook(Hook):
    priority = 'HIGHEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        reach(f'train:{runner.iter}')

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        reach(f'val:{runner.iter}:{batch_idx}')

    def before_save_checkpoint(self, runner, checkpoint):
        reach(f'save:{runner.iter}')


reach('start')
"""
# moment, seconds that it lasts, who gets SIGTERM, options. A run has 12 iterations and a
# validation of 4 after each 4 of them; :6 is the iteration with the index 6.
ITERATIONS = 'iters.py',        # a config that counts iterations
TWO, FOUR = ('2', 'train_dataloader.batch_size=1'), 4    # processes, seconds
NO_GUARD = ('default_hooks.guard.type=EmptyCacheHook',)
ACCUMULATED = ('optim_wrapper.accumulative_counts=2',)
SPAWN = ('env_cfg.mp_cfg.mp_start_method=spawn',)
CASES = [
    ('train:5', 1, 'group', ()),
    ('train:6', FOUR, 'process', TWO),
    ('val:8:1', 1, 'group', ITERATIONS),
    ('train:0', 1, 'each', TWO),
    ('val:4:2', 1, 'process', TWO),
    ('start', 1, 'group', ()),
    ('train:0', 1, 'group', ()),
    ('train:11', 1, 'group', ()),
    ('train:5', 1, 'process', ()),
    ('train:5', FOUR, 'each', ()),
    ('train:6', 1, 'twice', ()),
    ('train:6', 1, 'group', ACCUMULATED),
    ('train:5', 1, 'group', NO_GUARD),
    ('train:5', 1, 'group', SPAWN),
    ('val:4:0', 1, 'group', ()),
    ('val:8:3', 1, 'each', ()),
    ('val:12:1', 1, 'group', ()),
    ('save:4', 1, 'group', ()),
    ('save:7', 1, 'group', ITERATIONS),
    ('train:5', 1, 'group', ITERATIONS),
    ('train:5', 1, 'each', ITERATIONS),
    ('train:6', 1, 'process', (*ITERATIONS, *TWO)),
    ('val:8:1', 1, 'process', (*ITERATIONS, *TWO)),
    ('start', 1, 'process', TWO),
    ('train:5', 1, 'twice', TWO),
    ('train:5', 1, 'each', (*TWO, *NO_GUARD)),
    ('train:5', 1, 'one', (*TWO, *NO_GUARD)),
    ('train:7', 1, 'one', (*TWO, *NO_GUARD)),
    ('train:6', 1, 'process', (*TWO, *ACCUMULATED)),
    ('train:9', 1, 'one', TWO),
    ('save:4', 33, 'process', TWO),     # torchrun by itself waits for 30 seconds
    ('train:11', 1, 'process', TWO),
]


def save_config():
    """A classifier with everything that a resumed run has to get right, two workers a process."""
    Path('pace.py').write_text(PACE)
    cfg = Config.fromfile(save_classifier()[0])
    cfg.custom_imports.imports.append('pace')
    cfg.default_hooks.update(
        checkpoint=dict(type='AtomicCheckpointHook', interval=1, save_best='auto'),
        resume=dict(type='ExactResumeHook'), guard=dict(type='NonFiniteGuardHook'),
        run_check=dict(type='RunCheckHook', odd='warn'))
    cfg.custom_hooks = [dict(type='ModelEMAHook', momentum=0.1, evaluate_on_origin=True),
                        dict(type='PaceHook')]
    cfg.randomness = dict(seed=1, diff_rank_seed=True)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-2, fused=True)
    cfg.train_dataloader.sampler.shuffle = True
    cfg.train_dataloader.num_workers = 2
    cfg.val_dataloader.update(num_workers=1, batch_size=1, dataset=dict(
        cfg.val_dataloader.dataset, indices=8))
    cfg.train_cfg.max_epochs = 3
    cfg.resume = True
    cfg.dump('run.py')
    cfg.train_cfg = dict(by_epoch=False, max_iters=12, val_interval=4)
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=4)
    cfg.log_processor = dict(by_epoch=False)
    cfg.dump('iters.py')


def command(folder, more, pace='', mark=''):
    """Start the tool on the config, in a group of its own."""
    config = next((name for name in more if name.endswith('.py')), 'run.py')
    script = [TOOLS / 'dist_train.sh', config, '2'] if TWO[0] in more else (
        [sys.executable, TOOLS / 'train.py', config])
    more = options(*(option for option in more if '=' in option))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PATH=path, MARK=mark,
               PACE=pace, PYTHONPATH=os.pathsep.join([str(TOOLS.parent), os.getcwd()]))
    log = open(f'{folder}.log', 'a')
    return subprocess.Popen([*script, '--work-dir', folder, *more[more == ['--cfg-options']:]],
                            env=env, stdout=log, stderr=log, start_new_session=True)


def descendants(pid):
    """The processes below one, itself the last."""
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []
    return [one for child in children for one in descendants(int(child))] + [pid]


def send(program, whom):
    """SIGTERM as `kill`, as `timeout`, or as Slurm sends it; return who was there."""
    family = descendants(program.pid)
    if whom == 'group':
        os.killpg(program.pid, signal.SIGTERM)
    elif whom == 'each':
        for pid in family:
            os.kill(pid, signal.SIGTERM)
    elif whom == 'one':     # of several ranks
        os.kill(int(Path(f'/proc/{program.pid}/task/{program.pid}/children').read_text().split()[1]),
                signal.SIGTERM)
    else:
        for _ in range(3 if whom == 'twice' else 1):
            os.kill(program.pid, signal.SIGTERM)
            time.sleep(0.2)
    return family


def weights(folder, more):
    """What an ended run must have in common with another."""
    state = read_checkpoint(f'{folder}/{"iter_12" if ITERATIONS[0] in more else "epoch_3"}.pth')
    return [state[key] for key in ('state_dict', 'ema_state_dict', 'optimizer')]


def interrupt(index, expected):
    """Run one case: what was lost, or None."""
    moment, seconds, whom, more = CASES[index]
    folder, mark = f'run{index}', Path(f'mark{index}')
    name, log = f'{CASES[index]}, {folder}.log', Path(f'{folder}.log')
    program = command(folder, more, f'{moment}:{seconds}', str(mark))
    try:
        began = time.perf_counter()
        while not mark.exists() and program.poll() is None:
            if time.perf_counter() - began > SECONDS:
                return f'{name}: the moment never came'
            time.sleep(0.02)
        if program.poll() is not None:
            return f'{name}: ended before the moment: {log.read_text()[-1500:]}'
        family = send(program, whom)
        status = program.wait(SECONDS)
        for _ in range(100):        # multiprocessing's tracker of resources ends by itself
            left = [pid for pid in family if Path(f'/proc/{pid}').exists()]
            if not left:
                break
            time.sleep(0.1)
        if status != 143 or 'Traceback' in log.read_text():
            return f'{name}: status {status}: {log.read_text()[-1500:]}'
        if left:
            return f'{name}: {len(left)} processes are left'
        file, problems = find_resumable_checkpoint(folder)
        if moment == 'start':
            if Path(folder).exists() and TWO[0] not in more:
                return f'{name}: {list(Path(folder).iterdir())} are left'
        elif Path(file or '').name != 'interrupted.pth' or problems:
            return f'{name}: {file}, {problems}'
        if list(Path(folder).glob('.*.*')):
            return f'{name}: temporary files are left'
        program = command(folder, more)
        if program.wait(SECONDS):
            return f'{name}: resumed, status {program.returncode}: {log.read_text()[-1500:]}'
        if moment.startswith(('val', 'save')) and 'Repeating the validation' not in log.read_text():
            return f'{name}: the validation was not repeated'
        if Path(folder, 'interrupted.pth').exists():
            return f'{name}: interrupted.pth is left'
        return None if same(weights(folder, more), expected) else f'{name}: other weights'
    except subprocess.TimeoutExpired:
        return f'{name}: a hang: {log.read_text()[-1500:]}'
    finally:
        for pid in descendants(program.pid):
            os.kill(pid, signal.SIGKILL)
        program.wait()


def signals(rng, num):
    """Yield, for each of the first ``num`` cases, what was lost, or None; two run at a time."""
    save_config()
    cases, straight = CASES[:num], {}

    def reference(more):
        folder = f'straight{len(straight)}'
        straight[more] = folder
        return command(folder, more)

    kinds = list(dict.fromkeys(more for *_, more in cases))
    with ThreadPoolExecutor(2) as pool:
        programs = list(pool.map(lambda more: reference(more).wait(SECONDS), kinds))
        if any(programs):
            yield f'uninterrupted runs failed: {dict(zip(straight.values(), programs))}'
            return
        expected = {more: weights(straight[more], more) for more in kinds}
        yield from pool.map(lambda index: interrupt(index, expected[cases[index][3]]),
                            range(len(cases)))
