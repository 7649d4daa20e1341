"""Mixed precision in bf16, without a loss scaler."""
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast

from nepa_mm.engine.fsdp_runner import full_tensor
from nepa_mm.engine.hooks.deferred_runtime_info import log_scalar


@OPTIM_WRAPPERS.register_module()
class BF16OptimWrapper(OptimWrapper):
    """Runs the forward pass under bf16 autocast; weights, gradients and state stay fp32.

    bf16 has the exponent range of fp32, so the loss needs no scaling.

    Args:
        bf16_on_cpu (bool): Whether to autocast on the CPU, too. False trains in fp32 there
            and logs it. Defaults to False.
        **kwargs: ``optimizer``, ``accumulative_counts`` and ``clip_grad`` of
            :class:`mmengine.optim.OptimWrapper`.
    """

    def __init__(self, bf16_on_cpu: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.bf16 = bf16_on_cpu or get_device() != 'cpu'
        if not self.bf16:
            print_log('BF16OptimWrapper found no accelerator and trains in fp32; set '
                      'bf16_on_cpu=True to autocast on the CPU.', logger='current')

    @contextmanager
    def optim_context(self, model):
        """Autocast; skip the gradient all-reduce before the last micro-step."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16, enabled=self.bf16):
            yield

    @property
    def keeps_norm(self) -> bool:
        """Whether clipping keeps the unclipped norm in ``grad_norm``, on the device."""
        return bool(self.clip_grad_kwargs) and self.grad_name == 'grad_norm'

    def _clip_grad(self):
        """Clip like the parent class, but keep the norm on the device until it is printed."""
        params = [p for group in self.optimizer.param_groups for p in group['params']
                  if p.requires_grad and p.grad is not None]
        norm = full_tensor(self.clip_func(params, **self.clip_grad_kwargs)) if params else None
        self.grad_norm = norm   # for NonFiniteGuardHook
        if norm is not None:
            log_scalar(self.message_hub, f'train/{self.grad_name}', norm)
