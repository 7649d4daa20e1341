"""The campaigns: what is broken on purpose, how often, and how to run one."""
import os
import tempfile
import time
import warnings
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')   # the parent forks
warnings.filterwarnings('ignore')

import numpy as np

from .disks import CASES as DISK_CASES
from .disks import disks
from .files import checkpoints, converter, images
from .hostile import hostile
from .kills import kills
from .layouts import layouts
from .shards import shards
from .signals import CASES as SIGNAL_CASES
from .signals import signals
from .sizes import backbone, patches, rope

CROP = dict(scale=28, crop_ratio_range=(0.08, 1.))
PILLOW = [dict(type='LoadImageWithPillow'),
          dict(type='RandomResizedCrop', backend='pillow', **CROP)]
FAST = [dict(type='LoadRandomResizedCrop', **CROP)]
# title, campaign, number in full, number under pytest
CAMPAIGNS = [
    ('SIGKILL while training and saving; resumed runs bit for bit', kills, 100, 20),
    ('SIGTERM to process, group or all; resumed runs bit for bit', signals, len(SIGNAL_CASES), 3),
    ('another number of processes, batch or accumulation', layouts, 16, 4),
    ('full disks, odd files, two runs, leftovers', disks, len(DISK_CASES), 4),
    ('damaged checkpoints of a run', checkpoints, 1000, 200),
    ('hostile checkpoints through every command', hostile, 2000, 150),
    ('damaged images, LoadImageWithPillow', partial(images, steps=PILLOW), 1000, 1000),
    ('damaged images, LoadRandomResizedCrop', partial(images, steps=FAST), 1000, 1000),
    ('damaged tar and Parquet shards and their index', shards, 600, 90),
    ('damaged weights and configs in the converter', converter, 1000, 400),
    ('patches of images of any size', patches, 1000, 1000),
    ('RoPE on grids of any size', rope, 1000, 1000),
    ('padded causal network, images of any size', backbone, 300, 100),
]


def run(campaign, num, seed=0):
    """Run one campaign in the current folder: (tried, what was lost, seconds)."""
    began = time.perf_counter()
    results = list(campaign(np.random.default_rng(seed), num))
    return len(results), [lost for lost in results if lost], time.perf_counter() - began


def run_numbered(number):
    """Run a campaign in full, in a folder that it leaves."""
    _, campaign, num, _ = CAMPAIGNS[number]
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return run(campaign, num)
        finally:
            os.chdir(here)
