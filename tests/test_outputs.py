"""Every input gets its own output, and no tool touches a file that it did not make."""
import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from .tiny_runs import (
    load_tool,
    run_script,
    run_test,
    run_train,
    save_classifier,
    save_constant,
    save_image,
    save_pretraining,
    save_segmentor,
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder='.'):
    """All files below a folder, logs aside."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*')
            if path.is_file() and 'work_dirs' not in path.parts}


def untouched(before):
    return {path: Path(path).read_bytes() for path in before} == before


def in_process(name, *args):
    """Call a tool as a command does: (status, what it said)."""
    tool, said, status = load_tool(name), io.StringIO(), 0
    main = dict(train=run_train, test=run_test).get(name, tool.main)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setitem(sys.modules, tool.__name__, tool)     # for the processes of a pool
        try:
            main([str(arg) for arg in args])
        except SystemExit as ended:
            status = ended.code
    return status, said.getvalue()


def typed(command, *args, status=0):
    """Type a command; what it said. Python runs in this process, which saves its imports."""
    name, _, suffix = command.partition('.')
    code, said = (run_script(command, *args, cwd=Path.cwd()) if suffix == 'sh' else
                  in_process(name, *args))
    assert code == status, said
    if status:
        assert said.count('error: ') == 1 and 'Traceback' not in said, said
    return said


@pytest.mark.parametrize('save', [save_classifier, save_segmentor])
def test_predict(save):
    if save is save_segmentor:
        pytest.importorskip('mmseg')
    model, checkpoint = save()
    for path in ('cat.png', 'a/x.png', 'b/x.png', 'x_2.png', 'labels/cat_2.png'):
        save_image(Path(path))
    Path('dog.png').symlink_to('nowhere.png')
    save_image(Path('c/dog.png'))
    before = contents()
    command = ['predict.py', 'cat.png', 'a/x.png', 'b/x.png', 'c/dog.png', '--model', model,
               '--checkpoint', checkpoint, '--out-dir', '.']
    pages = re.findall('-> (.*)', typed(*command) + typed(*command))
    assert untouched(before) and not Path('nowhere.png').exists()
    assert len(set(pages)) == 8 and all(Path(page).is_file() for page in pages)
    if save is save_segmentor:
        assert all(Path('labels', page).is_file() for page in pages)


def test_visualize():
    model, checkpoint = save_classifier()
    for path in ('cat.png', 'a/x.png', 'b/x.png'):
        save_image(Path(path))
    Path('grid.png').write_text('mine')
    before = contents()
    command = ['visualize.py', model, checkpoint, 'cat.png', 'a/x.png', 'b/x.png', '--out-dir', '.',
               '--size', '28', '--grid']
    said = run_script(*command, cwd=Path.cwd())[1] + typed(*command)
    pages = re.findall(r'^\S+\.png$', said, re.M)
    assert untouched(before) and len(set(pages)) == len(pages) == 8


@pytest.mark.parametrize('command', [['test.py'], ['dist_test.sh']], ids=str)
@pytest.mark.parametrize('save', [save_classifier, save_segmentor])
def test_test(save, command):
    if save is save_segmentor:
        pytest.importorskip('mmseg')
    config, checkpoint = save()
    cfg = Config.fromfile(config)
    for name in ('a/x', 'b/x', 'c/y', 'd/y', 'e/b_x'):
        save_image(Path(f'test/{name}.jpg'))
        Path('labels', name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.eye(28, 32, dtype=np.uint8)).save(f'labels/{name}.png')
    prefix = 'test' if save is save_classifier else dict(img_path='test', seg_map_path='labels')
    cfg.test_dataloader.dataset.update(data_root='', data_prefix=prefix)
    cfg.dump('config.py')
    save_image(Path('shown/x.png'))
    before, out = contents(), 'out.pkl' if save is save_classifier else 'maps'
    command = [*command, 'config.py', checkpoint, *([2] if command == ['dist_test.sh'] else []),
               '--show-dir', 'shown', '--out', out]
    assert ' names in shown were taken: ' in typed(*command)
    assert untouched(before)
    assert {path.name for path in Path('shown').iterdir()} == {
        'x.png', 'a_x.png', 'b_x.png', 'y.png', 'd_y.png', 'e_b_x.png'}
    if save is save_segmentor:
        assert {path.name for path in Path('maps').iterdir()} == {
            'x.png', 'b_x.png', 'y.png', 'd_y.png', 'e_b_x.png'}
    before = contents()
    if command[0] == 'test.py':
        assert f'--out {out} exists' in typed(*command, status=2) and contents() == before


def test_out_of_test_is_new():
    config, checkpoint = save_classifier()
    Path('mine.json').write_text('{}')
    before = contents()
    said = typed('test.py', config, checkpoint, '--out', 'mine.json', '--out-item', 'metrics',
                 status=2)
    assert said.endswith('--out mine.json exists already; remove it or name another.\n')
    assert untouched(before) and not Path('work_dirs').exists()


def test_label_maps_and_pictures_in_one_folder():
    pytest.importorskip('mmseg')
    said = typed('test.py', *save_segmentor(), '--out', 'a', '--show-dir', './a', status=2)
    assert '--out and --show-dir are both a' in said


def test_samples_without_a_file():
    """Two batches, the last one smaller."""
    config, checkpoint = save_classifier()
    cfg = Config.fromfile(config)
    cfg.model.backbone.patch_size = 4
    cfg.model.head.num_classes = 10
    cfg.test_dataloader.update(batch_size=498, dataset=dict(
        type='Digits', split='test', pipeline=[dict(type='PackInputs')]))
    cfg.dump('digits.py')
    save_constant('mmpretrain', cfg.model, 'head.fc', 'digits.pth')
    typed('test.py', 'digits.py', 'digits.pth', '--show-dir', 'shown')
    assert len(list(Path('shown').iterdir())) == 500


def test_config_in_the_work_directory():
    """The run writes its copy of the config beside the config, not over it."""
    config = save_pretraining()
    Path(config).write_text('# my words\n' + Path(config).read_text())
    before = contents()
    typed('train.py', config, '--work-dir', '.')
    assert untouched(before) and Path('pretrain_2.py').is_file()
    assert Config.fromfile('pretrain_2.py').work_dir == '.'


def test_plot_log():
    Path('log.png').write_text('mine')
    Path('run/1/vis_data').mkdir(parents=True)
    Path('run/1/vis_data/scalars.json').write_text(json.dumps(dict(iter=1, epoch=1, loss=1.)))
    before = contents()
    assert 'Wrote log_2.png.' in typed('plot_log.py', 'run') and untouched(before)


@pytest.mark.parametrize('command', [
    ['resize_imagenet.py', 'images', 'mine', '--short-side', '8', '--workers', '1'],
    ['make_digit_scenes.py', '--out', 'mine', '--train', '1', '--val', '1'],
    ['digits.py', '--work-dir', 'mine'], ['ablations.py', '--work-dir', 'mine'],
    ['benchmark.py', 'step', '--json', 'mine']], ids=lambda command: command[0])
def test_folders_of_others(command):
    save_image(Path('images/n01/a.jpg'))
    save_image(Path('mine/n01/a.jpg'))
    before = contents()
    assert 'mine exists already' in typed(*command, status=2) and contents() == before
    if command[0] in ('resize_imagenet.py', 'make_digit_scenes.py'):
        command = ['new' if word == 'mine' else word for word in command]
        typed(*command)
        typed(*command)     # goes on
        assert len(contents('new')) > 1


def test_resize_into_the_source():
    save_image(Path('images/n01/a.jpg'))
    Path('link').symlink_to('images')
    before = contents('images')
    for target in ('images', 'images/small', 'link', 'link/small'):
        said = typed('resize_imagenet.py', 'images', target, status=2)
        assert f'{target} is inside images' in said and contents('images') == before
