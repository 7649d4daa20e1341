"""docs/your_own_images.md: every command of the walk-through, word for word, on a tiny network."""
import glob
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from .conftest import REPO
from .test_docs import blocks
from .tiny_runs import load_tool, options, run_train

PAGE = (REPO / 'docs/your_own_images.md').read_text()
WALK = PAGE.partition('\n## Other configs')[0]
SMALL = options('image_size=32', 'embed_dims=32', 'num_layers=4', 'num_heads=2', 'batch_size=24',
                'num_workers=0')
CLASSES = ('animals', 'food', 'vehicles')


def commands():
    text = '\n'.join(blocks(WALK, 'shell')).replace('\\\n', ' ')
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def draw(label, index, size):
    """A grey scene with one shape in the colour of its class, and its mask."""
    rng = np.random.default_rng(10 * index + label)
    image = Image.fromarray(rng.integers(90, 130, (size[1], size[0], 3), dtype=np.uint8))
    mask = Image.new('L', size, 0)
    left, top = rng.integers(2, 12, 2).tolist()
    box = (left, top, left + 24, top + 20)
    for canvas, colour in ((image, ('red', 'lime', 'blue')[label]), (mask, label + 1)):
        ImageDraw.Draw(canvas).ellipse(box, fill=colour)
    return image, mask


@pytest.fixture
def new_user(tmp_path, monkeypatch):
    """The root of a clone, without runs, and the three data folders of the page."""
    monkeypatch.chdir(tmp_path)
    for name in ('configs', 'tools'):
        Path(name).symlink_to(REPO / name)
    for folder in ('photos/Müller & Söhne/2024', 'new', 'scenes/images', 'scenes/masks',
                   *(f'classes/{name}' for name in CLASSES)):
        Path('data', folder).mkdir(parents=True)
    for index in range(30):
        image, mask = draw(index % 3, index, (40 + index % 7, 38 + index % 5))
        kind = ('jpg', 'png', 'webp', 'JPEG')[index % 4]
        mode = 'L' if index == 7 else 'CMYK' if index == 4 else 'RGB'
        image.convert(mode).save(
            f'data/photos/{"Müller & Söhne/2024/" * (index % 2)}bild {index}.{kind}')
        image.save(f'data/classes/{CLASSES[index % 3]}/{index}.{kind}')
        image.save(f'data/scenes/images/scene {index}.{kind}')
        mask.save(f'data/scenes/masks/scene {index}.png')
        if index < 3:
            image.save(f'data/new/{CLASSES[index]} new.jpg')
    return tmp_path


def run(words):
    """Run one command as a shell would; only the size of the network is added."""
    assert words[0] == 'python'
    tool = Path(words[1]).stem
    args = [path for word in words[2:] for path in
            (sorted(glob.glob(word)) if '*' in word else [word])]
    if tool == 'train':
        given = {word.partition('=')[0] for word in args}
        small = [word for word in SMALL if word.partition('=')[0] not in given]
        return run_train([*args, *small])
    return load_tool(tool).main([*args, *(SMALL if tool == 'knn' else [])])


@pytest.mark.filterwarnings('ignore')
def test_every_command(new_user, capsys):
    found = commands()
    assert [Path(words[1]).stem for words in found] == [
        'train', 'plot_log', 'visualize', 'visualize', 'knn', 'train', 'train', 'predict', 'train',
        'predict', 'export', 'publish_model']
    results = {}
    for words in found:
        results.setdefault(Path(words[1]).stem, []).append(run(words))
    pretrain, linear, finetune, upernet = results['train']
    assert len(pretrain.train_dataloader.dataset) == 30
    loss = [json.loads(line)['loss'] for line in next(Path('work_dirs/pretrain').glob(
        '*/vis_data/scalars.json')).read_text().splitlines()]
    assert loss[-1] < loss[0] - 0.05
    assert min(Image.open('pretrain.png').size) > 300
    assert len(list(Path('visualization').glob('*.png'))) >= 4      # with the sheet
    for runner, name, least in ((linear, 'accuracy/top1', 60), (finetune, 'accuracy/top1', 60),
                                (upernet, 'mIoU', 40)):
        assert runner.message_hub.get_scalar(f'val/{name}').current() > least, name
    assert len(list(Path('predictions/classes').glob('*.png'))) == 3
    labels = sorted(Path('predictions/masks/labels').glob('*.png'))
    assert len(labels) == 3 and all(np.asarray(Image.open(path)).max() < 4 for path in labels)
    assert Path('pretrain.html').is_file()
    assert len(Path('classes.csv').read_text().splitlines()) == 4       # with the header
    assert Path('classifier.onnx').is_file() and Path('classifier/README.md').is_file()
    # what the page quotes
    assert 'Found 30 images in data/photos (8 .' in ''.join(
        path.read_text() for path in Path('work_dirs/pretrain').glob('*/*.log'))


def test_names_on_the_page_are_those_of_the_files():
    """Numbers of epochs in the names of checkpoints, and suggested settings."""
    for name in ('pretrain', 'finetune', 'upernet'):
        epochs = (REPO / f'configs/custom/{name}.py').read_text().partition('\nepochs = ')[2]
        assert f'work_dirs/{name}/epoch_{epochs.split()[0]}.pth' in WALK
