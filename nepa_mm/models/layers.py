"""The parts of NEPA's Vision Transformer: patches, rotary embedding, attention, block.

Shapes in the comments: B images, T tokens (class token first), N patches on a grid of
gh x gw, D = H * K channels in H heads of K channels.
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from timm.layers import LayerScale, Mlp, SwiGLU
from torch import Tensor, nn

from nepa_mm.utils.errors import DataError

QK_NORMS = (None, 'plain', 'affine', 'affine_bias')
REMAINDERS = ('error', 'pad', 'drop')
SCANS = ('raster', 'snake', 'random')


def scan_order(scan: str, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """The order in which the patches of an image are read.

    Args:
        scan (str): 'raster', row by row; 'snake', every second row from right to left, so
            consecutive patches always touch; 'random', one fixed permutation per grid.
        grid (tuple[int, int]): Rows and columns of patches.
        device (torch.device, optional): Device of the result. Defaults to None: the CPU.

    Returns:
        Tensor: (gh * gw,), the raster index of each patch of the sequence.
    """
    order = np.arange(math.prod(grid)).reshape(grid)
    if scan == 'snake':
        order[1::2] = order[1::2, ::-1].copy()
    elif scan == 'random':
        # numpy froze this generator's stream; weights depend on the permutation
        order = np.random.RandomState(0).permutation(order.ravel())
    return torch.as_tensor(order.ravel(), device=device)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each one: a convolution with stride = kernel.

    Args:
        in_channels (int): Channels of the image.
        embed_dims (int): Channels of an embedding, D.
        patch_size (tuple[int, int]): Height and width of a patch in pixels.
        remainder (str): How to treat an image whose sides are not multiples of the patch;
            see :class:`NEPAViT`.
        scan (str): Order of the patches; see :func:`scan_order`. Defaults to 'raster'.

    Raises:
        ValueError: ``remainder`` is unknown.
        DataError: An image has the wrong number of channels or does not fit the patches.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: tuple[int, int],
                 remainder: str, scan: str = 'raster'):
        super().__init__()
        if remainder not in REMAINDERS:
            raise ValueError(f'remainder must be one of {REMAINDERS}, got {remainder!r}.')
        self.patch_size, self.remainder, self.scan = patch_size, remainder, scan
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)

    def forward(self, img):
        """Images (B, C, height, width) -> embeddings (B, gh * gw, D) in scan order, (gh, gw)."""
        B, C, height, width = img.shape
        (ph, pw), conv = self.patch_size, self.projection
        if C != conv.in_channels:
            raise DataError(
                f'The image has {C} channel{"s" * (C > 1)}, but the network in_channels='
                f"{conv.in_channels}; set the backbone's in_channels, or color_type of "
                'LoadImageWithPillow, and as many values of mean and std.')
        if self.remainder == 'pad':
            img = F.pad(img, (0, -width % pw, 0, -height % ph))
        elif height < ph or width < pw:
            raise DataError(f'The image of {height}x{width} pixels is smaller than one patch of '
                            f"{ph}x{pw}; give a larger one, or set remainder='pad'.")
        elif self.remainder == 'error' and (height % ph or width % pw):
            raise DataError(f'The image of {height}x{width} pixels is not a multiple of the patch '
                            f"of {ph}x{pw}; resize it, or set remainder='pad' or 'drop'.")
        gh, gw = img.shape[2] // ph, img.shape[3] // pw
        # Patches do not overlap, so the convolution is one matrix product.
        patches = img[:, :, :gh * ph, :gw * pw].reshape(B, C, gh, ph, gw, pw)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(B, gh * gw, C * ph * pw)
        if self.scan != 'raster':
            patches = patches[:, scan_order(self.scan, (gh, gw), img.device)]
        return F.linear(patches, conv.weight.flatten(1), conv.bias), (gh, gw)


class RotaryEmbedding(nn.Module):
    """Two-dimensional rotary position embedding on the image's own grid.

    A patch has the coordinates (y, x) of its centre, each in [-1, 1] over the image. An
    angle is 2 pi * coordinate * frequency. No parameter depends on the image size. This is
    DINOv3's embedding, which the reference copies.

    Each random draw holds for the local batch of one forward pass.

    Args:
        head_dims (int): Channels per head, K; a multiple of 4.
        theta (float, optional): Base of the frequencies ``theta ** (-4 k / K)``. None
            disables the rotation. Defaults to 100.
        shift (float, optional): Training only: shifts the coordinates by one uniform draw
            per axis from [-shift, shift]. Defaults to None.
        jitter (float, optional): Training only: multiplies the coordinates by one
            log-uniform draw per axis from [1/jitter, jitter]. Defaults to None.
        rescale (float, optional): Training only: multiplies the coordinates by one
            log-uniform draw for both axes from [1/rescale, rescale]. Defaults to 2.
        scan (str): Order of the patches; see :func:`scan_order`. Defaults to 'raster'.

    Raises:
        ValueError: ``head_dims`` is not a multiple of 4; ``jitter`` or ``rescale`` is
            below 1.
    """

    def __init__(self, head_dims: int, theta: float | None = 100., shift: float | None = None,
                 jitter: float | None = None, rescale: float | None = 2., scan: str = 'raster'):
        super().__init__()
        if head_dims % 4:
            raise ValueError('RoPE needs a head dimension (embed_dims / num_heads) that is a '
                             f'multiple of 4, got {head_dims}.')
        for name, factor in dict(jitter=jitter, rescale=rescale).items():
            if factor is not None and factor < 1:
                raise ValueError(f'rope_{name} draws from [1/x, x] and needs x >= 1 or None, '
                                 f'got {factor}.')
        self.head_dims, self.theta = head_dims, theta
        self.shift, self.jitter, self.rescale, self.scan = shift, jitter, rescale, scan

    def draw(self, device):
        """Draw the training augmentation: shift (2,), jitter (2,), rescale (1,).

        The coordinates become ``(coordinates + shift) * jitter * rescale``.
        """
        def uniform(bound, size):
            return torch.empty(size, device=device).uniform_(-bound, bound)

        return (uniform(self.shift or 0., 2),
                uniform(math.log(self.jitter or 1.), 2).exp(),
                uniform(math.log(self.rescale or 1.), 1).exp())

    def forward(self, grid, num_prefix, device):
        """Sine and cosine of every token's angles.

        Args:
            grid (tuple[int, int]): Rows and columns of patches.
            num_prefix (int): Tokens before the patches. Their angle is zero, so they are
                not rotated.
            device (torch.device): Device of the result.

        Returns:
            tuple[Tensor, Tensor]: sin and cos, each (num_prefix + gh * gw, K), fp32.
        """
        y, x = ((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n * 2 - 1
                for n in grid)
        coords = torch.stack(torch.meshgrid(y, x, indexing='ij'), dim=-1).flatten(0, 1)  # N 2
        if self.scan != 'raster':
            coords = coords[scan_order(self.scan, grid, device)]
        if self.training and (self.shift or self.jitter or self.rescale):
            shift, jitter, rescale = self.draw(device)
            coords = (coords + shift) * jitter * rescale
        k = torch.arange(self.head_dims // 4, device=device, dtype=torch.float32)
        freqs = (torch.zeros_like(k) if self.theta is None
                 else self.theta ** (-k * 4 / self.head_dims))                           # K/4
        angles = 2 * math.pi * coords[:, :, None] * freqs                                # N 2 K/4
        angles = angles.flatten(1).tile(2)                                               # N K
        angles = F.pad(angles, (0, 0, num_prefix, 0))                                    # T K
        return angles.sin(), angles.cos()


class Rotation(torch.autograd.Function):
    """``x * cos + rotate_half(x) * sin``, with ``rotate_half(x) = cat(-x[K/2:], x[:K/2])``.

    Needs three passes over the data instead of eight. The gradient is the rotation by
    the negative angle. sin and cos get no gradient.
    """

    @staticmethod
    def forward(x, sin, cos):                                       # B H T K, T K, T K
        out, half = x * cos, x.shape[-1] // 2
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        sin, cos = ctx.saved_tensors
        return Rotation.forward(grad, -sin, cos), None, None


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate queries or keys (B, H, T, K) by the angles (T, K) of their tokens."""
    if not torch.is_grad_enabled():     # exporters cannot trace an autograd.Function
        return Rotation.forward(x, sin, cos)
    return Rotation.apply(x, sin, cos)


