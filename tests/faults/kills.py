"""Kill training with SIGKILL at random moments, and see that nothing finished was lost.

Every run is a fork of this process, which has imported everything, and resumes where the one
before was killed. Half of the kills come at a random moment of the training, half before, in the
middle of, or after a random one of the operations that write checkpoints.
"""
import os
import pickle
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint

from ..tiny_runs import run_train, save_pretraining

EPOCHS = 5
KILLS_PER_RUN = 5
report = None       # in a child: where to write its progress


@HOOKS.register_module()
class ProgressHook(Hook):
    """Tell the parent that training began (0), and which epochs must be on disk (1, 2, ...).

    A save has waited for the one before it; its own file may still be written.
    """

    priority = 'LOWEST'

    def before_train(self, runner):
        os.write(report, bytes([0]))

    def after_train_epoch(self, runner):
        if runner.epoch:
            os.write(report, bytes([runner.epoch]))


def save_config():
    """Everything that a resumed run has to get right, in two iterations an epoch."""
    cfg = Config.fromfile(save_pretraining())
    cfg.default_hooks.update(
        checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=2),
        resume=dict(type='ExactResumeHook'),
        run_check=dict(type='RunCheckHook', odd='warn'))    # of its schedule half is run
    cfg.custom_hooks = [dict(type='ModelEMAHook', momentum=0.1), dict(type='ProgressHook')]
    cfg.randomness = dict(seed=1, diff_rank_seed=True)
    cfg.model.backbone.update(rope_rescale=2., drop_path_rate=0.3)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-2)
    cfg.param_scheduler = dict(type='CosineAnnealingLR', T_max=2 * EPOCHS, by_epoch=True,
                               convert_to_iter_based=True)
    cfg.train_dataloader.sampler.shuffle = True
    cfg.train_dataloader.dataset.pipeline[:2] = [
        dict(type='LoadImageWithPillow'), dict(type='RandomResizedCrop', scale=28)]
    cfg.train_cfg.max_epochs = EPOCHS
    cfg.dump('run.py')


def die_while_saving(num, where):
    """Kill this process at the ``num``-th operation of a checkpoint: before, amid or after it."""
    left = [num]

    def doomed(function, amid):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] or where == 'after':
                result = function(*args, **kwargs)
            elif where == 'amid':
                amid(*args)
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    write = Path.write_bytes
    os.fsync = doomed(os.fsync, lambda *args: None)
    os.replace = doomed(os.replace, lambda *args: None)
    Path.write_bytes = doomed(write, lambda path, data: write(path, data[:len(data) // 2]))


def start(folder, *doom):
    """Fork a training; return its process and the pipe that it reports to."""
    global report
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        signal.alarm(120)       # a run that hangs ends as one that died
        log = os.open(f'{folder}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
        report = writing
        if doom:
            die_while_saving(*doom)
        run_train(['run.py', '--work-dir', folder])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def finish(child, reading, kill_after=None):
    """Wait for, or kill, a training: (how it ended, epochs that it saved, seconds of training)."""
    saved, began = 0, time.perf_counter()
    deadline = None
    while True:
        left = None if deadline is None else max(deadline - time.perf_counter(), 0)
        if not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            deadline = None
            continue
        news = os.read(reading, 100)
        if not news:
            break
        if 0 in news:
            began = time.perf_counter()
            deadline = None if kill_after is None else began + kill_after
        saved = max(saved, *news)
    os.close(reading)
    return os.waitpid(child, 0)[1], saved, time.perf_counter() - began


def same(one, two):
    """Whether two checkpoints hold the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return pickle.dumps(one) == pickle.dumps(two)


def weights(folder):
    """What an ended run must have in common with another."""
    state = read_checkpoint(f'{folder}/epoch_{EPOCHS}.pth')
    return [state[key] for key in ('state_dict', 'ema_state_dict', 'optimizer')]


def kills(rng, num):
    """Yield, for each of ``num`` kills and each run at its end, what was lost, or None."""
    save_config()
    ended, _, seconds = finish(*start('straight'))
    if ended:
        yield f'the uninterrupted run failed: {Path("straight.log").read_text()[-500:]}'
        return
    expected, done, run = weights('straight'), 0, 0
    while done < num:
        folder, run, saved = f'run{run}', run + 1, 0
        for _ in range(min(KILLS_PER_RUN, num - done)):
            saving = rng.random() < 0.5
            doom = (int(rng.integers(1, 13)), str(rng.choice(['before', 'amid', 'after'])))
            ended, newest, _ = finish(*start(folder, *(doom if saving else ())),
                                      None if saving else rng.random() * seconds)
            saved = max(saved, newest)
            if ended != signal.SIGKILL:
                break       # it reached the end first
            done += 1
            yield lost(folder, saved)
        ended = finish(*start(folder))[0]
        if ended:
            yield f'{folder} cannot be resumed: {Path(f"{folder}.log").read_text()[-500:]}'
        elif not same(weights(folder), expected):
            yield f'{folder} ended with other weights than the uninterrupted run'
        else:
            yield None


def lost(folder, saved):
    """What a killed run lost of ``saved`` epochs, or None."""
    file, problems = find_resumable_checkpoint(folder)
    if problems:
        return f'{folder}: {problems}'
    epoch = read_checkpoint(file)['meta']['epoch'] if file else 0
    return None if epoch >= saved else f'{folder}: epoch {saved} was saved, {epoch} is left'
