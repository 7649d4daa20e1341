"""Damage images, checkpoints, published weights and their configs, and read them."""
import contextlib
import copy
import io
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from nepa_mm.checkpoints.huggingface import to_published
from nepa_mm.checkpoints.huggingface_config import DEFAULTS, model_cfg
from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint
from nepa_mm.engine.hooks.unreadable_images import ReadableSamples

from ..test_convert import SMALL, build, convert, write_published
from .kills import finish, same, save_config, start

SECONDS = 20        # more for one file is a hang
REFUSALS = (ValueError, FileNotFoundError, FileExistsError)
VALUES = [None, True, False, 0, 1, -1, 3, 10 ** 9, -2.5, 1e-300, float('nan'), float('inf'), '',
          'gelu', '../x', [], [1, 2], [0], {}, {'a': 1}, 2 ** 70]


class HangError(BaseException):
    """It took too long; no ``except Exception`` may hide it."""


@contextlib.contextmanager
def no_hang():
    """Turn a hang into an error."""
    def ring(*_):
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate(rng, content):
    """Cut, flip, overwrite, insert or repeat somewhere in some bytes."""
    content, kind = bytearray(content), rng.integers(6)
    at = int(rng.integers(len(content)))
    noise = rng.integers(0, 256, int(rng.integers(1, 17)), dtype=np.uint8).tobytes()
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        content[at:at + len(noise)] = noise
    elif kind == 3:
        content[at:at] = noise
    elif kind == 4:     # in the header, where most can go wrong
        at = int(rng.integers(min(len(content), 200)))
        content[at:at + 2] = noise[:2]
    else:
        del content[at:at + len(noise)]
    return bytes(content)


def images(rng, num, steps):
    """Yield, for each of ``num`` damaged JPEGs and PNGs, what is wrong with its sample, or None."""
    init_default_scope('mmpretrain')
    folder = Path('images')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((64, 48))
    encoded = []
    for kind, mode, options in [
            ('JPEG', 'RGB', {}), ('JPEG', 'L', {}), ('JPEG', 'CMYK', {}),
            ('JPEG', 'RGB', dict(progressive=True)), ('PNG', 'RGB', {}), ('PNG', 'P', {}),
            ('PNG', 'LA', {}), ('PNG', 'I;16', {})]:
        buffer = io.BytesIO()
        image = photo.convert('L').convert('I').convert(mode) if mode == 'I;16' else (
            photo.convert(mode))
        image.save(buffer, kind, **options)
        encoded.append(buffer.getvalue())
    for index in range(num):
        (folder / f'{index:04d}.jpg').write_bytes(mutate(rng, encoded[index % len(encoded)]))
    dataset = DATASETS.build(dict(
        type='CustomDataset', data_prefix=str(folder), with_label=False,
        pipeline=[*steps, dict(type='PackInputs')]))
    dataset.prepare_data = ReadableSamples(dataset, replace_labelled=False)
    for index in range(num):
        name = Path(dataset.get_data_info(index)['img_path']).name
        try:
            with no_hang():
                sample = dataset[index]
        except (Exception, HangError) as error:
            yield f'{name}: {type(error).__name__}: {error}'
            continue
        read = Path(sample['data_samples'].img_path).name
        counted = sample['data_samples'].metainfo.get('unreadable', {})
        if sample['inputs'].shape != (3, 28, 28) or (read == name) == bool(counted):
            yield f'{name}: {sample["inputs"].shape} of {read}, {len(counted)} counted'
        else:
            yield None


def checkpoints(rng, num):
    """Yield, for each of ``num`` damages of the newest checkpoint, what is wrong, or None."""
    if not Path('straight/last_checkpoint').is_file():
        save_config()
        finish(*start('straight'))
    newest = Path(find_resumable_checkpoint('straight')[0])
    content, expected = newest.read_bytes(), read_checkpoint(newest)
    for _ in range(num):
        newest.write_bytes(mutate(rng, content))
        try:
            with no_hang():
                file, problems = find_resumable_checkpoint('straight')
        except (Exception, HangError) as error:
            yield f'{type(error).__name__}: {error}'
            continue
        if Path(file or '').name == newest.name:
            yield None if same(read_checkpoint(file), expected) else 'damage was not detected'
        elif file is None or len(problems) != 1 or '\n' in problems[0]:
            yield f'{file}, {problems}'
        else:
            yield None
    newest.write_bytes(content)


def mutate_config(rng, config):
    """Give a field of a ``config.json`` another value, or take it away."""
    config = copy.deepcopy(config)
    key = str(rng.choice(sorted(config)))
    if rng.random() < 0.1:
        del config[key]
    else:
        config[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(config).encode()


def converter(rng, num):
    """Yield, for each of ``num`` conversions of something damaged, what is wrong, or None."""
    init_default_scope('mmpretrain')
    config = DEFAULTS | SMALL | dict(model_type='vit_nepa', id2label={'0': 'cat', '1': 'dog'})
    model = model_cfg(config, 2)
    state = build(config, 2).state_dict()
    for folder in ('published', 'ours', 'damaged'):
        shutil.rmtree(folder, ignore_errors=True)
    published = write_published(Path('published'), config, to_published(state))
    torch.save(to_published(state), published / 'pytorch_model_ema.bin')
    Path('ours').mkdir()
    torch.save(dict(state_dict=state, meta=dict(model=model)), 'ours/model.pth')
    with contextlib.redirect_stdout(io.StringIO()):
        convert([str(published), 'ours/model.safetensors'])
    for _ in range(num):
        shutil.rmtree('damaged', ignore_errors=True)
        to = str(rng.choice(['mm', 'hf']))
        shutil.copytree(published if to == 'mm' else 'ours', 'damaged')
        names = ['config.json', 'config.json', 'model.safetensors', 'pytorch_model_ema.bin']
        name = str(rng.choice(names if to == 'mm' else ['model.pth', 'model.safetensors']))
        file = Path('damaged') / name
        values = name == 'config.json' and rng.random() < 0.7
        file.write_bytes(mutate_config(rng, config) if values else mutate(rng, file.read_bytes()))
        options = ['--weights', 'ema'] if name == 'pytorch_model_ema.bin' else []
        source = 'damaged' if to == 'mm' else str(file)
        yield attempt([source, 'damaged/out.safetensors' if to == 'mm' else 'damaged/out',
                       '--to', to, *options], file)


def attempt(args, file):
    """Convert: None if it was done, or refused in one sentence with nothing half-written."""
    out, said = Path(args[1]), io.StringIO()
    here = set(Path('damaged').iterdir())
    try:
        with no_hang(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            convert(args)
    except SystemExit as stop:
        cause = type(stop.__cause__)
        if cause not in REFUSALS or said.getvalue().count('\n') != 1:
            return f'{file}: {cause.__name__}: {said.getvalue()}'
        left = {path.name for path in set(Path('damaged').iterdir()) - here}
        return f'{file}: left {left}' if left else None
    except (Exception, HangError) as error:
        return f'{file}: {type(error).__name__}: {error}'
    try:
        read_checkpoint(str(out))
    except REFUSALS as error:
        return f'{file}: unreadable result: {error}'
    return None
