"""docs/quickstart.ipynb: a short run of every cell, and the outputs that are committed."""
import json
import shutil

import pytest
from PIL import Image

from .conftest import REPO
from .tiny_runs import load_tool

notebook = load_tool('run_notebook')
SETTINGS = 'EPOCHS, FINETUNE_EPOCHS, TILES = 60, 80, 64'


def read():
    return json.loads((REPO / 'docs/quickstart.ipynb').read_text())


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone's folders, so that the notebook writes nothing into this one."""
    for name in ('configs', 'demo', 'tools'):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / 'docs').mkdir()
    shutil.copy(REPO / 'docs/quickstart.ipynb', tmp_path / 'docs')
    monkeypatch.syspath_prepend(str(tmp_path))      # undoes what the first cell adds
    return tmp_path


def test_every_cell_runs(clone):
    """With fewer epochs; the first cell moves from docs/ to the root."""
    replaced = []

    def shorter(source):
        if SETTINGS in source:
            replaced.append(source)
        return source.replace(SETTINGS, 'EPOCHS, FINETUNE_EPOCHS, TILES = 8, 10, 8')

    ran, namespace = notebook.run_notebook(clone / 'docs/quickstart.ipynb', shorter)
    assert len(replaced) == 1
    top1 = namespace['top1']
    assert top1['epoch_8'] > top1['random'] + 5
    assert set(namespace['finetuned']) == {'random', 'pretrained'}
    assert all(10 < accuracy <= 100 for accuracy in namespace['finetuned'].values())
    out = clone / 'work_dirs/quickstart'
    assert len(list((out / 'my_images').iterdir())) == 16
    for name in ('loss.png', 'pages/digit.png', 'pages/china_6.png'):
        assert min(Image.open(out / name).size) >= 300, name
    for name in ('pretrain', 'my_pretrain'):
        assert (out / name / 'epoch_8.pth').is_file()
    shown = [list(output.get('data', {})) for cell in ran['cells']
             for output in cell.get('outputs', [])]
    assert sum('image/png' in data for data in shown) == 3


def test_committed_outputs_are_of_this_notebook():
    """No cell changed its number, none failed, no path of a machine, small enough for a diff."""
    text = (REPO / 'docs/quickstart.ipynb').read_text()
    assert len(text.encode()) < notebook.MAX_BYTES
    cells = [cell for cell in read()['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output['output_type'] for cell in cells for output in cell['outputs']]
    assert set(kinds) == {'stream', 'execute_result'}
    assert str(REPO) not in text and '/tmp/' not in text and '/home/' not in text


def test_a_broken_cell_is_named(clone):
    path = clone / 'docs/broken.ipynb'
    path.write_text(json.dumps(dict(cells=[
        dict(cell_type='markdown', source=['text']),
        dict(cell_type='code', source=['one = 1\n', 'one'], outputs=[]),
        dict(cell_type='code', source=['one / 0'], outputs=[])])))
    with pytest.raises(ZeroDivisionError) as error:
        notebook.run_notebook(path)
    assert error.traceback[-1].frame.code.raw.co_filename == 'broken.ipynb, cell 2'
