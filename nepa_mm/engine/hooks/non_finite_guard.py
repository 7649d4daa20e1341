"""No optimizer step with a loss or a gradient that is not finite."""
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
from nepa_mm.utils.signals import request

WINDOW = 100


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Leave out a step whose loss or gradient is NaN or infinite, say where it was, and stop.

    Weights and the optimizer's state stay as they were before that step; no other step and no
    checkpoint follows. A norm of the gradient above ``spike`` times the median of the last 100
    steps is logged once for as long as it lasts.

    Fused Adam and AdamW leave out a step on the device, so the host does not wait: it learns
    what happened one update later, or before a checkpoint, a validation or the end of the epoch.
    The norm is that of clipping, or one over all gradients where nothing is clipped.

    Other optimizers, and clipping by value or by mmengine's OptimWrapper, which waits itself,
    have that norm measured and the host wait for it before each step. AmpOptimWrapper is left
    alone: its loss scaler makes and skips infinite gradients on purpose.

    Whether a process got SIGTERM goes with what the processes tell one another of each step, for
    AtomicCheckpointHook.

    A step left out counts for the schedule, and for the moving average, which goes once more
    towards weights that stayed where they were: with momentum 1e-4 by 1e-4 of their distance.
    Its norm is logged as it is.

    Args:
        max_skipped (int): How many such steps a run may leave out before it stops.
            Defaults to 0: the first one ends it.
        spike (float): Factor over the median. Defaults to 10.

    Raises:
        ValueError: A setting is out of range.
        FloatingPointError: One more step than ``max_skipped`` was not finite.
    """

    def __init__(self, max_skipped=0, spike=10.):
        if max_skipped < 0 or spike <= 1:
            raise ValueError('max_skipped must not be negative and spike must be above 1, got '
                             f'{max_skipped} and {spike}.')
        self.max_skipped, self.spike = max_skipped, spike
        self.replaced, self.handle = [], None
        self.pending = None     # what _measure noted and _look has not seen yet

    @property
    def watching(self):
        """bool: Whether it stands between the loss and the optimizer."""
        return bool(self.replaced)

    def before_train(self, runner):
        """Stand between the loss and the optimizer, and before checkpoints."""
        self._let_go(runner)
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

        @wraps(step)    # mmengine's schedulers look for a mark that theirs has
        def checked_step(**kwargs):
            self._measure(runner)
            if self._look(runner):
                step(**kwargs)

        def before_step(optimizer, args, kwargs):
            self._look(runner)
            optimizer.found_inf = self._measure(runner, wrapper.clip_grad_kwargs)

        def checked_save(*args, **kwargs):      # before_save_checkpoint has the first rank only
            self._look(runner)
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

    def _let_go(self, runner):
        """Leave optimizer and Runner as they were."""
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
        """Look at the last step before others build on it."""
        self._look(runner)

    def before_val(self, runner):
        """Look at the last step, in loops that count iterations, too."""
        self._look(runner)

    def after_train(self, runner):
        """Look at the last step, and leave optimizer and Runner as they were."""
        self._look(runner)
        self._let_go(runner)

    def _measure(self, runner, clipped=False):
        """Note norm and losses of this update; 1 where one of any process is not finite, else 0.

        The result is on the device, and what is noted on its way to the host.
        """
        wrapper, seen, self.losses = runner.optim_wrapper, self.losses, []
        norm = wrapper.grad_norm if clipped else None
        norm = _gradient_norm(wrapper.optimizer) if norm is None else norm
        values = torch.stack([value.float().reshape(())
                              for value in (norm, *(loss for _, loss in seen))])
        bad = (~values.isfinite()).any().float()
        flags = torch.stack([bad, torch.full_like(bad, request.received)])
        dist.all_reduce(flags, 'max')   # all stop or skip together
        values, event = torch.cat([flags, values]), None
        if values.is_cuda:
            values = values.to('cpu', non_blocking=True)    # which torch has pinned
            event = torch.cuda.Event()
            event.record()
        self.pending = runner.iter + 1, [samples for samples, _ in seen], values, event
        return flags[0]

    def _look(self, runner):
        """Whether the step that was measured last is good."""
        if self.pending is None:
            return True
        (iteration, batches, values, event), self.pending = self.pending, None
        if event is not None:
            event.synchronize()     # long past, but before a checkpoint or the like
        bad, terminated, norm, *losses = values.tolist()
        request.agreed = request.agreed or bool(terminated)
        if not bad:
            self._watch(runner, iteration, norm)
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

    def _watch(self, runner, iteration, norm):
        usual = median(self.norms) if len(self.norms) >= 10 else float('inf')
        spiking = norm > self.spike * usual
        if spiking and not self.spiking:
            runner.logger.warning(f'The gradient norm {norm:g} in iteration {iteration} is '
                                  f'more than {self.spike:g} times its median {usual:g}.')
        self.spiking = spiking
        self.norms.append(norm)


def _can_skip(wrapper):
    """Whether the optimizer leaves out a step by itself where its ``found_inf`` is 1.

    Fused SGD does so, too, but for the first step, after which its momentum is uninitialised
    memory. Gradients that were clipped need not show that they were infinite.
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
