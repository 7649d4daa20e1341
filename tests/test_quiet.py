"""What a user sees first: help without delay or junk, and a log that begins with what runs."""
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPO
from .test_docs import blocks, commands
from .tiny_runs import (
    options,
    run_script,
    run_train,
    save_classifier,
    save_pretraining,
    save_segmentor,
)

TOOLS = sorted(file for folder in ('tools', 'benchmarks', 'demo') for file in REPO.glob(
    f'{folder}/**/*.py') if "if __name__ == '__main__'" in file.read_text())
SLOW = ('torch', 'mmengine', 'mmcv', 'mmpretrain', 'matplotlib', 'nepa_mm')
PROBE = f"""
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition('/')[0]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
finally:
    slow = [name for name in {SLOW} if name in sys.modules]
    if slow:
        print('imported', *slow, file=sys.stderr)
"""


def probe(tool, *args):
    return subprocess.run(
        [sys.executable, '-c', PROBE, tool, *args], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(REPO)))


def test_a_script_that_loads_a_segmentor(tmp_path, monkeypatch):
    """mmseg prints when it is imported, which a script does through nepa_mm.load only."""
    monkeypatch.chdir(tmp_path)
    config, weights = save_segmentor()
    script = f'import nepa_mm; print(type(nepa_mm.load({config!r}, {weights!r})).__name__)'
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(REPO)))
    first, *more = reversed(done.stdout.splitlines())
    assert first == 'EncoderDecoder', done.stderr
    assert not [line for line in more if 'Loaded' not in line], more


@pytest.mark.parametrize('tool', TOOLS, ids=lambda tool: tool.name)
def test_help(tool):
    """Nothing but help; nothing slow is imported, for a wrong flag neither."""
    done = probe(tool, '--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('usage: ') and 'options:' in done.stdout
    wrong = probe(tool, '--no-such-flag')
    assert (wrong.returncode, wrong.stdout) == (2, '')
    assert 'error: ' in wrong.stderr and 'imported' not in wrong.stderr


def test_every_tool_is_here():
    assert {'train.py', 'test.py', 'predict.py', 'launch.py', 'digits.py', 'benchmark.py'} <= {
        tool.name for tool in TOOLS}


def start_of_log(*args, stages=1):
    code, output = run_script(*args, cwd=Path())
    assert code == 0, output
    lines = [re.sub(r'\x1b\[\d+m', '', line) for line in output.splitlines()]
    return [line.partition(' - INFO - ')[2] or line for line in lines], output


def test_a_log_begins_with_what_runs(folder):
    """On the screen: task, data, weights, length, output; in the file: environment and config."""
    config = save_pretraining()
    lines, output = start_of_log('train.py', config, '--work-dir', 'work',
                                 '--cfg-options', 'train_cfg.max_epochs=12')
    first = '\n'.join(lines[:10])
    for item in ('Pretraining: NEPA with NEPAViT, 0.04 M parameters',
                 'Data: 4 images of CustomDataset; 1 process on cpu x batches of 2',
                 'Weights: random', 'Length: 12 epochs of 2 iterations = 24 iterations',
                 f'Output: {Path("work").resolve()}'):
        assert item in first, first
    assert re.search(r'About 0:00:0\d left at \S+ s per iteration', output)
    for junk in ('OneDL', 'MultiScale', 'System environment', 'Config:', 'FileClient',
                 'HardDiskBackend', 'model = dict', 'Hooks will be executed'):
        assert junk not in output, junk
    log, = Path('work').glob('*/*.log')
    text = log.read_text()
    assert 'System environment:' in text and 'Config:\n' in text and 'model = dict(' in text

    lines, _ = start_of_log('train.py', config, '--work-dir', 'work',
                            '--cfg-options', 'train_cfg.max_epochs=13')
    assert f'Weights: resumed from the latest intact checkpoint in {Path("work").resolve()}.' in (
        lines[:10])


def test_weights_of_a_start(folder, capsys):
    """A file to load, and the log of a test."""
    config, checkpoint = save_classifier()
    lines, _ = start_of_log('train.py', config, '--cfg-options', f'load_from={checkpoint}')
    assert f'Weights: {checkpoint}.' in lines[:10]
    assert any(line.startswith('Classification training: ImageClassifier') for line in lines[:10])
    assert any('validation on 8 images of CustomDataset' in line for line in lines[:10])
    lines, _ = start_of_log('test.py', config, checkpoint)
    first = '\n'.join(lines[:10])
    assert 'Test: ImageClassifier' in first and 'Length: 4 batches.' in first
    assert f'Testing the raw weights of {checkpoint}.' in first


def test_real_warnings_are_shown(folder):
    """Only known messages are held back."""
    code = ('import warnings, nepa_mm\n'
            'from mmengine.logging import print_log\n'
            "warnings.warn('a real one')\n"
            "print_log('an information')\n")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(REPO)))
    assert done.stdout == 'an information\n' and 'UserWarning: a real one' in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


# ---------------------------------------------------------------- TensorBoard, W&B


def documented(backend):
    """The option on the command line, and the line of the config, of docs/monitoring.md."""
    text = (REPO / 'docs/monitoring.md').read_text()
    command, = (line for line in commands(text) if backend in line and '--cfg-options' in line)
    line, = (line for body in blocks(text, 'python') for line in body.splitlines()
             if backend in line)
    return shlex.split(command)[-1], line


@pytest.mark.parametrize('how', ['option', 'config'])
def test_tensorboard(folder, how):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    config = save_pretraining()
    option, line = documented('TensorboardVisBackend')
    if how == 'config':
        Path('child.py').write_text(f"_base_ = '{config}'\n{line}\n")
        run_train(['child.py', '--work-dir', 'work'])
    else:
        run_train([config, '--work-dir', 'work', *options(option)])
    file, = Path('work').rglob('*tfevents*')
    found = events.EventAccumulator(str(file.parent)).Reload()
    assert len(found.Scalars('loss')) == 2
    assert list(Path('work').rglob('scalars.json'))


def test_wandb(folder, monkeypatch, capsys):
    config = save_pretraining()
    option, _ = documented('WandbVisBackend')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    command = [config, '--work-dir', 'work', '--cfg-options', option]
    code, output = run_script('train.py', *command, cwd=folder)
    if importlib.util.find_spec('wandb'):
        assert code == 0 and list(Path('work').rglob('*.wandb')), output
    else:
        assert code == 2 and 'pip install wandb' in output and not Path('work').exists()
