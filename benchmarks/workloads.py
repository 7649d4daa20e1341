"""Workloads of benchmark.py: training with and without the Runner, and data loading."""
import tempfile
import time

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import peers


@DATASETS.register_module()
class NoiseImages(Dataset):
    """Noise images in memory.

    Args:
        num (int): Length of the data set; four images are repeated.
    """

    def __init__(self, num):
        self.images = torch.randint(256, (4, 3, 224, 224), dtype=torch.uint8)
        self.sample = DataSample(metainfo=dict(img_path='noise.jpg', img_shape=(224, 224)))
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return dict(inputs=self.images[index % 4], data_samples=self.sample)


class TakeTurns(Hook):
    """Run a bare loop after iterations of the Runner, and time both.

    The Runner's time is measured from the end of the bare loop to the end of its own iterations,
    with data loading and all hooks. On a GPU, both run 10 iterations between two waits for it.

    Args:
        bare (callable): An iteration of the bare loop.
        late (int): Simulated past iterations, rounded down to full epochs.
    """

    priority = 'LOWEST'

    def __init__(self, bare, late):
        self.bare, self.late, self.pairs = bare, late, []
        self.stride = 10 if torch.cuda.is_available() else 1

    def before_train(self, runner):
        """Simulate past iterations."""
        loop = runner.train_loop
        loop._epoch = self.late // len(loop.dataloader)
        loop._iter = loop._epoch * len(loop.dataloader)
        names = ('lr', 'base_lr', 'time', 'data_time', 'loss', 'grad_norm') if self.late else ()
        for name in names:
            runner.message_hub.log_scalars[f'train/{name}'] = HistoryBuffer(
                np.ones(loop._iter), np.ones(loop._iter))

    def before_train_epoch(self, runner):
        """Start timing the Runner."""
        self.start = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Time iterations of the bare loop; keep both times per iteration."""
        if not self.every_n_inner_iters(batch_idx, self.stride):
            return
        peers.synchronize()
        middle = time.perf_counter()
        for _ in range(self.stride):
            self.bare()
        peers.synchronize()
        end = time.perf_counter()
        self.pairs.append(((middle - self.start) / self.stride, (end - middle) / self.stride))
        self.start = time.perf_counter()


class Training:
    """Pretrain one epoch on noise with the Runner and with a bare loop, in turns.

    The Runner uses all hooks of the config but saves no checkpoint.

    Args:
        configs (Path): Folder ``configs``.
        network (dict): Changes to the backbone's config.
        batch (int): Images per iteration.
        iterations (int): Measured iterations, after ``WARMUP``; at least 10 on a GPU.
        bf16 (bool): Whether to autocast.
    """

    WARMUP = 10
    # a GPU would wait for a process that both loads data and launches kernels
    WORKERS = dict(num_workers=2, pin_memory=True) if torch.cuda.is_available() else {}

    def __init__(self, configs, network, batch, iterations, bf16):
        self.bases, self.network, self.bf16 = configs / '_base_', network, bf16
        self.batch, self.iterations = batch, self.WARMUP + iterations
        cfg = Config.fromfile(configs / 'pretrain' / 'nepa_vit-b.py')
        cfg.model.backbone.update(network)
        cfg.optim_wrapper.update(accumulative_counts=1, bf16_on_cpu=bf16)
        cfg.train_dataloader = dict(
            batch_size=batch, collate_fn=dict(type='default_collate'), **self.WORKERS,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(type='NoiseImages', num=batch * self.iterations))
        cfg.param_scheduler.warmup = 0
        cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
        for hook in cfg.custom_hooks:
            if hook.type == 'ThroughputHook':
                hook.peak_tflops = 1.       # skips its own measurement
        cfg.resume, cfg.log_level = False, 'ERROR'
        self.cfg = cfg

    def pairs(self, late=0, runtime_info='DeferredRuntimeInfoHook'):
        """Measure iterations of the Runner and of the bare loop.

        Args:
            late (int): Simulated past iterations. Defaults to 0.
            runtime_info (str): Hook that logs. Defaults to that of our configs.

        Returns:
            list[tuple[float, float]]: Seconds of the Runner and of the bare loop, per iteration.
        """
        cfg = Config(self.cfg.to_dict())
        cfg.experiment_name = f'benchmark_{time.perf_counter_ns()}'
        cfg.default_hooks.runtime_info.type = runtime_info
        cfg.default_hooks.run_check.odd = 'warn'    # the run is too short for its EMA
        cfg.train_cfg.max_epochs = cfg.param_scheduler.end = late // self.iterations + 1
        turns = TakeTurns(self.bare(), late)
        with tempfile.TemporaryDirectory() as folder:
            cfg.work_dir = folder
            runner = Runner.from_cfg(cfg)
            runner.register_hook(turns)
            runner.train()
        return turns.pairs[self.WARMUP // turns.stride:]

    def bare(self):
        """Return a function that does an iteration of the same work without the Runner."""
        model = peers.build_nepa(self.bases, **self.network)
        optim = Config.fromfile(self.bases / 'schedules' / 'pretrain_bs4096_1600e.py').optim_wrapper
        optimizer = build_optim_wrapper(model, optim).optimizer
        parameters = list(model.parameters())
        average = [p.detach().clone() for p in parameters]
        batches = iter(DataLoader(
            NoiseImages(self.batch * self.iterations), self.batch, collate_fn=default_collate,
            **self.WORKERS))

        def iteration():
            batch = next(batches)
            with torch.autocast(get_device(), torch.bfloat16, self.bf16):
                loss = model.loss(**model.data_preprocessor(batch, True))['loss']
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, optim.clip_grad.max_norm)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1e-4)
        return iteration


def make_jpegs(folder, num):
    """Write images of 500 x 375 pixels, with about the file size of ImageNet's."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + rng.normal(0, 14, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            folder / f'{index}.jpg', quality=90)


class Pipeline(Dataset):
    """Image files processed by a training pipeline.

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


def loading(files, steps, workers):
    """Return a function that loads all images and returns the seconds.

    Without workers, this process loads them on one thread, like a worker.
    """
    data = Pipeline(files, steps)
    batches = DataLoader(data, min(64, len(data)), num_workers=workers,
                         collate_fn=default_collate, persistent_workers=workers > 0)

    def run():
        threads = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        start = time.perf_counter()
        try:
            for _ in batches:
                pass
            return time.perf_counter() - start
        finally:
            torch.set_num_threads(threads[0])
            cv2.setNumThreads(threads[1])
    return run