def build_qk_norm(qk_norm: str | None, dims: int, eps: float) -> nn.Module:
    """LayerNorm over one head's channels; see ``qk_norm`` of :class:`NEPAViT`."""
    if qk_norm not in QK_NORMS:
        raise ValueError(f'qk_norm must be one of {QK_NORMS}, got {qk_norm!r}.')
    if qk_norm is None:
        return nn.Identity()
    return nn.LayerNorm(dims, eps, elementwise_affine=qk_norm != 'plain',
                        bias=qk_norm == 'affine_bias')


class Attention(nn.Module):
    """Multi-head self-attention with QK-norm and rotary embedding.

    Args: see :class:`NEPAViT`.
    """

    def __init__(self, embed_dims: int, num_heads: int, causal: bool, qkv_bias: bool,
                 qk_norm: str | None, norm_eps: float, attn_drop: float, proj_drop: float):
        super().__init__()
        self.num_heads, self.causal, self.attn_drop = num_heads, causal, attn_drop
        head_dims = embed_dims // num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.q_norm = build_qk_norm(qk_norm, head_dims, norm_eps)
        self.k_norm = build_qk_norm(qk_norm, head_dims, norm_eps)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x, sin, cos):
        """Normalised and rotated queries and keys, and values, each (B, H, T, K)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)       # B T H K
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))  # B H T K
        return rotate(q, sin, cos).to(v.dtype), rotate(k, sin, cos).to(v.dtype), v

    def forward(self, x, sin, cos):                                 # B T D -> B T D
        q, k, v = self.project(x, sin, cos)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal,      # the causal mask
                                           dropout_p=self.attn_drop if self.training else 0.)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch per image in training, and rescale the rest.

    Replaces timm's module, with which torch.compile builds one graph per rate until it gives
    up. Here the rate is a tensor, so all blocks that drop share one graph.

    Args:
        drop_prob (float): Probability in [0, 1).
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        # forward() reads the flag: reading the rate would give each block its own graph
        self.drop_prob, self.enabled = drop_prob, drop_prob > 0
        self.register_buffer('keep_prob', torch.tensor(1 - drop_prob), persistent=False)

    def forward(self, x):                                           # B T D -> B T D
        if not (self.training and self.enabled):
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) < self.keep_prob
        return x * (kept / self.keep_prob).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each on the residual stream.

    Args: see :class:`NEPAViT`.
    """

    def __init__(self, embed_dims: int, num_heads: int, feedforward_channels: int,
                 causal: bool = True, qkv_bias: bool = True, qk_norm: str | None = 'plain',
                 gated_mlp: bool = False, act_cfg: dict = dict(type='GELU'),
                 layer_scale_init_value: float | None = 1e-5, norm_eps: float = 1e-12,
                 drop_rate: float = 0., attn_drop_rate: float = 0., drop_path_rate: float = 0.):
        super().__init__()

        def layer_scale():
            if layer_scale_init_value is None:
                return nn.Identity()
            return LayerScale(embed_dims, layer_scale_init_value)

        self.ln1 = nn.LayerNorm(embed_dims, norm_eps)
        self.attn = Attention(embed_dims, num_heads, causal, qkv_bias, qk_norm, norm_eps,
                              attn_drop_rate, drop_rate)
        self.ls1 = layer_scale()
        self.ln2 = nn.LayerNorm(embed_dims, norm_eps)
        self.mlp = (SwiGLU if gated_mlp else Mlp)(
            embed_dims, feedforward_channels, drop=(0., drop_rate),
            act_layer=partial(build_activation_layer, act_cfg))
        self.ls2 = layer_scale()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x, sin, cos):                                 # B T D -> B T D
        x = x + self.drop_path(self.ls1(self.attn(self.ln1(x), sin, cos)))
        return x + self.drop_path(self.ls2(self.mlp(self.ln2(x))))
