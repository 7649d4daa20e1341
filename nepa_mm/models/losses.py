"""Losses beside the paper's, which is in nepa.py: options of newer papers, off by default.

- :func:`mse_loss` and :func:`patch_infonce_loss` replace the cosine (NEPA-DiT, arXiv
  2610.02203).
- :class:`SIGReg` replaces the stop-gradient (LeNEPA, arXiv 2607.00958).
"""
import torch
import torch.nn.functional as F
from mmengine.dist import broadcast, get_world_size
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all channels, in fp32. Neither vector is normalised.

    Args:
        prediction (Tensor): (..., D).
        target (Tensor): (..., D).

    Returns:
        Tensor: A scalar, at least 0.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return F.mse_loss(prediction.float(), target.float())


def patch_infonce_loss(prediction: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE within each image, in fp32: tell the true target from the image's others.

    The logits are cosines divided by ``temperature``. Other images are no negatives. Targets
    with the same content, like blank margins, cannot be told apart: n of them cost log(n).

    Args:
        prediction (Tensor): (B, n, D).
        target (Tensor): (B, n, D).
        temperature (float): Defaults to 0.1.

    Returns:
        Tensor: A scalar, at least 0. Uniform logits give log(n).
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction = F.normalize(prediction.float(), dim=-1, eps=1e-12)
        target = F.normalize(target.float(), dim=-1, eps=1e-12)
        logits = prediction @ target.transpose(1, 2) / temperature      # B n n
        return -logits.log_softmax(dim=-1).diagonal(dim1=1, dim2=2).mean()


@MODELS.register_module()
class SIGReg(nn.Module):
    r"""Keep embeddings close to N(0, I), so that they cannot collapse.

    Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544). Embeddings are
    N(0, I) if their projection x on every unit direction is N(0, 1). Each step draws new
    directions and compares the characteristic function of x with that of N(0, 1), in fp32:

    .. math:: \int_{-5}^{5} |\mathrm{mean}(e^{itx}) - e^{-t^2/2}|^2 \, e^{-t^2/2} \, dt

    This is the Epps-Pulley statistic without its factor, the number of samples: the weight
    holds for every batch size. The result is the mean over the directions: 0 for N(0, I),
    0.41 if all embeddings are 0. The integral is the trapezoidal rule with 17 knots.

    LeNEPA regularises a projection of the embeddings, within each sample. Here all patches of
    the batch are the samples, without a projection.

    With several processes, the characteristic function is that of the joined batch, and the
    first process draws the directions.

    A step keeps 9 x patches x ``num_slices`` numbers for the backward pass: 0.6 GB for 256
    images of 256 patches.

    Args:
        loss_weight (float): Factor of the loss. Defaults to 10.
        num_slices (int): Number of directions. Defaults to 256.

    Raises:
        ValueError: ``loss_weight`` is not positive, or ``num_slices`` is below 1.
    """

    def __init__(self, loss_weight: float = 10., num_slices: int = 256):
        super().__init__()
        if not loss_weight > 0:
            raise ValueError(f'loss_weight must be positive, got {loss_weight}.')
        if num_slices < 1:
            raise ValueError(f'num_slices must be at least 1, got {num_slices}.')
        self.loss_weight, self.num_slices = loss_weight, num_slices

    def forward(self, z: Tensor) -> Tensor:
        """The weighted loss.

        Args:
            z (Tensor): Embeddings (..., D). All but the last dimension are samples.

        Returns:
            Tensor: A scalar, at least 0.
        """
        with torch.autocast(z.device.type, enabled=False):
            directions = torch.randn(z.shape[-1], self.num_slices, device=z.device)     # D S
            broadcast(directions)
            x = z.flatten(0, -2).float() @ F.normalize(directions, dim=0)               # R S
            # the integrand is even in t: 9 knots from 0, and twice the integral
            t = torch.linspace(0, 5, 9, device=z.device)[:, None]                       # K 1
            angles = t[..., None] * x                                                   # K R S
            phi = torch.stack((angles.cos().mean(dim=1), angles.sin().mean(dim=1)))     # 2 K S
            if get_world_size() > 1:
                phi = all_reduce(phi) / get_world_size()
            normal = torch.exp(-t ** 2 / 2)
            real, imaginary = phi
            integrand = ((real - normal) ** 2 + imaginary ** 2) * normal                # K S
            return 2 * self.loss_weight * torch.trapezoid(integrand, t[:, 0], dim=0).mean()
