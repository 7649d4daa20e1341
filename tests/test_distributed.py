"""Several processes: the gradients, the launchers, the shell scripts."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from nepa_mm.apis import runner

from .conftest import REPO
from .tiny_runs import (
    TOOLS,
    load_tool,
    options,
    run_script,
    run_train,
    save_classifier,
    save_image,
    save_pretraining,
    save_segmentor,
)


def weights(work_dir):
    return torch.load(Path(work_dir, 'epoch_1.pth'), weights_only=False)['state_dict']


def difference(one, two):
    assert one.keys() == two.keys()
    return max((one[key].cpu() - two[key].cpu()).abs().max().item() for key in one)


def same_gradients():
    """Options for steps of the joined batch of 4, and of a half of it in each process."""
    # In training each process draws its own scale of the coordinates.
    both = options('randomness.seed=0', 'optim_wrapper.optimizer.lr=1.',
                   'model.backbone.rope_rescale=None')
    return tuple([*both, f'train_dataloader.batch_size={size}'] for size in (4, 2))


def test_two_processes_equal_one_with_the_joined_batch(folder):
    """After two steps of SGD with lr 1, equal weights are equal gradients.

    The second batch is uneven: of 6 images 2 are left, for two processes and for the accumulation.
    """
    config = save_pretraining()
    for index in (4, 5):
        save_image(Path(f'data/imagenet/train/n00000000/{index}.JPEG'))
    joined, half = same_gradients()
    for script, *args in (
            ('train.py', config, '--work-dir', 'joined', *joined),
            ('dist_train.sh', config, 2, '--work-dir', 'two', *half)):
        code, output = run_script(script, *args, cwd=folder)
        assert code == 0, output
    assert 'No GPU: 2 processes on the CPU, through gloo.' in output
    assert difference(weights('two'), weights('joined')) < 1e-6

    run_train([config, '--work-dir', 'accumulated', *half, 'optim_wrapper.accumulative_counts=2'])
    assert difference(weights('accumulated'), weights('joined')) < 1e-6

    run_train([config, '--work-dir', 'half', *half, 'train_dataloader.dataset.indices=2'])
    assert difference(weights('half'), weights('joined')) > 1e-3  # both processes did count


def test_each_process_draws_its_own_coordinates(folder):
    """As in the reference; and every run with this seed draws them again."""
    config = save_pretraining()
    runs = dict(one=True, two=True, alike=False)
    programs = [start(config, 2, '--work-dir', name, *options(
        'randomness.seed=0', f'randomness.diff_rank_seed={differ}', 'optim_wrapper.optimizer.lr=1.',
        'train_dataloader.sampler.shuffle=False')) for name, differ in runs.items()]
    for program in programs:
        output = program.communicate(timeout=120)[0]
        assert program.returncode == 0, output
    one, two, alike = map(weights, runs)
    assert difference(one, two) == 0 < difference(one, alike)


def start(*args, **env):
    """tools/dist_train.sh in the background, in a group of its own."""
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(TOOLS.parent), **env)
    env['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), env['PATH']])
    return subprocess.Popen([TOOLS / 'dist_train.sh', *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def test_a_dead_process_ends_the_others(folder):
    """Without this the survivors would wait for it forever."""
    config = save_pretraining()
    program = start(config, 2, *options('train_cfg.max_epochs=500', 'optim_wrapper.optimizer.lr=0'))
    lines = iter(program.stdout.readline, '')
    assert any(re.search(r'Epoch\(train\) +\[ *2\]', line) for line in lines)
    first, second = children(program.pid)
    os.kill(second, signal.SIGKILL)
    rest = program.communicate(timeout=60)[0]
    assert program.returncode == 1
    assert rest.splitlines()[-1] == ('error: the process of rank 1 was killed by SIGKILL; torchrun '
                                     'has ended all others.')
    assert not Path(f'/proc/{first}').exists()


def test_two_machines(folder):
    """Two launchers that meet at one address: half of the batch each, one result."""
    config = save_pretraining()
    joined, half = same_gradients()
    launch = load_tool('launch')
    nodes = dict(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=str(launch.free_port()))
    programs = [start(config, 1, '--work-dir', name, *half, NODE_RANK=rank, **nodes)
                for rank, name in (('0', 'first'), ('1', 'second'))]
    outputs = [program.communicate(timeout=120)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], outputs
    assert 'No GPU: 2 processes on the CPU, through gloo.' in outputs[0]

    run_train([config, '--work-dir', 'joined', *joined])
    assert difference(weights('first'), weights('joined')) < 1e-6
    assert not list(Path('second').glob('*.pth'))     # the first one writes


def save_program(name, line):
    Path(name).write_text(f'#!/bin/sh\n{line}\n')
    Path(name).chmod(0o755)


@pytest.mark.skipif(torch.cuda.is_available(), reason='SyncBN stays on GPUs')
@pytest.mark.parametrize('launcher, variables', [
    ('pytorch', dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1')),
    ('slurm', dict(SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_LOCALID='0', SLURM_NODELIST='n0')),
    ('mpi', dict(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='1',
                 OMPI_COMM_WORLD_LOCAL_RANK='0', MASTER_ADDR='127.0.0.1'))])
def test_launchers_on_the_cpu(folder, monkeypatch, launcher, variables):
    """A group of one process, inside this one; SyncBN, which needs GPUs, becomes BN."""
    config, _ = save_segmentor()
    path = os.pathsep.join(['.', os.environ['PATH']])
    monkeypatch.setattr(os, 'environ', dict(os.environ, **variables, MASTER_PORT='0', PATH=path))
    save_program('scontrol', 'echo 127.0.0.1; echo n1')
    try:
        runner = run_train([config, '--launcher', launcher])
        assert torch.distributed.get_backend() == 'gloo'
    finally:
        torch.distributed.destroy_process_group()
    assert type(runner.model).__name__ == 'MMDistributedDataParallel'
    assert type(runner.model.module.decode_head.convs[0].bn) is torch.nn.BatchNorm2d
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert 'SyncBN needs GPUs: 1 norm_cfg use BN instead' in log


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(runner, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    for name, value in dict(RANK='4', WORLD_SIZE='8', LOCAL_RANK='4').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match='its 4 visible GPUs: process 4 has none'):
        runner.build_runner(Config(dict(launcher='pytorch')))


def test_dist_test(folder):
    code, output = run_script('dist_test.sh', *save_classifier(), 2, cwd=folder)
    assert code == 0, output
    assert 'accuracy/top1: 50.0000' in output and '2 processes on the CPU' in output


@pytest.mark.parametrize('env, expected', [
    (dict(PORT='123'), ['--nnodes=1', '--node-rank=0', '--master-addr=127.0.0.1', 123]),
    (dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='n0'),
     ['--nnodes=2', '--node-rank=1', '--master-addr=n0', 29500])])
def test_launch_reads_the_environment(monkeypatch, env, expected):
    launch = load_tool('launch')
    calls = []
    monkeypatch.setattr(launch.run, 'main', calls.append)
    monkeypatch.setattr(os, 'environ', dict(env))
    launch.main('1000', 'train.py', 'c.py', '--amp')
    *expected, port = expected
    assert set(calls[0]) == {*expected, f'--master-port={port}', '--nproc-per-node=1000',
                             'train.py', 'c.py', '--amp'}
    assert os.environ['OMP_NUM_THREADS'] == os.environ['MKL_NUM_THREADS'] == '1'


@pytest.mark.parametrize('script, fourth, expected', [
    ('slurm_train.sh', 'work', ['train.py', 'c.py', '--work-dir', 'work']),
    ('slurm_test.sh', 'a.pth', ['test.py', 'c.py', 'a.pth'])])
def test_slurm(folder, script, fourth, expected):
    """With a stand-in for srun that prints its arguments and the port."""
    save_program('srun', 'printf "%s\\n" "$@" "$MASTER_PORT"')
    code, output = run_script(
        script, 'gpu', 'job', 'c.py', fourth, '--cfg-options', 'a=b c', cwd=folder, GPUS='16',
        GPUS_PER_NODE='4', CPUS_PER_TASK='9', SRUN_ARGS='--quiet --exclusive', PORT='12345')
    assert code == 0
    assert output.replace(f'{TOOLS}/', '').splitlines() == [
        '--partition=gpu', '--job-name=job', '--gres=gpu:4', '--ntasks=16', '--ntasks-per-node=4',
        '--cpus-per-task=9', '--kill-on-bad-exit=1', '--quiet', '--exclusive', 'python', '-u',
        *expected, '--launcher', 'slurm', '--cfg-options', 'a=b c', '12345']


def test_slurm_has_a_core_for_each_worker(folder):
    save_program('srun', 'printf "%s\\n" "$@"')
    output = run_script('slurm_train.sh', 'gpu', 'job', 'c.py', 'work', cwd=folder)[1]
    cfg = Config.fromfile(REPO / 'configs' / 'pretrain' / 'nepa_vit-b.py')
    assert f'--cpus-per-task={cfg.train_dataloader.num_workers}' in output.splitlines()


@pytest.mark.parametrize('script, args', [
    ('dist_train.sh', ['c.py']), ('dist_train.sh', ['c.py', '--amp']),
    ('dist_test.sh', ['c.py', 'a.pth', '0']), ('slurm_train.sh', ['gpu', 'job', 'c.py']),
    ('slurm_test.sh', [])])
def test_scripts_say_how_to_call_them(folder, script, args):
    code, output = run_script(script, *args, cwd=folder)
    assert code == 2 and output.startswith('usage: ')
