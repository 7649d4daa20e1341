"""What several test files share: the package, tiny networks, made-up images."""
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from yapf.yapflib import yapf_api

import nepa_mm  # noqa: F401  (registers everything)

REPO = Path(__file__).parents[1]
TINY = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


def smooth_images(num, size=224, seed=0):
    """Random images with large structures only, in [-1, 1]: (num, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode='bicubic').clamp(-1, 1)


class Copies(TorchDispatchMode):
    """The copies to another device, and whether the host waits for each."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get('device', args[0].device) != (
                args[0].device):
            self.waits.append(not kwargs.get('non_blocking'))
        return func(*args, **kwargs)


def pytest_collection_finish():
    """mmengine collects garbage for every data set: not among all that has been imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session', autouse=True)
def forgotten_workers_end_soon():
    """torch waits five seconds for each worker of a data loader that an error left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 0.5)
        yield


@pytest.fixture(scope='session', autouse=True)
def texts_are_formatted_once():
    """mmengine formats the text of a config five times a run."""
    format_code, known = yapf_api.FormatCode, {}

    def cached(text, **style):
        key = text, repr(style)
        if key not in known:
            known[key] = format_code(text, **style)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf_api, 'FormatCode', cached)
        yield


@pytest.fixture(autouse=True)
def default_scope():
    """A Runner leaves its scope behind; every test starts in mmpretrain's."""
    init_default_scope('mmpretrain')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def image_folder(tmp_path):
    """An ImageNet-like folder: {train,val}/class_{0,1}/*.jpg, 4 images per class."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for label in range(2):
            folder = tmp_path / 'images' / split / f'class_{label}'
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.jpg')
    return tmp_path / 'images'
