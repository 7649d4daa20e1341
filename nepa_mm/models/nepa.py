"""START HERE: Next-Embedding Predictive Autoregression (NEPA, arXiv 2512.16922).

A Vision Transformer is pretrained the way language models are: it reads the patch
embeddings of an image in order, behind a causal mask, and predicts the next one.

    z = embed(image)                    # (B, N, D)  patch embeddings, raster order
    h = transformer(cls, z[:, :-1])     # (B, N, D)  h[:, t] has read cls, z[:, :t]
    loss = -cos(h, z)                   # h[:, t] predicts z[:, t]

The target is the embedding itself, detached. The embedding layer therefore learns as
context only, never as a target. There are no pixels, no tokenizer, no second view, no
momentum encoder and no extra head. Two things prevent collapse (paper, Table 1a):

- the shift by one: without it, the network copies its input;
- the stop-gradient: without it, one constant embedding minimises the loss.

LayerScale makes a new network almost the identity, so the first loss is minus the
cosine of neighbouring patches: about -0.65 on smooth images, about 0 on noise. The
paper's runs end between -0.90 and -1.00 (Fig. 7) and never reach the bound. A loss of
-1.000 means a collapse or a copying network; NEPAMonitorHook tells which.
"""
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmpretrain.models.selfsup.base import BaseSelfSupervisor
from torch import Tensor, nn

from nepa_mm.models.compilation import compiled
from nepa_mm.models.losses import mse_loss, patch_infonce_loss


def next_embedding_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine between predictions and targets, in fp32.

    Args:
        prediction (Tensor): (..., D).
        target (Tensor): (..., D).

    Returns:
        Tensor: A scalar in [-1, 1].
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction = F.normalize(prediction.float(), dim=-1, eps=1e-12)
        target = F.normalize(target.float(), dim=-1, eps=1e-12)
        return -(prediction * target).sum(dim=-1).mean()


