"""The demo's verdict, and a very short demo from end to end."""
import json
import os

import torch
from PIL import Image

from .tiny_runs import load_tool

demo = load_tool('digits')


def results(**changes):
    rows = {'fine-tuning': dict(random=[70., 72.], pretrained=[75., 77.]),
            demo.LAST_BLOCK: dict(random=[50.], pretrained=[45.])}
    return dict(loss=-0.9, spread=0.8, rows=rows) | changes


def test_verdict():
    assert demo.check(results()) == []
    collapsed, = demo.check(results(loss=-0.9999))
    assert 'collapsed' in collapsed and '-0.9999' in collapsed
    assert 'collapsed' in demo.check(results(spread=0.01))[0]
    rows = {'fine-tuning': dict(random=[70., 72.], pretrained=[71., 70.])}
    useless, = demo.check(results(rows=rows))
    assert 'did not help: fine-tuning yields 70.5 % with it and 71.0 % without' in useless


def test_short_demo(tmp_path, monkeypatch, capsys):
    """Every part runs; the exit status follows the verdict on what was measured."""
    monkeypatch.setattr(demo, 'LABELS', {20: 9, 300: 9})
    monkeypatch.setattr(demo, 'ITERS', 5)
    monkeypatch.setattr(demo, 'compare', in_process)
    out = tmp_path / 'demo'
    assert demo.main(['--work-dir', str(out), '--epochs', '2', '--seeds', '1']) is True
    table = (out / 'results.md').read_text()
    results = json.loads((out / 'results.json').read_text())
    rows, problems = results['rows'], demo.check(results)
    assert set(rows) == {'k-NN, first block', demo.LAST_BLOCK, 'fine-tuning, 20 labels',
                         'fine-tuning, 300 labels', 'linear probe, first block, 300 labels',
                         'linear segmentation, first block, mIoU'}
    assert 0 <= results['upernet'] <= 100
    assert all(0 <= value <= 100 for row in rows.values() for runs in row.values()
               for value in runs)
    assert all(name in table for name in rows)
    for name in ('loss.png', 'prediction.png', 'segmentation.png'):
        assert min(Image.open(out / name).size) > 300
    assert '"name":"test digit 7"' in (out / 'explore.html').read_text()
    printed = capsys.readouterr().out
    assert f'Open {out / "explore.html"} in a browser' in printed
    assert 'pretraining' in printed and 'Epoch(train)' not in printed
    assert any('did not help: fine-tuning, 20 labels yields 0.0 %' in line for line in problems)
    assert all(line in ' '.join(printed.split()) for line in problems)
    assert 'Epoch(train)' in next((out / 'digits_pretrain').glob('*/*.log')).read_text()


def in_process(jobs, *args):
    """demo.compare without processes, one seed, and no success with 20 labels."""
    work_dir, checkpoint, _ = args
    rows = {name: {start: [job(start, 0, work_dir, checkpoint)] for start in demo.STARTS}
            for name, job in jobs.items()}
    rows['fine-tuning, 20 labels']['pretrained'] = [0.]
    return rows


def test_processes_have_one_thread_and_leave_the_environment_alone():
    before = dict(os.environ)
    with demo.process_pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
    assert os.environ == before and 'TORCHDYNAMO_DISABLE' not in before
