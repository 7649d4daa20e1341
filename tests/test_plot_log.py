"""The page of curves: what is read, what is drawn."""
import json

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from .tiny_runs import load_tool, options, run_script, run_train, save_classifier

tool = load_tool('plot_log')


def save_log(folder, time, rows):
    path = folder / time / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


def train(iteration, epoch, **scalars):
    return dict(scalars, iter=iteration, step=iteration, epoch=epoch)


@pytest.fixture
def resumed(tmp_path):
    """Two epochs of 10 iterations, of which the second was interrupted and done again."""
    rows = [train(5, 1, loss=-0.1), train(10, 1, loss=-0.2), dict(accuracy=3., step=1),
            train(15, 2, loss=-0.9)]
    save_log(tmp_path / 'resumed', '20250101_000000', rows)
    save_log(tmp_path / 'resumed', '20250101_120000', [])
    return save_log(tmp_path / 'resumed', '20250102_000000', [
        train(15, 2, loss=-0.3), train(20, 2, loss=-0.4, lift=0.5, embedding_rank=float('nan')),
        train(20, 2, knn_top1=50., knn_top1_ema=60.)])


def test_a_resumed_run_is_one_curve(resumed):
    rows = tool.read_run(resumed)
    assert [(row['iter'], row.get('loss')) for row in rows] == [
        (5, -0.1), (10, -0.2), (10, None), (15, -0.3), (20, -0.4), (20, None)]
    assert tool.iters_per_epoch(rows) == 10


def test_lines_that_a_kill_cut_are_left_out(resumed):
    file, *_ = sorted(resumed.glob('*/vis_data/scalars.json'))
    file.write_bytes(file.read_bytes()[:-9] + b'\xff\x00')
    code, output = run_script('plot_log.py', resumed, '--out', resumed / 'page.png', cwd=resumed)
    assert code == 0 and 'Skipped 1 of 4 lines' in output and (resumed / 'page.png').is_file()


def draw(runs, out, monkeypatch):
    """The curves of each panel by its title, and the figure."""
    monkeypatch.setattr(tool.plt, 'close', lambda figure: None)
    tool.draw(runs, out)
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    return {axis.get_title(): axis for axis in figure.axes}, figure


def test_curves(resumed, tmp_path, monkeypatch):
    other = [train(7, 1, loss=-0.5, lift=0.1), train(7, 1, linear_top1=70.)]
    panels, figure = draw(dict(a=tool.read_run(resumed), b=other), tmp_path / 'x.png', monkeypatch)
    a, b = panels['loss'].lines
    assert (list(a.get_xdata()), list(a.get_ydata())) == ([0.5, 1, 1.5, 2], [-.1, -.2, -.3, -.4])
    assert (list(b.get_xdata()), list(b.get_ydata())) == ([1], [-0.5])
    assert panels['loss'].get_xlabel() == 'epoch' and a.get_color() != b.get_color()
    accuracy = panels['top-1 accuracy on frozen features, %'].lines
    assert [(list(line.get_ydata()), line.get_linestyle()) for line in accuracy] == [
        ([60], '-'), ([50], '--'), ([70], ':')]
    assert list(panels) == [         # those with values, and no empty ones
        'loss', 'lift: cosine with the next patch minus with the last one read',
        'top-1 accuracy on frozen features, %']
    assert [text.get_text() for text in figure.legends[0].texts] == ['a', 'b']
    assert Image.open(tmp_path / 'x.png').size == (1920, 540)


def test_iterations_where_a_run_has_no_epochs(tmp_path, monkeypatch):
    rows = [dict(iter=100, loss=-0.5), dict(iter=200, loss=-0.6)]
    panels, _ = draw(dict(a=rows), tmp_path / 'x.png', monkeypatch)
    assert list(panels['loss'].lines[0].get_xdata()) == [100, 200]
    assert panels['loss'].get_xlabel() == 'iteration'


def test_command(resumed, tmp_path):
    code, output = run_script('plot_log.py', resumed, '--out', tmp_path / 'page.png', cwd=tmp_path)
    assert code == 0 and Image.open(tmp_path / 'page.png').size == (1920, 540), output


def tuned(epochs, **logged):
    """Rows of a fine-tuning: 10 iterations an epoch, of which the 5th is logged; validations."""
    for epoch in range(1, epochs + 1):
        yield train(10 * epoch - 5, epoch, loss=1 / epoch, lr=0.1 * epoch)
        yield dict({name: value * epoch for name, value in logged.items()}, step=epoch)


def test_fine_tuning_and_segmentation(tmp_path, monkeypatch):
    """Accuracy over epochs, mIoU over iterations: validations log either as their step."""
    rows = [*tuned(3, **{'accuracy/top1': 10., 'accuracy/top5': 20.})]
    run = tool.read_run(save_log(tmp_path / 'a', '20250101_000000', rows))
    panels, _ = draw(dict(a=run), tmp_path / 'a.png', monkeypatch)
    assert list(panels) == ['loss', 'accuracy of the validation, %', 'learning rate']
    top1, top5 = panels['accuracy of the validation, %'].lines
    assert list(top1.get_xdata()) == pytest.approx([1, 2, 3])
    assert (list(top1.get_ydata()), list(top5.get_ydata())) == ([10, 20, 30], [20, 40, 60])
    assert list(panels['learning rate'].lines[0].get_ydata()) == pytest.approx([.1, .2, .3])

    rows = [dict(iter=100, loss=1., lr=0.1), dict(mIoU=20., aAcc=30., step=150),
            dict(iter=200, loss=0.5, lr=0.), dict(mIoU=40., aAcc=60., step=300)]
    run = tool.read_run(save_log(tmp_path / 'b', '20250101_000000', rows))
    panels, _ = draw(dict(b=run), tmp_path / 'b.png', monkeypatch)
    assert list(panels) == ['loss', 'segmentation of the validation, %', 'learning rate']
    axis = panels['segmentation of the validation, %']
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] == [
        ([150, 300], [20, 40]), ([150, 300], [30, 60])]
    assert [text.get_text() for text in axis.get_legend().texts] == ['mIoU', 'pixel accuracy']


def test_logs_of_the_runner(folder):
    """A real fine-tuning: what mmengine writes is what is read."""
    config, _ = save_classifier()
    run_train([config, '--work-dir', 'run', *options(
        'train_cfg.max_epochs=2', "visualizer.vis_backends=[dict(type='LocalVisBackend')]")])
    rows = tool.read_run('run')
    assert [row['iter'] for row in rows if 'accuracy/top1' in row] == [4, 8]
    tool.main(['run', '--out', 'new/a.png'])
    assert Image.open('new/a.png').size == (1920, 540)


@pytest.mark.parametrize('rows, message', [
    (None, 'error: no */vis_data/scalars.json in'), ([], 'error: no training log in'),
    ([dict(iter=1, time=0.1, loss=float('nan'))], 'have nothing to plot: no aAcc, accuracy/')])
def test_bad_input(tmp_path, capsys, rows, message):
    if rows is not None:
        save_log(tmp_path / 'run', '20250101_000000', rows)
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(tmp_path / 'run')])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err
