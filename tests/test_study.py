"""`make study`: a very short one from end to end on made-up files, and what its tables say."""
import gzip
import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, MODELS
from mmpretrain.datasets import FashionMNIST
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nepa_mm.apis import load_config

from .conftest import REPO
from .tiny_runs import load_tool, options, run_train

write_garment_scenes = load_tool('make_garment_scenes').write_garment_scenes
study, steps, report = load_tool('study'), load_tool('study_steps'), load_tool('study_report')
CONFIGS = REPO / 'configs/fashion_mnist'
SIZE = steps.Size(images=256, bank=150, test=60, epochs=1, seeds=(1, 1), labels={100: 1}, few=100,
                  scenes=(8,), iters=2, lrs=dict(pretrain=(1e-3,), pretrain_mae=(1e-3,)),
                  finetune_lrs=((1e-3, 0.75),))


def write_idx(folder, name, images):
    """Write images (N, 28, 28) and labels i % 10 like Fashion-MNIST's files."""
    header = b''.join(number.to_bytes(4, 'big') for number in (2051, *images.shape))
    (folder / f'{name}-images-idx3-ubyte').write_bytes(header + images.tobytes())
    labels = (np.arange(len(images)) % 10).astype(np.uint8)
    header = b''.join(number.to_bytes(4, 'big') for number in (2049, len(labels)))
    (folder / f'{name}-labels-idx1-ubyte').write_bytes(header + labels.tobytes())


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """300 training and 80 test images: a square whose place is the class, and noise."""
    folder, rng = tmp_path_factory.mktemp('fashion'), np.random.default_rng(0)
    for name, count in (('train', 300), ('t10k', 80)):
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for i, image in enumerate(images):
            row, column = 7 * (i % 10 // 4), 7 * (i % 10 % 4)
            image[row:row + 7, column:column + 7] = 250
        write_idx(folder, name, images)
    return folder


def test_test_images_are_not_training_images(data):
    sizes = {split: len(DATASETS.build(dict(
        type='FashionMNISTSubset', data_root=str(data), split=split)))
        for split in ('train', 'test')}
    assert sizes == dict(train=300, test=80)


def test_few_labels_are_balanced_and_follow_the_seed(data):
    def chosen(seed):
        dataset = DATASETS.build(dict(type='FashionMNISTSubset', data_root=str(data),
                                      split='train', num_labels=50, seed=seed))
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        assert np.bincount([info['gt_label'] for info in infos]).tolist() == [5] * 10
        return np.stack([info['img'] for info in infos])

    assert (chosen(0) == chosen(0)).all() and (chosen(0) != chosen(1)).any()
    with pytest.raises(ValueError, match='num_labels must be a multiple of 10 up to 300, got 55'):
        DATASETS.build(dict(type='FashionMNISTSubset', data_root=str(data), num_labels=55))


class Now:
    """A pool that runs at once, in this process."""

    def submit(self, function, *args):
        result = function(*args)
        return type('Future', (), dict(result=lambda self: result))()


def test_a_folder_holds_one_size(data, tmp_path):
    steps.Study(tmp_path, data, SIZE).require_same_size()
    steps.Study(tmp_path, data, SIZE).require_same_size()
    with pytest.raises(ValueError, match='holds a study with seeds=.1, 1.; choose another'):
        steps.Study(tmp_path, data, replace(SIZE, seeds=(2, 1))).require_same_size()


def test_a_short_study(data, tmp_path):
    """Every kind of step runs; a second call runs what is missing, and nothing else."""
    small = steps.Study(tmp_path / 'study', data, SIZE)
    small.require_same_size()
    write_garment_scenes(small.work_dir / 'scenes', 8, 8, data=data)
    said = []
    study.choose(Now(), small, said.append)
    chosen = json.loads((tmp_path / 'study/chosen.json').read_text())
    assert chosen['pretrain'] == 1e-3 and chosen['finetune_mae, random'] == [1e-3, 0.75]
    assert 'finetune, pretrained: (0.001, 0.75)' in said[-1]

    rows = {name: study.ROWS[name] for name in (
        'NEPA', 'random start', 'MAE', 'MAE, random start', 'full', 'no shift', 'raw pixels')}
    for name, row in rows.items():
        small.run(name, row, 0)
    records = report.collect(small.work_dir)
    found = report.Summary(records)
    assert set(found.steps('NEPA')) == {
        'pretrain', 'blocks', 'finetune_bidirectional_100', 'finetune_causal_100',
        'finetune_trainable_100', 'attentive', 'segment_frozen_8', 'segment_upernet_8',
        'segment_tuned_8'}
    assert found.steps('MAE, random start').keys() == {'blocks', 'finetune_bidirectional_100'}
    assert found.steps('no shift')['pretrain'][0]['monitors']['copy_cosine'] > 0.9
    assert found.blocks('NEPA', 'knn').shape == (1, 4)
    # the place of a bright square is easy to read off the pixels
    assert found.blocks('raw pixels', 'linear_100')[0, 0] > 90

    times = {path: path.stat().st_mtime_ns for path in small.work_dir.glob('runs/*/*.json')}
    missing = small.work_dir / 'runs/NEPA_0/finetune_causal_100.json'
    missing.unlink()
    for name, row in rows.items():
        small.run(name, row, 0)
    changed = [path for path in times if path.stat().st_mtime_ns != times[path]]
    assert changed == [missing]

    small.draw(rows['NEPA'])
    report.write(small.work_dir)
    text = (small.work_dir / 'results.md').read_text()
    assert 'The steps took at least 0' in text
    assert re.search(r'Without the shift it fails [|] 1a [|] fails [|].* [|] one seed [|] [-+]\d',
                     text)
    assert '| NEPA | causal |' in text and '| raw pixels | – |' in text
    for picture in ('labels', 'blocks', 'curves', 'prediction', 'scenes'):
        assert min(Image.open(small.work_dir / f'study_{picture}.png').size) > 300
        assert f'](study_{picture}.png)' in text


def test_the_baseline_is_trained_by_the_tool(data, tmp_path):
    run_train([str(CONFIGS / 'fashion_pretrain_mae.py'), '--work-dir', str(tmp_path), *options(
        f'train_dataloader.dataset.data_root={data}', 'train_cfg.max_epochs=1',
        'param_scheduler.end=1', 'train_dataloader.batch_size=150')])
    log, = tmp_path.glob('2*/*.log')
    assert 'Pretraining: MAE with MAEViT' in log.read_text()
    assert (tmp_path / 'epoch_1.pth').exists()


def test_linear_probe_is_trained_by_the_tool(data, tmp_path):
    run_train([str(CONFIGS / 'fashion_linear.py'), '--work-dir', str(tmp_path), *options(
        f'train_dataloader.dataset.data_root={data}', f'val_dataloader.dataset.data_root={data}',
        'train_dataloader.dataset.num_labels=100', 'model.backbone.init_cfg=None', 'block=0',
        'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'param_scheduler.end=1')])
    log, = tmp_path.glob('2*/*.log')
    assert 'accuracy/top1' in log.read_text()
    groups = re.findall('([0-9,]+) parameters in', log.read_text())
    assert sorted(groups) == ['1,280', '10']      # the classifier alone is trained


def test_equal_compute():
    """MAE_COMPUTE is the ratio of the counted multiply-adds of both trainings."""
    flops = []
    for name in ('pretrain', 'pretrain_mae'):
        cfg = load_config(CONFIGS / f'fashion_{name}.py')
        model = MODELS.build(dict(cfg.model, _scope_='mmpretrain'))
        logging.disable(logging.INFO)
        model.init_weights()
        logging.disable(logging.NOTSET)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sum(model.loss(torch.randn(2, 1, 28, 28), []).values()).backward()
        flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(study.MAE_COMPUTE, rel=0.05)


def made_up(**rows):
    """Records of three seeds around given accuracies."""
    return report.Summary(dict(chosen={}, size=vars(study.FULL), rows={
        name.replace('_', ' '): {step: [value - 0.2, value, value + 0.2]
                                 for step, value in values.items()}
        for name, values in rows.items()}))


def test_verdicts():
    def answer(better, other, expected=1):
        return report.verdict(np.array(better), np.array(other), expected)

    assert answer([80., 81., 82.], [70., 71., 72.]) == ('+10.0 ± 0.8', 'yes')
    assert answer([70., 71., 72.], [80., 81., 82.]) == ('-10.0 ± 0.8', 'no')
    assert answer([70., 71., 72.], [80., 81., 82.], -1) == ('-10.0 ± 0.8', 'yes')
    assert answer([80., 81., 82.], [79., 81., 82.]) == ('+0.3 ± 1.1', 'not resolved')
    assert answer([80.], [70.]) == ('+10.0', 'one seed') and answer([], [70.]) == ('–', '–')


def test_tables_of_made_up_records():
    step = 'finetune_bidirectional_1000'
    summary = made_up(full={step: 80.}, no_shift={step: 60.}, NEPA={
        step: 84., 'finetune_causal_1000': 84.1}, random_start={step: 70.})
    text = report.claims(summary)
    assert '| Without the shift it fails | 1a | fails | +20.0 ± 0.2 | yes | – | – |' in text
    assert ('| Bidirectional fine-tuning helps | 1e | +1.2 | -0.1 ± 0.2 | not resolved | – | – |'
            in text)
    assert '| The causal mask helps | 1a | +3.2 | – | – | – | – |' in text
    text = report.fine_tuning(summary)
    assert '| NEPA | causal | – | 84.1 ± 0.1 | – | – |' in text
    assert '| gain of NEPA over random start | bidirectional | – | +14.0 ± 0.2 |' in text


def test_says_which_rows_have_how_many_seeds():
    def seeds(**counts):
        return report.seeds(report.Summary(dict(chosen={}, size=vars(study.FULL), rows={
            name.replace('_', ' '): {'blocks': [{}] * count} for name, count in counts.items()})))

    assert seeds(NEPA=1, MAE=1) == 'There is one seed so far, so there are no standard errors.'
    assert seeds(NEPA=2, MAE=2) == '± is the standard error, over 2 seeds.'
    assert seeds(NEPA=3, random_start=3, MAE=2, full=2) == (
        '± is the standard error, over 3 seeds of NEPA and random start, and 2 of the other rows.')
    assert seeds(NEPA=3, MAE=2, full=1) == (
        '± is the standard error, over 3 seeds of NEPA, and 1 or 2 of the other rows.')


def test_text_goes_between_the_marks():
    page = 'a\n<!-- study -->\nold\n<!-- end of study -->\nb\n'
    assert report.insert(page, 'new \\1 ![](study_a.png)') == (
        'a\n<!-- study -->\n\nnew \\1 ![](../resources/study_a.png)\n<!-- end of study -->\nb\n')


def test_the_page_shows_its_records():
    page = (REPO / 'docs/results.md').read_text()
    records = json.loads((REPO / 'resources/study.json').read_text())
    assert page == report.insert(page, report.render(records))


def test_debian_package_is_unpacked(data, tmp_path, monkeypatch):
    (tmp_path / 'debian').mkdir()
    for file in data.iterdir():
        (tmp_path / f'debian/{file.name}.gz').write_bytes(gzip.compress(file.read_bytes()))
    monkeypatch.setattr(study, 'DEBIAN', tmp_path / 'debian')
    study.prepare_data(tmp_path / 'unpacked')
    for file in data.iterdir():
        assert (tmp_path / 'unpacked' / file.name).read_bytes() == file.read_bytes()


def test_says_where_the_images_must_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, 'DEBIAN', tmp_path / 'none')
    monkeypatch.setattr(FashionMNIST, 'url_prefix', 'http://127.0.0.1:9/')     # nobody listens
    with pytest.raises(SystemExit) as error:
        study.main(['--quick', '--work-dir', str(tmp_path / 'w'), '--data', str(tmp_path / 'd')])
    assert error.value.code == 2
    assert 'd does not have the four files of Fashion-MNIST' in capsys.readouterr().err


def test_jobs_must_be_positive(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(['--jobs', '0', '--work-dir', str(tmp_path / 'w')])
    assert '--jobs must be positive, got 0' in capsys.readouterr().err
    assert not (tmp_path / 'w').exists()


def test_report_of_an_empty_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        report.main([str(tmp_path)])
    assert error.value.code == 2 and 'holds no study with a finished' in capsys.readouterr().err