@MODELS.register_module()
class NEPAHead(BaseModule):
    """Pair every output with its target embedding. The head has no parameters.

    Args:
        shift (int): How many patches ahead to predict. 1 is NEPA; 0, the patch itself, is
            "no shift" in Table 1a. Defaults to 1.
        stop_gradient (bool): Whether to detach the target. False is "no stop-grad" in
            Table 1a, which collapses. Defaults to True.
        with_cls_token (bool): Whether the class token predicts patch ``shift``. Without
            it, the first ``shift`` patches are not targets. With ``shift=0`` the class
            token never predicts. Defaults to True.
        loss (str): 'cosine' is NEPA. 'mse' and 'infonce' are in losses.py. Defaults to
            'cosine'.
        temperature (float): Temperature of 'infonce'; the others have none. Defaults to 0.1.
        init_cfg (dict, optional): Unused; part of OpenMMLab's interface. Defaults to None.

    Raises:
        ValueError: ``shift`` is negative, ``loss`` is unknown, or ``temperature`` is not
            positive.
    """

    def __init__(self, shift: int = 1, stop_gradient: bool = True, with_cls_token: bool = True,
                 loss: str = 'cosine', temperature: float = 0.1, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if shift < 0:
            raise ValueError(f'shift must be 0 or a positive number of patches, got {shift}.')
        if not temperature > 0:
            raise ValueError(f'temperature must be positive, got {temperature}.')
        losses = dict(cosine=next_embedding_loss, mse=mse_loss,
                      infonce=partial(patch_infonce_loss, temperature=temperature))
        if loss not in losses:
            raise ValueError(f"loss must be 'cosine', 'mse' or 'infonce', got {loss!r}.")
        self.shift, self.stop_gradient = int(shift), stop_gradient
        self.with_cls_token, self.loss_function = with_cls_token, losses[loss]

    def num_context_patches(self, num_patches: int) -> int:
        """How many leading patches a causal network must read to predict all targets.

        Raises:
            ValueError: The image has too few patches for ``shift``.
        """
        needed = self.shift + (not self.with_cls_token)
        if needed > num_patches:
            raise ValueError(f'shift={self.shift} needs at least {needed} patches, but the image '
                             f'has {num_patches}.')
        return num_patches - self.shift

    def loss(self, h: Tensor, z: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            h (Tensor): Outputs (B, 1 + n, D), class token first, n >= N - shift.
            z (Tensor): Embeddings of all N patches (B, N, D).

        Returns:
            Tensor: A scalar, in [-1, 1] for 'cosine'.
        """
        target = z.detach() if self.stop_gradient else z
        if self.shift == 0:
            return self.loss_function(h[:, 1:], target)
        # token t is the class token (0) or patch t, and predicts patch t + shift
        n = self.num_context_patches(z.shape[1])
        first = 0 if self.with_cls_token else 1
        return self.loss_function(h[:, first:1 + n], target[:, self.shift - 1 + first:])


def head_loss(head: NEPAHead, h: Tensor, z: Tensor) -> Tensor:
    """Call a head. A function, so that it can be compiled."""
    return head.loss(h, z)


@MODELS.register_module()
class NEPA(BaseSelfSupervisor):
    """Next-Embedding Predictive Autoregression.

    Args:
        backbone (dict): Config of :class:`NEPAViT`.
        head (dict): Config of :class:`NEPAHead`.
        mask_ratio (float): Fraction of the input patches to replace by a learned token;
            targets are never masked. NEPA masks nothing; Table 1c tries 0.4 and 0.6.
            Defaults to 0.
        intermediate_blocks (Sequence[int]): Blocks whose outputs predict the targets as
            well, without the final norm; negative indices count from the end. The mean of
            their losses is added. Not part of NEPA. Defaults to ().
        regularizer (dict, optional): Config of an additional loss on the embeddings.
            :class:`SIGReg` prevents collapse without the stop-gradient. Not part of NEPA.
            Defaults to None.
        data_preprocessor (dict, optional): Normalisation of the images. Defaults to None.
        init_cfg (dict, optional): Initialisation. Defaults to None.

    Raises:
        ValueError: ``mask_ratio`` is not in [0, 1), or ``intermediate_blocks`` names the
            last block or a block that does not exist.
    """

    def __init__(self, backbone: dict, head: dict, mask_ratio: float = 0.,
                 intermediate_blocks: Sequence[int] = (), regularizer: dict | None = None,
                 data_preprocessor: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(backbone=backbone, head=head, data_preprocessor=data_preprocessor,
                         init_cfg=init_cfg)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f'mask_ratio must be in [0, 1), got {mask_ratio}.')
        L = self.backbone.num_layers
        if any(not -L <= i < L or i % L == L - 1 for i in intermediate_blocks):
            raise ValueError(f'intermediate_blocks must be among the {L - 1} blocks before the '
                             f'last one, got {tuple(intermediate_blocks)}.')
        self.mask_ratio, self.intermediate_blocks = mask_ratio, tuple(intermediate_blocks)
        self.regularizer = MODELS.build(regularizer) if regularizer else None
        if mask_ratio:
            self.mask_token = nn.Parameter(torch.empty(1, 1, self.backbone.embed_dims))
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def loss(self, inputs: Tensor, data_samples: list | None = None) -> dict[str, Tensor]:
        """The pretraining loss.

        Args:
            inputs (Tensor): Normalised images (B, C, height, width).
            data_samples (list, optional): Unused; there are no labels.

        Returns:
            dict[str, Tensor]: ``loss``, the head's scalar; with ``intermediate_blocks`` also
            ``loss_intermediate``, with ``regularizer`` also ``loss_regularizer``.
        """
        z, grid = self.backbone.embed(inputs)                   # B N D
        *intermediate, h = self.forward_tokens(z, grid, (*self.intermediate_blocks, -1))
        loss = compiled(head_loss) if self.backbone.compiles(z) else head_loss
        losses = dict(loss=loss(self.head, h, z))               # h: B 1+n D
        if intermediate:
            losses['loss_intermediate'] = torch.stack(
                [loss(self.head, h, z) for h in intermediate]).mean()
        if self.regularizer:
            losses['loss_regularizer'] = self.regularizer(z)
        return losses

    def forward_tokens(self, z: Tensor, grid: tuple[int, int],
                       out_indices: Sequence[int] = (-1,)) -> list[Tensor]:
        """Outputs of blocks for patch embeddings; ``h[:, t]`` predicts ``z[:, t]``.

        Behind a causal mask no token sees the last ``shift`` patches, and their own outputs
        predict nothing. They are targets but not inputs, so n = N - shift.

        Args:
            z (Tensor): Patch embeddings (B, N, D).
            grid (tuple[int, int]): Rows and columns of patches.
            out_indices (Sequence[int]): Blocks to return. Defaults to the last one.

        Returns:
            list[Tensor]: (B, 1 + n, D) per block, class token first.
        """
        if self.backbone.causal:
            z = z[:, :self.head.num_context_patches(z.shape[1])]
        if self.mask_ratio:
            z = self.mask(z)
        return [self.backbone.without_registers(x)
                for x in self.backbone.encode(z, grid, out_indices)]

    def mask(self, z: Tensor) -> Tensor:
        """Replace a random ``mask_ratio`` of each image's embeddings by the mask token."""
        order = torch.rand(z.shape[:2], device=z.device).argsort(dim=1).argsort(dim=1)
        masked = order < round(self.mask_ratio * z.shape[1])    # B N
        return torch.where(masked[..., None], self.mask_token.to(z.dtype), z)
