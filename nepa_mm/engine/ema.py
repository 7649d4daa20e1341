"""The moving average of the weights, in one operation."""
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import (
    MODELS,
)

from nepa_mm.engine.fsdp_runner import local_shard


@MODELS.register_module()
class MultiTensorEMA(ExponentialMovingAverage):
    """mmengine's moving average, bit for bit, in one multi-tensor operation per update.

    The first update copies, every later one adds ``momentum`` times the difference:
    momentum 1e-4 is a decay of 0.9999, the released code's in both stages.

    Args:
        model (nn.Module): The model to average.
        momentum (float): Weight of the new value, in (0, 1). Defaults to 1e-4.
        interval (int): Updates of the model between two of the average. Defaults to 1.
        device (torch.device, optional): Where the average lives. Defaults to None: with
            the model.
        update_buffers (bool): Whether floating-point buffers are averaged too, instead
            of copied. Defaults to False.
    """

    def __init__(self, model, momentum=1e-4, interval=1, device=None, update_buffers=False):
        super().__init__(model, momentum, interval, device, update_buffers)
        # read in every update: on a GPU that would stop the host until the queue is empty
        self.steps = self.steps.cpu()
        self.places = None      # where everything is: to walk through the models takes longer

    def __getstate__(self):
        """For copies and pickles, which must not follow a copy of the model."""
        return dict(vars(self), places=None)

    @torch.no_grad()
    def update_parameters(self, model):
        """Take the current weights of ``model`` into the average."""
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
    """The dict of a module of ``model`` that holds a parameter or buffer, and its key there."""
    owner, _, key = name.rpartition('.')
    module = model.get_submodule(owner)
    return (module._parameters if key in module._parameters else module._buffers), key
