"""Evaluation during pretraining: its numbers, and that the run does not notice it."""
import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import softmax

from nepa_mm.engine.hooks import ModelEMAHook
from nepa_mm.evaluation import OnlineProbeHook
from nepa_mm.evaluation.frozen_features import extract_features, knn_accuracy, linear_scores

from .conftest import REPO
from .tiny_runs import options, run_script, save_image, save_pretraining

RUNS = itertools.count()


def digits(split, num):
    """A loader whose pipeline draws, so that a hook that is not careful moves the run."""
    return dict(batch_size=32, num_workers=0, dataset=dict(
        type='Digits', split=split, num_labels=num, pipeline=[
            dict(type='Resize', scale=(16, 16)), dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs')]))


PROBE = dict(type='OnlineProbeHook', interval=2, block=1, k=5,
             bank_dataloader=digits('train', 100), query_dataloader=digits('test', 50))


def run(work_dir, *hooks, epochs=3):
    cfg = Config.fromfile(REPO / 'configs' / 'demo' / 'digits_pretrain.py')
    cfg.work_dir, cfg.resume, cfg.experiment_name = str(work_dir), False, f'probe_{next(RUNS)}'
    cfg.train_dataloader.update(batch_size=50, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.num_labels = 100
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = epochs
    cfg.param_scheduler.warmup = 1
    cfg.default_hooks.logger.interval = 1
    cfg.custom_hooks = [dict(type='ModelEMAHook', momentum=0.5), *hooks]
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def average_of(runner):
    hook, = (hook for hook in runner.hooks if isinstance(hook, ModelEMAHook))
    return hook.ema_model


def test_linear_probe_equals_scikit_learn():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6))
    labels = rng.integers(0, 4, 150)
    features = (centres[labels] + rng.normal(size=(150, 6))) * [1, 10, 100, 1, 1, 0] + 3
    bank, queries = features[:100], features[100:]
    scaler = StandardScaler().fit(bank)
    expected = LogisticRegression(C=1., tol=1e-8, max_iter=1000).fit(
        scaler.transform(bank), labels[:100]).predict_proba(scaler.transform(queries))
    scores = linear_scores(torch.tensor(bank), torch.tensor(labels[:100]), torch.tensor(queries), 4)
    np.testing.assert_allclose(softmax(scores, dim=1), expected, atol=2e-3)
    assert not scores.requires_grad


def test_the_run_is_bitwise_the_same(tmp_path):
    """Losses of every iteration, weights, average, optimizer, random states, training mode."""
    ends = []
    for index, hooks in enumerate(([], [PROBE])):
        runner = run(tmp_path / str(index), *hooks)
        log = next((tmp_path / str(index)).glob('*/*.log')).read_text()
        assert log.count('Probe after epoch') == 2 * index      # after epochs 2 and 3
        ends.append(dict(
            losses=runner.message_hub.get_scalar('train/loss').data[0].tolist(),
            weights=runner.model.state_dict(),
            average=average_of(runner).state_dict(),
            optimizer=runner.optim_wrapper.state_dict()['state'],
            torch=torch.get_rng_state(), numpy=np.random.get_state()[1:3], python=random.getstate(),
            training=[module.training for module in runner.model.modules()]))
    one, other = ends
    assert len(one['losses']) == 6 and len(set(one['losses'])) == 6
    assert one['losses'] == other['losses'] and one['training'] == other['training']
    assert one['python'] == other['python']
    for key in ('weights', 'average', 'optimizer', 'torch', 'numpy'):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_values_are_those_of_the_raw_weights_and_of_the_average(tmp_path):
    still = {name: digits(split, num) for name, split, num in (
        ('bank_dataloader', 'train', 100), ('query_dataloader', 'test', 50))}
    for loader in still.values():
        del loader['dataset']['pipeline'][1]
    runner = run(tmp_path, PROBE | still, epochs=2)
    hook, = (hook for hook in runner.hooks if isinstance(hook, OnlineProbeHook))
    log = next(tmp_path.glob('*/vis_data/scalars.json')).read_text()
    row = json.loads(log.splitlines()[-1])
    assert (row['epoch'], row['iter'], row['step']) == (2, 4, 4)
    for suffix, model in (('', runner.model), ('_ema', average_of(runner).module)):
        expected = knn_accuracy(model, hook.bank, hook.queries, block=1, k=5)['top1']
        assert row[f'knn_top1{suffix}'] == pytest.approx(expected)
        (bank, labels), (queries, targets) = (
            extract_features(model, loader, block=1) for loader in (hook.bank, hook.queries))
        predicted = linear_scores(bank, labels, queries, 10).argmax(dim=1)
        expected = 100 * (predicted == targets).float().mean()
        assert row[f'linear_top1{suffix}'] == pytest.approx(expected.item())
    assert row['knn_top1'] != row['knn_top1_ema'] or row['linear_top1'] != row['linear_top1_ema']


def test_two_processes_find_what_one_finds(tmp_path, monkeypatch):
    """Nobody waits for ever, and 7 + 5 images, shared by two, are each counted once."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(save_pretraining())
    for split, num in dict(train=7, val=5).items():
        for index in range(num):
            save_image(tmp_path / 'probe' / split / 'ab'[index % 2] / f'{index}.jpg')
    loaders = [dict(batch_size=2, num_workers=0, dataset=dict(
        type='CustomDataset', data_root='probe', data_prefix=split,
        pipeline=cfg.train_dataloader.dataset.pipeline)) for split in ('train', 'val')]
    cfg.custom_hooks = [dict(type='OnlineProbeHook', k=1, bank_dataloader=loaders[0],
                             query_dataloader=loaders[1]),
                        dict(type='NEPAMonitorHook', interval=1)]
    cfg.dump('probed.py')
    found = []
    for script, *args in (('train.py', 'probed.py', '--work-dir', 'one'),
                          ('dist_train.sh', 'probed.py', 2, '--work-dir', 'two')):
        code, output = run_script(script, *args, *options(
            'optim_wrapper.optimizer.lr=0.', 'randomness.seed=0'), cwd=tmp_path)
        assert code == 0, output
        found += re.findall('Probe after epoch 1: (.*)', output)
    assert len(found) == 2 and found[0] == found[1]
    assert re.fullmatch(r'knn_top1: \d+\.00  linear_top1: \d+\.00', found[0])


def test_bad_interval():
    with pytest.raises(ValueError, match='interval must be positive, got 0'):
        OnlineProbeHook({}, {}, interval=0)
