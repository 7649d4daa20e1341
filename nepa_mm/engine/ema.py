"""EMA weights, updated by one multi-tensor operation."""
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from torch import nn

from nepa_mm.engine.fsdp_runner import local_shard


@MODELS.register_module()
class MultiTensorEMA(ExponentialMovingAverage):
    """mmengine's ExponentialMovingAverage, bit for bit, in one multi-tensor operation per update.

    The first update copies; later updates add ``momentum`` times the difference. Momentum
    1e-4 is a decay of 0.9999, the released code's in both stages.

    Args:
        model (nn.Module): The model to average.
        momentum (float): Weight of the new value, in (0, 1). Defaults to 1e-4.
        interval (int): Model updates per EMA update. Defaults to 1.
        device (torch.device, optional): Device of the EMA weights. Defaults to None: the
            model's.
        update_buffers (bool): Whether to average floating-point buffers instead of copying
            them. Defaults to False.
    """

    def __init__(self, model: nn.Module, momentum: float = 1e-4, interval: int = 1,
                 device: torch.device | None = None, update_buffers: bool = False):
        super().__init__(model, momentum, interval, device, update_buffers)
        self.steps = self.steps.cpu()   # read in every update: a host sync on a GPU
        self.places = None      # of all tensors, cached: walking the modules takes longer

    def __getstate__(self):
        """Drop the cache from copies and pickles; it refers to the model."""
        return dict(vars(self), places=None)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the EMA weights with the current weights of ``model``."""
        if self.places is None or self.places[0] is not model:
            self.places = (model, [_place(model, name) for name in self.avg_parameters],
                           [(_place(self.module, name), _place(model, name))
                            for name, _ in self.module.named_buffers()])
        _, sources, buffers = self.places
        pairs = [(average, tensors[key])
                 for average, (tensors, key) in zip(self.avg_parameters.values(), sources)]
        steps = int(self.steps)
        if steps == 0:
            self._foreach(torch._foreach_copy_, pairs)
        elif steps % self.interval == 0:
            self._foreach(torch._foreach_lerp_,
                          [pair for pair in pairs if pair[0].is_floating_point()], self.momentum)
        if not self.update_buffers:
            self._foreach(torch._foreach_copy_, [
                (averages[key], values[key]) for (averages, key), (values, _) in buffers])
        self.steps += 1

    @staticmethod
    def _foreach(operation, pairs, *args):
        if pairs:
            operation([local_shard(average) for average, _ in pairs],
                      [local_shard(value).to(average.device) for average, value in pairs], *args)


def _place(model, name):
    """The module dict that holds a parameter or buffer of ``model``, and its key."""
    owner, _, key = name.rpartition('.')
    module = model.get_submodule(owner)
    return (module._parameters if key in module._parameters else module._buffers), key
