"""START HERE: Next-Embedding Predictive Autoregression (NEPA, arXiv 2512.16922).

A Vision Transformer is pretrained the way language models are: it reads the patch
embeddings of an image in order, behind a causal mask, and predicts the next one.

    z = embed(image)            # (B, N, D)  the patch embeddings, raster order
    h = transformer([cls, z])   # (B, N, D)  position t has seen cls, z_1 ... z_t
    loss = -cos(h, z)           # the output at t against the embedding at t + 1

The target is the embedding itself, detached, so the embedding learns only as a
context, never as a target. There are no pixels, no tokenizer, no second view, no
momentum encoder and no extra head. What keeps it from collapsing is the shift by one
(without it the answer is the input) and the stop-gradient (without it one constant
embedding answers everything); paper Table 1a.

At the start LayerScale makes the transformer almost the identity, so the first loss
is minus the cosine of neighbouring patches: about -0.65 on smooth images, about 0 on
noise. Finished runs level off between -0.90 and -1.00 (paper Fig. 7). A collapse
continues to -1.000. The loss alone does not separate it from a very good run;
``embedding_std``, ``embedding_rank`` and ``lift`` of NEPAMonitorHook do.
"""
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmpretrain.models.selfsup.base import BaseSelfSupervisor
from torch import nn


def next_embedding_loss(prediction, target):
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
    """Pairs every output with the embedding that it has to predict. It has no parameters.

    Args:
        shift (int): How many patches ahead to predict. 1 is NEPA; 0, its own patch,
            is the row "no shift" of Table 1a. Defaults to 1.
        stop_gradient (bool): Whether the target is detached. False is the row "no
            stop-grad" of Table 1a, which collapses. Defaults to True.
        with_cls_token (bool): Whether the class token predicts, too: patch ``shift``.
            Without it the first ``shift`` patches are no targets. Without shift it
            never does. Defaults to True.
        init_cfg (dict, optional): Unused, for OpenMMLab's interface. Defaults to None.
    """

    def __init__(self, shift=1, stop_gradient=True, with_cls_token=True, init_cfg=None):
        super().__init__(init_cfg)
        if shift < 0:
            raise ValueError(f'shift must be 0 or a positive number of patches, got {shift}.')
        self.shift, self.stop_gradient = int(shift), stop_gradient
        self.with_cls_token = with_cls_token

    def num_context_patches(self, num_patches):
        """How many leading patches a causal network must read to predict all targets."""
        needed = self.shift + (not self.with_cls_token)
        if needed > num_patches:
            raise ValueError(f'shift={self.shift} needs at least {needed} patches, but the image '
                             f'has {num_patches}.')
        return num_patches - self.shift

    def loss(self, h, z):
        """The loss of one batch.

        Args:
            h (Tensor): Outputs (B, 1 + n, D), class token first, n >= N - shift.
            z (Tensor): Embeddings of all N patches (B, N, D).

        Returns:
            Tensor: Scalar.
        """
        target = z.detach() if self.stop_gradient else z
        if self.shift == 0:
            return next_embedding_loss(h[:, 1:], target)
        # token t is the class token (0) or patch t, and predicts patch t + shift
        n = self.num_context_patches(z.shape[1])
        first = 0 if self.with_cls_token else 1
        return next_embedding_loss(h[:, first:1 + n], target[:, self.shift - 1 + first:])


@MODELS.register_module()
class NEPA(BaseSelfSupervisor):
    """Next-Embedding Predictive Autoregression.

    Args:
        backbone (dict): Config of :class:`NEPAViT`.
        head (dict): Config of :class:`NEPAHead`.
        mask_ratio (float): Share of the input patches that a learned token replaces;
            targets stay clean. NEPA uses none, Table 1c tries 0.4 and 0.6. Defaults
            to 0.
        intermediate_blocks (Sequence[int]): Blocks, negative ones counted from the
            end, whose outputs, without the final norm, have to predict as well; the
            mean of their losses is added. NEPA has none. Defaults to ().
        data_preprocessor (dict, optional): Normalisation of the images. Defaults to
            None.
        init_cfg (dict, optional): Initialisation. Defaults to None.

    Raises:
        ValueError: ``mask_ratio`` is not in [0, 1); one of ``intermediate_blocks`` is
            the last block or none.
    """

    def __init__(self, backbone, head, mask_ratio=0., intermediate_blocks=(),
                 data_preprocessor=None, init_cfg=None):
        super().__init__(backbone=backbone, head=head, data_preprocessor=data_preprocessor,
                         init_cfg=init_cfg)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f'mask_ratio must be in [0, 1), got {mask_ratio}.')
        L = self.backbone.num_layers
        if any(not -L <= i < L or i % L == L - 1 for i in intermediate_blocks):
            raise ValueError(f'intermediate_blocks must be among the {L - 1} blocks before the '
                             f'last one, got {tuple(intermediate_blocks)}.')
        self.mask_ratio, self.intermediate_blocks = mask_ratio, tuple(intermediate_blocks)
        if mask_ratio:
            self.mask_token = nn.Parameter(torch.empty(1, 1, self.backbone.embed_dims))
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def loss(self, inputs, data_samples=None):
        """The pretraining loss.

        Args:
            inputs (Tensor): Images (B, C, height, width), normalised.
            data_samples (list, optional): Unused; there are no labels.

        Returns:
            dict[str, Tensor]: ``loss``, a scalar in [-1, 1], and with
            ``intermediate_blocks`` ``loss_intermediate``, which is another one.
        """
        z, grid = self.backbone.embed(inputs)                   # B N D
        *intermediate, h = self.forward_tokens(z, grid, (*self.intermediate_blocks, -1))
        losses = dict(loss=self.head.loss(h, z))                # h: B 1+n D
        if intermediate:
            losses['loss_intermediate'] = torch.stack(
                [self.head.loss(h, z) for h in intermediate]).mean()
        return losses

    def predict_embeddings(self, z, grid):
        """Outputs (B, 1 + n, D) for embeddings (B, N, D); h[:, t] predicts z[:, t]."""
        return self.forward_tokens(z, grid)[-1]

    def forward_tokens(self, z, grid, out_indices=(-1,)):
        """Outputs [(B, 1 + n, D)] of blocks for embeddings (B, N, D), class token first.

        Behind a causal mask nobody sees the last ``shift`` patches and their own
        outputs predict nothing, so they are targets but no inputs: n = N - shift.
        """
        if self.backbone.causal:
            z = z[:, :self.head.num_context_patches(z.shape[1])]
        if self.mask_ratio:
            z = self.mask(z)
        return [self.backbone.without_registers(x)
                for x in self.backbone.encode(z, grid, out_indices)]

    def mask(self, z):
        """Replace a random ``mask_ratio`` of each image's embeddings by the mask token."""
        order = torch.rand(z.shape[:2], device=z.device).argsort(dim=1).argsort(dim=1)
        masked = order < round(self.mask_ratio * z.shape[1])    # B N
        return torch.where(masked[..., None], self.mask_token.to(z.dtype), z)
