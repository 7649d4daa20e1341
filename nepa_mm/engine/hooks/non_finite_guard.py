"""Skips optimizer steps whose loss or gradient is not finite."""
from collections import deque
from functools import wraps
from math import isfinite
from statistics import median

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from torch.optim import Adam, AdamW

from nepa_mm.engine.fsdp_runner import full_tensor
from nepa_mm.utils.host_copy import HostCopy
from nepa_mm.utils.signals import request

WINDOW = 100


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skip a step whose loss or gradient is NaN or infinite, name its batch, and stop the run.

    Weights and optimizer state keep their values from before that step. No further step and no
    checkpoint follows, unless ``max_skipped`` allows it. A gradient norm above ``spike`` times
    the median of the last 100 steps is logged once per spike.

    Two ways to skip:

    - Fused Adam and AdamW skip on the device, without a host sync. The host reads the result
      one update later, or before a checkpoint, a validation or the end of the epoch. The norm
      comes from clipping, or from all gradients if nothing is clipped.
    - Other optimizers, clipping by value, and mmengine's OptimWrapper (which syncs anyway):
      the host reads the norm before each step.

    AmpOptimWrapper is not guarded: its loss scaler produces and skips infinite gradients on
    purpose.

    The all-reduce of each step also tells all processes whether one of them received SIGTERM,
    for AtomicCheckpointHook.

    A skipped step counts for the schedule and for the EMA weights, which move once more
    towards unchanged weights (by 1e-4 of the distance with momentum 1e-4). Its norm is logged.

    Args:
        max_skipped (int): Steps that a run may skip before it stops. Defaults to 0: the
            first one stops it.
        spike (float): Factor over the median. Defaults to 10.

    Raises:
        ValueError: An argument is out of range.
        FloatingPointError: More than ``max_skipped`` steps were not finite.
    """

    def __init__(self, max_skipped: int = 0, spike: float = 10.):
        if max_skipped < 0 or spike <= 1:
            raise ValueError('max_skipped must not be negative and spike must be above 1, got '
                             f'{max_skipped} and {spike}.')
        self.max_skipped, self.spike = max_skipped, spike
        self.replaced, self.handle = [], None
        self.pending = None     # what _measure recorded and _inspect has not read yet

    @property
    def watching(self) -> bool:
        """Whether the guard wraps loss and optimizer."""
        return bool(self.replaced)

    def before_train(self, runner):
        """Wrap the backward pass, the optimizer step and checkpoints."""
        self._unwrap(runner)
        self.skipped, self.norms, self.spiking = 0, deque(maxlen=WINDOW), False
        self.samples = []       # of this iteration
        self.losses = []        # of this update: samples and loss of each micro-step
        self.pending = None
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, AmpOptimWrapper):
            return
        backward, step, save = wrapper.backward, wrapper.step, runner.save_checkpoint

        def watched_backward(loss, **kwargs):
            self.losses.append((self.samples, loss.detach()))
            backward(loss, **kwargs)

        @wraps(step)    # keeps the attribute that mmengine's schedulers check
        def checked_step(**kwargs):
            self._measure(runner)
            if self._inspect(runner):
                step(**kwargs)

        def before_step(optimizer, args, kwargs):
            self._inspect(runner)
            optimizer.found_inf = self._measure(runner, wrapper.clip_grad_kwargs)

        def checked_save(*args, **kwargs):      # before_save_checkpoint runs on rank 0 only
            self._inspect(runner)
            save(*args, **kwargs)

        self._replace(wrapper, 'backward', watched_backward)
        self._replace(runner, 'save_checkpoint', checked_save)
        if _can_skip(wrapper):
            self.handle = wrapper.optimizer.register_step_pre_hook(before_step)
        else:
            self._replace(wrapper, 'step', checked_step)

    def _replace(self, owner, name, function):
        self.replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def _unwrap(self, runner):
        """Unwrap optimizer and Runner."""
        while self.replaced:
            setattr(*self.replaced.pop())
        if self.handle is not None:
            self.handle.remove()
            vars(runner.optim_wrapper.optimizer).pop('found_inf', None)
            self.handle = None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Remember the batch."""
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        self.samples = samples if isinstance(samples, list) else []

    def after_train_epoch(self, runner):
        """Inspect the last step of the epoch."""
        self._inspect(runner)

    def before_val(self, runner):
        """Inspect the last step before a validation of an iteration-based loop."""
        self._inspect(runner)

    def after_train(self, runner):
        """Inspect the last step and unwrap everything."""
        self._inspect(runner)
        self._unwrap(runner)

    def _measure(self, runner, clipped=False):
        """Record norm and losses of this update; return 1 if any process has a bad one, else 0.

        The result stays on the device. The recorded values are copied to the host without
        a sync.
        """
        wrapper, seen, self.losses = runner.optim_wrapper, self.losses, []
        norm = wrapper.grad_norm if clipped else None
        norm = _gradient_norm(wrapper.optimizer) if norm is None else norm
        values = torch.stack([value.float().reshape(())
                              for value in (norm, *(loss for _, loss in seen))])
        bad = (~values.isfinite()).any().float()
        flags = torch.stack([bad, torch.full_like(bad, request.received)])
        dist.all_reduce(flags, 'max')   # all processes stop or skip together
        self.pending = (runner.iter + 1, [samples for samples, _ in seen],
                        HostCopy(torch.cat([flags, values])))
        return flags[0]

    def _inspect(self, runner):
        """Read the last measurement; return whether its step is finite."""
        if self.pending is None:
            return True
        (iteration, batches, values), self.pending = self.pending, None
        # has arrived already, except before a checkpoint and the like
        bad, terminated, norm, *losses = values.tolist()
        request.agreed = request.agreed or bool(terminated)
        if not bad:
            self._check_spike(runner, iteration, norm)
            return True
        files = [getattr(sample, 'img_path', '?') for samples, loss in zip(batches, losses)
                 if not isfinite(loss) for sample in samples]
        reports = dist.all_gather_object((dist.get_rank(), files))
        where = '; '.join(f'rank {rank}: {", ".join(names) or "finite loss"}'
                          for rank, names in reports)
        self.skipped += 1
        message = (f'The loss or a gradient is not finite in iteration {iteration} '
                   f'(gradient norm {norm:g}). Batches with such a loss: {where}.')
        if self.skipped > self.max_skipped:
            raise FloatingPointError(f'{message} {self.skipped - 1} steps were skipped before, '
                                     f'max_skipped is {self.max_skipped}.')
        runner.logger.warning(f'{message} Step skipped, {self.skipped} of {self.max_skipped}.')
        return False

    def _check_spike(self, runner, iteration, norm):
        usual = median(self.norms) if len(self.norms) >= 10 else float('inf')
        spiking = norm > self.spike * usual
        if spiking and not self.spiking:
            runner.logger.warning(f'The gradient norm {norm:g} in iteration {iteration} is '
                                  f'more than {self.spike:g} times its median {usual:g}.')
        self.spiking = spiking
        self.norms.append(norm)


def _can_skip(wrapper):
    """Whether the optimizer skips a step by itself when its ``found_inf`` is 1.

    Not fused SGD: after a skipped first step its momentum is uninitialised memory. Not
    clipped gradients without a kept norm: clipping hides infinity.
    """
    optimizer = getattr(wrapper, 'optimizer', None)
    if not isinstance(optimizer, (Adam, AdamW)):
        return False
    fused = all(group.get('fused') for group in optimizer.param_groups)
    return fused and (not wrapper.clip_grad_kwargs or getattr(wrapper, 'keeps_norm', False))


def _gradient_norm(optimizer):
    params = [p for group in optimizer.param_groups for p in group['params']]
    grads = [p.grad for p in params if p.grad is not None]
    return (full_tensor(torch.stack(torch._foreach_norm(grads)).norm()) if grads
            else torch.zeros((), device=params[0].device))
