"""Speed of training: images/s, time spent waiting for data, model FLOPs utilisation."""
import math
import time

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn


def flops_per_image(model: nn.Module, height: int, width: int) -> int:
    """Floating-point operations of NEPA for one image, forward and backward.

    A multiply-add counts as two. The backward pass costs twice the forward pass; for the
    patch embedding, whose input needs no gradient, it costs the same. A causal mask leaves
    T (T + 1) / 2 pairs of tokens. Norms, activations and recomputation (``with_cp``) do not
    count, as usual. At 224 x 224 pixels: 134.6 G for ViT-B/14, 474.2 G for ViT-L/14.

    Args:
        model (NEPA): The model.
        height, width (int): Size of the image in pixels.

    Returns:
        int: Operations.
    """
    backbone = model.backbone
    D, patch_embed = backbone.embed_dims, backbone.patch_embed
    count = math.ceil if patch_embed.remainder == 'pad' else math.floor
    N = math.prod(count(size / patch)
                  for size, patch in zip((height, width), patch_embed.patch_size))
    n = model.head.num_context_patches(N) if backbone.causal else N
    T = backbone.num_extra_tokens + n
    pairs = T * (T + 1) // 2 if backbone.causal else T * T
    weights = sum(m.weight.numel() for m in backbone.layers.modules() if isinstance(m, nn.Linear))
    blocks = 2 * T * weights + backbone.num_layers * 4 * pairs * D    # 4: scores and values
    return 3 * blocks + 2 * 2 * N * patch_embed.projection.weight.numel()


def peak_flops(dtype: torch.dtype, device: str | torch.device, repeats: int = 5) -> float:
    """Best measured rate of a large matrix product, in operations per second.

    Times the three products of a linear layer: output, gradient of the input, gradient of the
    weight. Their rates differ where torch lacks a good kernel (bf16 on older CPUs).
    """
    size = 1024 if torch.device(device).type == 'cpu' else 8192
    generator = torch.Generator(device).manual_seed(0)  # not the run's generator
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best = float('inf')
    for left, right in [(a, a.T), (a, a), (a.T, a)] * repeats:
        start = time.perf_counter()
        (left @ right)[0, 0].item()     # waits for the result
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Log speed and what limits it, as means since the last measurement.

    Values go to ``train/...`` of the message hub, and from there to the log and to every
    visualisation backend:

    - ``images_per_second``: over all processes, without the time between epochs
      (evaluation, saving).
    - ``data_wait``: fraction of the time spent waiting for the next batch.
    - ``mfu``: model FLOPs utilisation: :func:`flops_per_image` per second and process,
      divided by the peak rate. Assumes that all images have the size of the last batch.

    Args:
        interval (int): Iterations between two measurements. Defaults to 100.
        peak_tflops (float, optional): Peak rate of one device in 1e12 operations per
            second, such as 989 for a dense bf16 product on an H100. Defaults to None:
            measured by a matrix product at the start, in the dtype of the run.

    Raises:
        ValueError: ``interval`` or ``peak_tflops`` is not positive.
    """

    priority = 'VERY_LOW'   # last, so that other hooks do not count as data time

    def __init__(self, interval: int = 100, peak_tflops: float | None = None):
        if interval < 1 or (peak_tflops is not None and peak_tflops <= 0):
            raise ValueError('interval and peak_tflops must be positive, '
                             f'got {interval} and {peak_tflops}.')
        self.interval, self.peak_tflops = interval, peak_tflops

    def before_train(self, runner):
        """Measure the peak rate, unless it is given."""
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not hasattr(getattr(self.model, 'head', None), 'num_context_patches'):
            raise ValueError(f'{type(self).__name__} counts the operations of NEPA, '
                             f'got {type(self.model).__name__}.')
        device = get_device()
        if self.peak_tflops is None:
            with runner.optim_wrapper.optim_context(runner.model):
                one = torch.ones(1, 1, device=device)
                dtype = (one @ one).dtype   # the dtype of autocast, if enabled
            self.peak_tflops = peak_flops(dtype, device) / 1e12
            runner.logger.info(f'Peak rate of a matrix product in {dtype}, measured: '
                               f'{self.peak_tflops:.4g} TFLOP/s per process.')
        self._start_window()

    def _start_window(self):
        self.images, self.waiting, self.working = 0, 0., 0.

    def before_train_epoch(self, runner):
        """Skip the time between two epochs."""
        self.mark = time.perf_counter()

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """End the data time; publish the means in time for this iteration's log."""
        now = time.perf_counter()
        self.waiting, self.mark = self.waiting + now - self.mark, now
        if self.images and self.every_n_train_iters(runner, self.interval):
            total = self.waiting + self.working
            rate = self.images / total  # of this process
            flops = flops_per_image(self.model, *data_batch['inputs'][0].shape[-2:])
            runner.message_hub.update_scalars({
                'train/images_per_second': rate * get_world_size(),
                'train/data_wait': self.waiting / total,
                'train/mfu': rate * flops / (self.peak_tflops * 1e12)})
            self._start_window()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count the images and the time of the iteration."""
        now = time.perf_counter()
        self.images += len(data_batch['inputs'])
        self.working, self.mark = self.working + now - self.mark, now
