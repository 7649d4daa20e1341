"""docs/your_own_script.md and README's features: every block runs, with fewer steps."""
import re
import shlex
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

import nepa_mm

from .conftest import REPO
from .test_docs import BLOCK
from .tiny_runs import load_tool

PAGE = REPO / 'docs/your_own_script.md'
CHECKPOINT = Path('work_dirs/digits_pretrain/epoch_60.pth')


def save_inputs():
    """Photos of three classes that differ in colour, and the checkpoint without its training."""
    rng = np.random.default_rng(0)
    for label, (name, colour) in enumerate(dict(cat=(200, 60, 40), dog=(40, 180, 60),
                                                owl=(50, 70, 200)).items()):
        Path('photos', name).mkdir(parents=True)
        for i in range(1, 7):
            pixels = rng.normal(colour, 30, (40 + 3 * i, 60 - label, 3)).clip(0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            (image.convert('L') if i == 6 else image).save(f'photos/{name}/{i}.jpg')
    cfg = Config.fromfile(REPO / 'configs/demo/digits_pretrain.py')
    fresh = nepa_mm.load('digits_pretrain')
    CHECKPOINT.parent.mkdir(parents=True)
    torch.save(dict(state_dict=fresh.state_dict(), meta=dict(cfg=cfg.pretty_text)), CHECKPOINT)


def run_page(text, shorter=lambda source: source):
    """Run the blocks of a page in order; return the variables of the Python blocks."""
    namespace, commands = {}, []
    for language, body in BLOCK.findall(text):
        if language == 'python':
            exec(compile(shorter(body), 'block', 'exec'), namespace)
        for line in re.sub(r'\\\n', ' ', body).splitlines() if language == 'shell' else ():
            commands.append(shlex.split(line))
            python, tool, *args = commands[-1]
            assert python == 'python'
            if tool != 'tools/train.py':        # its checkpoint is there
                load_tool(Path(tool).stem).main(args)
    return namespace, commands


def test_page(folder, capsys):
    replaced = []

    def shorter(source):
        if 'EPOCHS, BATCH_SIZE, SIZE = 300, 64, 64' in source:
            replaced.append(source)
        return source.replace('= 300, 64, 64', '= 6, 6, 32').replace(
            'num_workers=2', 'num_workers=0')

    torch.manual_seed(0)
    save_inputs()
    found, commands = run_page(PAGE.read_text(), shorter)
    assert len(replaced) == 1
    assert [command[1] for command in commands] == [
        'tools/train.py', 'tools/extract_features.py',
        'tools/model_converters/convert_checkpoint.py']
    assert commands[0][2] == 'configs/demo/digits_pretrain.py'

    assert found['x'].shape == (3, 16, 16) and found['maps'].shape == (18, 96, 4, 4)
    accuracy, = re.findall(r'accuracy ([\d.]+)', capsys.readouterr().out)
    assert float(accuracy) > 0.6        # colours, and a third of them by chance
    ours = nepa_mm.load(CHECKPOINT)
    torch.testing.assert_close(
        found['features'], nepa_mm.features(ours, 'photos/cat/1.jpg'), rtol=0, atol=1e-5)

    losses = found['losses']
    assert len(losses) == 18 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(nepa_mm.features(found['mine'], images),
                       nepa_mm.features(found['ema'].module, images))
    assert found['mine'].transform('photos/owl/6.jpg').shape == (3, 32, 32)


def test_readme(folder):
    section, = re.findall(r'## Features in Python\n(.*?)\n## ', (REPO / 'README.md').read_text(),
                          re.S)
    save_inputs()
    Path('resources').symlink_to(REPO / 'resources')
    blocks = [body for language, body in BLOCK.findall(section) if language == 'python']
    assert blocks
    found = {}
    for body in blocks:
        exec(compile(body, 'README.md', 'exec'), found)
    assert found['features'].shape == (1, 96)
    assert found['larger'].shape == (1, 96)
