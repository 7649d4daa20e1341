"""`make ablations`: its verdict, and a very short run from end to end."""
import copy
import json
import re

import pytest
from PIL import Image

from .tiny_runs import load_tool

tool = load_tool('ablations')

ENDS = {    # next_cosine, copy_cosine, lift, embedding_std, embedding_rank, output_rank
    'full': (0.9, 0.2, 0.7, 0.8, 8.5, 12.), 'no causal mask': (0.99, 0.2, 0.8, 0.8, 7., 9.),
    'no shift': (0., 1., -1., 0.5, 3.5, 3.5), 'no stop-gradient': (1., 1., 0., 0.002, 1.03, 1.)}
SIGREG = dict(zip(tool.MONITORS, ((0.9,), (0.1,), (0.8,), (0.7,), (3.5,), (4.5,))), warned=[],
              loss=-0.9, top1=[88.], iterations=[42])
WARNED = {'no shift': ['copying'], 'no stop-gradient': ['collapse']}
TOP1 = {'full': 89., 'no causal mask': 78., 'no shift': 50., 'no stop-gradient': 15.,
        tool.SCRATCH: 80.}


def made_up():
    """What the tool should find, in numbers near those of a real run."""
    results = {row: [dict(
        {name: [0.5, end] for name, end in zip(tool.MONITORS, ends)}, iterations=[21, 42],
        warned=WARNED.get(row, []), loss=-1. if row in WARNED else -0.9, top1=[TOP1[row]] * 3)]
        for row, ends in ENDS.items()}
    return results | {tool.SCRATCH: [dict(top1=[TOP1[tool.SCRATCH]] * 3)]}


def test_verdict():
    assert tool.check(made_up()) == []


@pytest.mark.parametrize('row, change, words', [
    ('full', dict(warned=['copying']), 'full, seed 0: expected no warning'),
    ('full', dict(lift=[0.1]), 'lift 0.100'),
    ('no shift', dict(warned=[]), 'expected the identity .* warned of nothing'),
    ('no shift', dict(copy_cosine=[0.9]), 'copy_cosine 0.900'),
    ('no stop-gradient', dict(warned=[]), 'expected equal embeddings'),
    ('no stop-gradient', dict(embedding_std=[0.5]), 'embedding_std 0.500'),
    ('no stop-gradient', dict(embedding_rank=[5.]), 'embedding_rank 5.000'),
    ('SIGReg', dict(embedding_std=[0.05]), 'SIGReg, seed 0: expected no collapse'),
    ('SIGReg', dict(warned=['collapse']), 'the monitor warned of collapse'),
    ('no causal mask', dict(top1=[102.] * 3), 'no causal mask: 90.0 %.* no less than the 89.0 %')])
def test_what_did_not_show(row, change, words):
    results = made_up() | dict(SIGReg=[copy.deepcopy(SIGREG)])
    results[row].append(copy.deepcopy(results[row][0]))
    results[row][0].update(change)      # one seed is enough
    problem, = tool.check(results)
    assert re.search(words, problem)


def test_words_and_table():
    text = ' '.join(tool.explain(made_up()))
    assert 'copy_cosine 1.000' in text and 'embedding_std 0.002' in text
    assert 'next_cosine 0.990 against 0.900' in text
    header, rows = tool.tabulate(made_up())
    cells = {row[0]: dict(zip(header, row)) for row in rows}
    assert cells['no shift']['ImageNet-1K, % (published)'] == 'fail'
    assert cells['full']['ImageNet-1K, % (published)'] == '76.8'
    assert cells['no shift']['warning'] == 'copying' and cells['full']['warning'] == '–'
    assert cells['full']['digits, 300 labels, %'] == '89.0 ± 0.0'
    assert cells[tool.SCRATCH]['loss'] == '–'


def test_chosen_rows():
    """A row that did not run is neither judged nor mentioned nor drawn."""
    results = dict(SIGReg=[SIGREG], **{row: made_up()[row] for row in ('no stop-gradient',)})
    assert tool.check(results) == []
    collapse, sigreg = tool.explain(results)
    assert 'No stop-gradient' in collapse
    assert 'SIGReg: the embeddings stay apart' in sigreg and 'embedding_std 0.70' in sigreg
    assert [row[0] for row in tool.tabulate(results)[1]] == list(results)


def test_refuses_an_unknown_row(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(['--work-dir', str(tmp_path / 'out'), '--rows', 'full', 'no-shift'])
    assert error.value.code == 2 and not (tmp_path / 'out').exists()
    assert "invalid choice: 'no-shift' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize('row', ['SIGReg', 'mse', 'infonce'])
def test_options_of_newer_papers_run(tmp_path, monkeypatch, row):
    """One epoch of the row itself: --rows passes it on, and its loss is in the log."""
    monkeypatch.setattr(tool, 'LABELS', 20)
    monkeypatch.setattr(tool, 'FINETUNE_EPOCHS', 9)
    monkeypatch.setattr(tool, 'DRAWS', 1)
    monkeypatch.setattr(tool, 'run_all', lambda rows, epochs, seeds, work_dir, report: {
        name: [tool.run(name, 0, epochs, work_dir)] for name in rows})
    tool.main(['--work-dir', str(tmp_path / 'out'), '--epochs', '1', '--rows', row])
    result, = json.loads((tmp_path / 'out' / 'results.json').read_text())['rows'][row]
    if row == 'infonce':
        assert 0.5 < result['loss'] < 2.8       # uniform logits: log(16) = 2.77
    log, = (tmp_path / 'out').glob(f'{row}_0/2*/*.log')
    assert ('loss_regularizer: ' in log.read_text()) == (row == 'SIGReg')
    assert min(Image.open(tmp_path / 'out' / 'monitors.png').size) > 300


def test_short_run(tmp_path, monkeypatch, capsys):
    """Every part runs; the exit status follows the verdict."""
    monkeypatch.setattr(tool, 'LABELS', 20)
    monkeypatch.setattr(tool, 'FINETUNE_EPOCHS', 9)
    monkeypatch.setattr(tool, 'DRAWS', 1)
    monkeypatch.setattr(tool, 'run_all', in_process)
    assert tool.main(['--work-dir', str(tmp_path / 'out'), '--epochs', '1', '--seeds', '1']) is True
    saved = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert set(saved['rows']) == set(tool.DEFAULT_ROWS)
    problems = tool.check(saved['rows'])
    assert problems == saved['problems'] and any('no shift, seed 0' in line for line in problems)
    assert saved['rows']['full'][0]['iterations'] == [21]
    # the rows really differ: without shift, the output is the patch just read from the start
    assert saved['rows']['no shift'][0]['copy_cosine'][-1] > 0.9
    assert saved['rows']['full'][0]['copy_cosine'][-1] < 0.9
    assert min(Image.open(tmp_path / 'out' / 'monitors.png').size) > 300
    printed, written = capsys.readouterr().out, (tmp_path / 'out' / 'results.md').read_text()
    for text in (printed, written):
        assert 'no causal mask' in text and '73.6' in text
        assert all(line in text for line in problems)
    monkeypatch.setattr(tool, 'run_all', lambda *args: made_up())
    assert tool.main(['--work-dir', str(tmp_path / 'again')]) is False
    assert 'No causal mask: no monitor shows the failure' in capsys.readouterr().out


def in_process(rows, epochs, seeds, work_dir, report):
    """tool.run_all without processes, and only two rows in earnest."""
    assert rows == list(tool.DEFAULT_ROWS)
    return made_up() | {row: [tool.run(row, 0, epochs, work_dir)] for row in ('full', 'no shift')}
