"""Values of a device that the host reads later, without a host sync in between."""
import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on its way to the host.

    On a GPU the copy is queued behind the kernels that compute the tensor; the host goes on.

    Args:
        tensor (Tensor): One dimension, on any device.
    """

    def __init__(self, tensor: Tensor):
        self.values, self.arrived = tensor.detach(), None
        if tensor.is_cuda:
            self.values = self.values.to('cpu', non_blocking=True)      # torch pins the copy
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def tolist(self) -> list[float]:
        """Return the values; waits if they have not arrived yet."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()
