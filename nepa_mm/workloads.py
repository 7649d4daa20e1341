"""What tools/benchmark.py runs besides single steps: training with and without the Runner, data."""
import tempfile
import time

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import DATASETS, FUNCTIONS
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from . import peers


@DATASETS.register_module()
class NoiseImages(Dataset):
    """Images of noise, ready in memory.

    Args:
        num (int): How many the data set seems to have.
    """

    def __init__(self, num):
        self.images = torch.randint(256, (4, 3, 224, 224), dtype=torch.uint8)
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return dict(inputs=self.images[index % 4], data_samples=0)


class Clock(Hook):
    """When every iteration began; before the first one, make the log as long as asked."""

    priority = 'HIGHEST'

    def __init__(self, history):
        self.starts, self.history = [], history

    def before_train(self, runner):
        """Pretend that there were iterations before."""
        names = ('lr', 'base_lr', 'time', 'data_time', 'loss', 'grad_norm') if self.history else ()
        for name in names:
            runner.message_hub.log_scalars[f'train/{name}'] = HistoryBuffer(
                np.ones(self.history), np.ones(self.history))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Read the clock."""
        peers.synchronize()
        self.starts.append(time.perf_counter())


class Training:
    """Two epochs of pretraining on noise, the first of which warms up.

    Args:
        configs (Path): Folder ``configs``.
        network (dict): Changes of the backbone's config.
        batch (int): Images per iteration.
        iterations (int): Per epoch.
        bf16 (bool): Whether to autocast.
    """

    def __init__(self, configs, network, batch, iterations, bf16):
        self.bases, self.network, self.bf16 = configs / '_base_', network, bf16
        self.batch, self.iterations = batch, iterations
        cfg = Config.fromfile(configs / 'pretrain' / 'nepa_vit-b.py')
        cfg.model.backbone.update(network)
        cfg.optim_wrapper.update(accumulative_counts=1, bf16_on_cpu=bf16)
        cfg.train_dataloader = dict(
            batch_size=batch, num_workers=0, collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(type='NoiseImages', num=batch * iterations))
        cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 2
        cfg.param_scheduler.warmup = 1
        cfg.custom_hooks = cfg.custom_hooks[:1]     # EMA; the monitors work every 100th time
        cfg.default_hooks.checkpoint = None
        cfg.resume, cfg.log_level = False, 'ERROR'
        self.cfg = cfg

    def _durations(self, starts):
        return np.diff(starts[self.iterations:]).tolist()

    def runner(self, history=0, runtime_info='DeferredRuntimeInfoHook'):
        """Seconds of each iteration of the Runner.

        Args:
            history (int): How many iterations seem to lie behind. Defaults to 0.
            runtime_info (str): Hook that logs. Defaults to our configs'.
        """
        cfg, clock = Config(self.cfg.to_dict()), Clock(history)
        cfg.experiment_name = f'benchmark_{time.perf_counter_ns()}'
        cfg.default_hooks.runtime_info.type = runtime_info
        with tempfile.TemporaryDirectory() as folder:
            cfg.work_dir = folder
            runner = Runner.from_cfg(cfg)
            runner.register_hook(clock)
            runner.train()
        return self._durations(clock.starts)

    def bare(self):
        """Seconds of each iteration of a loop that does the same work, and no more."""
        model, starts = peers.build_nepa(self.bases, **self.network), []
        update = peers.our_update(self.bases, model)
        loader = DataLoader(NoiseImages(self.batch * self.iterations), self.batch)
        autocast = torch.autocast(get_device(), torch.bfloat16, self.bf16)
        for _ in range(2):
            for batch in loader:
                peers.synchronize()
                starts.append(time.perf_counter())
                with autocast:
                    loss = model.loss(**model.data_preprocessor(batch, True))['loss']
                loss.backward()
                update()
        return self._durations(starts)


def make_jpegs(folder, num):
    """Write images of 500 x 375 pixels, about as many bytes as ImageNet's."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + rng.normal(0, 14, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            folder / f'{index}.jpg', quality=90)


class Pipeline(Dataset):
    """What a training pipeline makes of image files.

    Args:
        files (list[Path]): The images.
        steps (list[dict]): The pipeline.
    """

    def __init__(self, files, steps):
        self.files, self.pipeline = files, Compose(steps)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.pipeline(dict(img_path=str(self.files[index])))


def loading(files, steps, workers, collate_fn='default_collate'):
    """A function that loads all images and returns the seconds that it took.

    Without workers, this process does it on one thread, as a worker would.
    """
    data = Pipeline(files, steps)
    batches = DataLoader(data, min(64, len(data)), num_workers=workers,
                         collate_fn=FUNCTIONS.get(collate_fn), persistent_workers=workers > 0)

    def run():
        threads = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        start = time.perf_counter()
        for _ in batches:
            pass
        seconds = time.perf_counter() - start
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
        return seconds
    return run
