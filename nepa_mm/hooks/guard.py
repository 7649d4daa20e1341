"""No optimizer step with a loss or a gradient that is not finite."""
from collections import deque
from statistics import median

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS

from ..fsdp import whole

WINDOW = 100


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Stop, or skip, a step whose loss or gradient is NaN or infinite, and say where it was.

    The optimizer is not reached, so weights, its state and the last checkpoint stay good.
    A norm of the gradient above ``spike`` times the median of the last 100 steps is logged
    once for as long as it lasts.

    Each optimizer step costs one norm over all gradients and one wait of the host for the
    device; mmengine's logging of the loss waits in every iteration as well.

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

    def before_train(self, runner):
        """Stand between the loss and the optimizer."""
        self.skipped, self.norms, self.spiking = 0, deque(maxlen=WINDOW), False
        self.seen = []      # of this update: files and whether the loss was finite, per micro-step
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, AmpOptimWrapper):
            return      # its loss scaler makes and skips infinite gradients on purpose
        backward, step = wrapper.backward, wrapper.step

        def checked_backward(loss, **kwargs):
            self.seen[-1][1] = torch.isfinite(loss.detach()).all()
            backward(loss, **kwargs)

        def checked_step(**kwargs):
            if self._is_finite(runner):
                step(**kwargs)

        wrapper.backward, wrapper.step = checked_backward, checked_step

    def after_train(self, runner):
        """Leave the optimizer wrapper as it was."""
        for name in ('backward', 'step'):
            vars(runner.optim_wrapper).pop(name, None)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Remember the files of the batch."""
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        samples = samples if isinstance(samples, list) else []
        self.seen.append([[getattr(sample, 'img_path', '?') for sample in samples], None])

    def _is_finite(self, runner):
        seen, self.seen = self.seen, []
        grads = [p.grad for group in runner.optim_wrapper.param_groups for p in group['params']
                 if p.grad is not None]
        norm = whole(torch.stack(torch._foreach_norm(grads)).norm()) if grads else torch.zeros(())
        finite = torch.stack([norm.isfinite(), *(f for _, f in seen if f is not None)]).all()
        bad = (~finite).to(torch.int32)
        dist.all_reduce(bad, 'max')         # all stop or skip together
        if not bad.item():
            self._watch(runner, norm.item())
            return True
        files = [name for names, loss in seen if loss is not None and not loss for name in names]
        reports = dist.all_gather_object((dist.get_rank(), files))
        where = '; '.join(f'rank {rank}: {", ".join(names) or "finite loss"}'
                          for rank, names in reports)
        self.skipped += 1
        message = (f'The loss or a gradient is not finite in iteration {runner.iter + 1} '
                   f'(gradient norm {norm.item():g}). Batches with such a loss: {where}.')
        if self.skipped > self.max_skipped:
            raise FloatingPointError(f'{message} {self.skipped - 1} steps were skipped before, '
                                     f'max_skipped is {self.max_skipped}.')
        runner.logger.warning(f'{message} Step skipped, {self.skipped} of {self.max_skipped}.')
        return False

    def _watch(self, runner, norm):
        usual = median(self.norms) if len(self.norms) >= 10 else float('inf')
        spiking = norm > self.spike * usual
        if spiking and not self.spiking:
            runner.logger.warning(f'The gradient norm {norm:g} in iteration {runner.iter + 1} is '
                                  f'more than {self.spike:g} times its median {usual:g}.')
        self.spiking = spiking
        self.norms.append(norm)
