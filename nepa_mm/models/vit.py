"""NEPA's Vision Transformer: a plain causal ViT whose only position signal is RoPE."""
from collections.abc import Sequence
from functools import cache

import torch
from mmengine.registry import MODELS
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from timm.layers import to_2tuple
from torch import nn
from torch.utils.checkpoint import checkpoint

from nepa_mm.checkpoints.loading import load_pretrained
from nepa_mm.models.layers import SCANS, Block, PatchEmbed, RotaryEmbedding, scan_order


def run_block(layer, x, sin, cos):
    """Call a block; a function of its own, so that all blocks are compiled as one."""
    return layer(x, sin, cos)


@cache
def compiled_block():
    """The same, compiled at the first call."""
    return torch.compile(run_block)


@MODELS.register_module()
class NEPAViT(BaseBackbone):
    """Vision Transformer of NEPA (arXiv 2512.16922), exact to the released code.

    Pre-norm blocks over [class token, patch 1 ... patch N] in raster order. There
    is no position parameter: rotary coordinates are relative to the image, so any
    image size and aspect works with the same weights and without interpolation.
    The last four options before ``remainder`` leave that network, for ablations.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', 'large' (or the first letter),
            or a dict with ``embed_dims``, ``num_layers``, ``num_heads`` and
            ``feedforward_channels``. Defaults to 'base'.
        patch_size (int | tuple): Height and width of a patch in pixels. Defaults
            to 14.
        in_channels (int): Channels of the image. Defaults to 3.
        causal (bool): Whether a token sees only itself and what comes before it.
            Pretraining needs it; the released fine-tuning turns it off. Defaults
            to True.
        out_indices (int | Sequence[int]): Blocks whose output is returned;
            negative ones count from the end. Defaults to -1.
        out_type (str): What is returned of each: 'raw', all tokens (B, 1+N, D);
            'cls_token' or 'last_token', one token (B, D); 'avg_featmap', the mean
            over the patches (B, D); 'featmap', a map (B, D, gh, gw). Defaults to
            'raw'.
        final_norm (bool): Whether the last block's output is normalised. Defaults
            to True.
        fc_norm (bool): Whether a further LayerNorm follows the token or the mean,
            as in the released classifiers. Defaults to False.
        qkv_bias (bool): Bias of the query, key and value projections. Defaults to
            True.
        qk_norm (str, optional): LayerNorm of queries and keys per head: None,
            'plain' (no parameters; the paper, and the released base pretraining),
            'affine' (weight; the released large pretraining and all fine-tuning)
            or 'affine_bias'. Defaults to 'plain'.
        gated_mlp (bool): act(gate) * up instead of act(up), both of
            ``feedforward_channels``. SwiGLU is this with a SiLU. Defaults to False.
        act_cfg (dict): Activation of the MLP. Defaults to ``dict(type='GELU')``.
        layer_scale_init_value (float, optional): LayerScale of both branches, or
            None for none. Defaults to 1e-5.
        norm_eps (float): Epsilon of every LayerNorm. Defaults to 1e-12.
        drop_rate (float): Dropout after the embedding and both branches. Defaults
            to 0.
        attn_drop_rate (float): Dropout of attention weights. Defaults to 0.
        drop_path_rate (float): Stochastic depth of the last block; it rises
            linearly from 0 at the first. Defaults to 0.
        rope_theta (float, optional): Base of the rotary frequencies, or None for no
            rotary embedding (Table 1b). Defaults to 100.
        rope_shift, rope_jitter, rope_rescale (float, optional): Training-time
            augmentation of the coordinates, see :class:`RotaryEmbedding`. Default
            to None, None and 2.
        use_abs_pos_emb (bool): Whether a learned embedding of its place is added to
            every patch at the input of the first block, not to the targets (Table
            1b, plain ViT). It ties the network to ``img_size``. Defaults to False.
        img_size (int | tuple): Height and width in pixels that ``use_abs_pos_emb``
            has places for; without it any size will do. Defaults to 224.
        num_register_tokens (int): Learned tokens between class token and patches,
            which are neither rotated nor part of the loss or of any read-out but
            'raw' (arXiv 2309.16588). Defaults to 0.
        scan (str): The order of the patches: 'raster', 'snake' or 'random', see
            :func:`nepa_mm.models.layers.scan_order`. Every token sequence is in this order,
            and so is "next"; 'featmap' is a map in any case. Defaults to 'raster'.
        remainder (str): An image that is no whole number of patches raises an
            error ('error'), is padded with zeros at the right and bottom ('pad'),
            or loses the rest ('drop', as the reference's convolution does).
            Defaults to 'error'.
        frozen_stages (int): -1 trains everything, 0 freezes the patch embedding (the
            released fine-tuning), k also the class token, registers, places and
            the first k blocks, ``num_layers`` the whole network. Defaults to -1.
        with_cp (bool): Whether to recompute each block in the backward pass to save
            memory. Defaults to False.
        compile_blocks (bool): Whether torch.compile fuses the operations within a block in
            training. All blocks share what is compiled, so the first step takes seconds
            longer, not minutes; modules and parameters stay as they are. Defaults to
            False.
        bf16_residual (bool): Whether under bf16 autocast the stream between the blocks is
            bf16, too; the reference's is fp32. It costs some accuracy, for what LayerScale
            makes small is lost in the rounding, and halves the traffic of the stream where
            ``compile_blocks`` fuses the norms, which autocast gives an fp32 copy otherwise.
            Outputs of earlier blocks are bf16 then. Defaults to False.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=...,
            prefix='backbone.', weights=None | 'ema' | 'raw',
            adapt_input_conv=False | True)`` starts from a checkpoint, see
            :func:`nepa_mm.checkpoints.loading.load_pretrained`. Defaults to None: normal
            weights of std 0.02, zero biases.

    Raises:
        ValueError: An option has none of the values above; ``embed_dims`` is no
            multiple of ``num_heads``, or the head dimension none of 4.
    """

    arch_zoo = {
        **dict.fromkeys(['t', 'tiny'], dict(
            embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768)),
        **dict.fromkeys(['s', 'small'], dict(
            embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536)),
        **dict.fromkeys(['b', 'base'], dict(
            embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072)),
        **dict.fromkeys(['l', 'large'], dict(
            embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=4096)),
    }
    OUT_TYPES = ('raw', 'cls_token', 'last_token', 'avg_featmap', 'featmap')

    def __init__(self, arch='base', patch_size=14, in_channels=3, causal=True, out_indices=-1,
                 out_type='raw', final_norm=True, fc_norm=False, qkv_bias=True, qk_norm='plain',
                 gated_mlp=False, act_cfg=dict(type='GELU'), layer_scale_init_value=1e-5,
                 norm_eps=1e-12, drop_rate=0., attn_drop_rate=0., drop_path_rate=0.,
                 rope_theta=100., rope_shift=None, rope_jitter=None, rope_rescale=2.,
                 use_abs_pos_emb=False, img_size=224, num_register_tokens=0, scan='raster',
                 remainder='error', frozen_stages=-1, with_cp=False, compile_blocks=False,
                 bf16_residual=False, init_cfg=None):
        super().__init__(init_cfg)
        arch = self._arch_settings(arch)
        self.embed_dims, self.num_layers = arch['embed_dims'], arch['num_layers']
        if self.embed_dims % arch['num_heads']:
            raise ValueError('embed_dims must be a multiple of num_heads, got '
                             f'{self.embed_dims} and {arch["num_heads"]}.')
        for name, rate in dict(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate,
                               drop_path_rate=drop_path_rate).items():
            if not 0 <= rate < 1:
                raise ValueError(f'{name} must be in [0, 1), got {rate}.')
        if out_type not in self.OUT_TYPES:
            raise ValueError(f'out_type must be one of {self.OUT_TYPES}, got {out_type!r}.')
        if scan not in SCANS:
            raise ValueError(f'scan must be one of {SCANS}, got {scan!r}.')
        if num_register_tokens < 0:
            raise ValueError('num_register_tokens must be 0 or a positive number, '
                             f'got {num_register_tokens}.')
        if not -1 <= frozen_stages <= self.num_layers:
            raise ValueError(f'frozen_stages must be in [-1, {self.num_layers}], '
                             f'got {frozen_stages}.')
        if fc_norm and out_type not in ('cls_token', 'last_token', 'avg_featmap'):
            raise ValueError('fc_norm normalises one vector per image and needs out_type '
                             f"'cls_token', 'last_token' or 'avg_featmap', got {out_type!r}.")
        # what shapes of tensors do not tell: see loading.warn_if_function_differs
        self.function = dict(act_cfg=dict(act_cfg), rope_theta=rope_theta, scan=scan,
                             norm_eps=norm_eps)
        self.out_type, self.with_cp, self.frozen_stages = out_type, with_cp, frozen_stages
        self.causal, self.compile_blocks, self.scan = causal, compile_blocks, scan
        self.bf16_residual = bf16_residual
        self.num_extra_tokens = 1 + num_register_tokens     # the class token comes first
        self.out_indices = self._resolve(out_indices)

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, to_2tuple(patch_size),
                                      remainder, scan)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        self.register_tokens = self.pos_embed = None
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens,
                                                            self.embed_dims))
        if use_abs_pos_emb:
            grid = [side // patch for side, patch in zip(to_2tuple(img_size),
                                                         self.patch_embed.patch_size)]
            self.pos_embed = nn.Parameter(torch.zeros(1, *grid, self.embed_dims))
        self.rope = RotaryEmbedding(self.embed_dims // arch['num_heads'], rope_theta, rope_shift,
                                    rope_jitter, rope_rescale, scan)
        self.drop = nn.Dropout(drop_rate)
        # fp32 steps, like the reference, whose rates the parity test compares
        drop_path_rates = torch.linspace(0, drop_path_rate, self.num_layers, device='cpu').tolist()
        self.layers = nn.ModuleList(
            Block(self.embed_dims, arch['num_heads'], arch['feedforward_channels'], causal=causal,
                  qkv_bias=qkv_bias, qk_norm=qk_norm, gated_mlp=gated_mlp, act_cfg=act_cfg,
                  layer_scale_init_value=layer_scale_init_value, norm_eps=norm_eps,
                  drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=rate)
            for rate in drop_path_rates)

        def norm(enabled):
            return nn.LayerNorm(self.embed_dims, norm_eps) if enabled else nn.Identity()

        self.norm = norm(final_norm)
        self.fc_norm = norm(fc_norm)

        for parameter in (self.cls_token, self.register_tokens, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
                parameter.requires_grad_(frozen_stages < 1)
        self.apply(self._init_layer)
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def _arch_settings(self, arch):
        if isinstance(arch, str):
            if arch.lower() not in self.arch_zoo:
                raise ValueError(f'arch must be one of {tuple(self.arch_zoo)} or a dict, '
                                 f'got {arch!r}.')
            return self.arch_zoo[arch.lower()]
        keys = set(self.arch_zoo['base'])
        if not isinstance(arch, dict) or set(arch) != keys:
            raise ValueError(f'arch as a dict needs the keys {sorted(keys)}, got {arch}.')
        return arch

    def _resolve(self, out_indices):
        indices = out_indices if isinstance(out_indices, Sequence) else [out_indices]
        for i in indices:
            if not -self.num_layers <= i < self.num_layers:
                raise ValueError(f'out_indices must be in [{-self.num_layers}, '
                                 f'{self.num_layers - 1}] for {self.num_layers} blocks, got {i}.')
        return sorted(i % self.num_layers for i in indices)

    @staticmethod
    def _init_layer(module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def init_weights(self):
        """Load ``init_cfg``'s checkpoint; without one the constructor's values stay."""
        cfg = self.init_cfg
        if isinstance(cfg, dict) and cfg.get('type') == 'Pretrained':
            load_pretrained(self, **{k: v for k, v in cfg.items() if k != 'type'})
            self.is_init = True
        else:
            super().init_weights()

    def _frozen_modules(self):
        if self.frozen_stages >= 0:
            yield self.patch_embed
        yield from self.layers[:max(self.frozen_stages, 0)]
        if self.frozen_stages == self.num_layers:
            yield from (self.norm, self.fc_norm, self.rope)

    def train(self, mode=True):
        """Set the training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def embed(self, img):
        """Embed the patches of an image; nothing is added to them.

        Args:
            img (Tensor): (B, C, height, width), normalised.

        Returns:
            tuple[Tensor, tuple[int, int]]: Embeddings (B, gh * gw, D) in the order
            of ``scan``, and the grid (gh, gw).
        """
        return self.patch_embed(img)

    def encode(self, z, grid, out_indices=(-1,)):
        """Run the transformer.

        Args:
            z (Tensor): Patch embeddings (B, n, D), the first n of the grid in
                the order of ``scan``.
            grid (tuple[int, int]): Rows and columns of the whole image.
            out_indices (Sequence[int]): Blocks whose output is returned. Defaults
                to the last one.

        Returns:
            list[Tensor]: Tokens (B, 1 + n, D) after each of these blocks, the class
            token first, then any registers; the last block's are normalised if
            ``final_norm``.

        Raises:
            ValueError: ``use_abs_pos_emb`` has no place for each patch of this grid.
        """
        out_indices = self._resolve(out_indices)
        z = z.to(self.cls_token.dtype)                              # fp32 residual stream
        if self.pos_embed is not None:
            z = z + self._positions(grid)[:, :z.shape[1]]
        prefix = [self.cls_token.expand(z.shape[0], -1, -1)]        # len() would fix it in exports
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(z.shape[0], -1, -1))
        x = torch.cat((*prefix, z), dim=1)
        x = self.drop(x)
        if self.bf16_residual and torch.is_autocast_enabled(x.device.type):
            x = x.bfloat16()
        sin, cos = self.rope(grid, self.num_extra_tokens, x.device)
        sin, cos = sin[:x.shape[1]], cos[:x.shape[1]]
        run = compiled_block() if self.compile_blocks and self.training else run_block
        outs = []
        for i, layer in enumerate(self.layers):
            if self.with_cp and self.training:
                x = checkpoint(run, layer, x, sin, cos, use_reentrant=False)
            else:
                x = run(layer, x, sin, cos)
            if i in out_indices:
                outs.append(x)
        if self.num_layers - 1 in out_indices:
            outs[-1] = self.norm(x.to(self.cls_token.dtype))
        return outs

    def _positions(self, grid):                                     # 1 N D, in scan order
        if tuple(grid) != self.pos_embed.shape[1:3]:
            raise ValueError('use_abs_pos_emb has places for {}x{} patches, but the image has '
                             '{}x{}; set img_size to the size of the images.'.format(
                                 *self.pos_embed.shape[1:3], *grid))
        positions = self.pos_embed.flatten(1, 2)
        if self.scan == 'raster':
            return positions
        return positions[:, scan_order(self.scan, grid, positions.device)]

    def without_registers(self, x):
        """Tokens (B, 1 + n, D), class token first, of all tokens as :meth:`encode` gives them."""
        if self.register_tokens is None:
            return x
        return torch.cat((x[:, :1], x[:, self.num_extra_tokens:]), dim=1)

    def forward(self, img):
        """Features of an image.

        Args:
            img (Tensor): (B, C, height, width), normalised.

        Returns:
            tuple[Tensor]: One entry per ``out_indices``, shaped by ``out_type``.
        """
        z, grid = self.embed(img)
        return tuple(self.format_output(x, grid)
                     for x in self.encode(z, grid, self.out_indices))

    def format_output(self, x, grid):
        """Turn tokens (B, 1 + N, D) into what ``out_type`` names."""
        if self.out_type == 'raw':
            return x
        patches = x[:, self.num_extra_tokens:]
        if self.out_type == 'featmap':
            if self.scan != 'raster':
                patches = patches[:, scan_order(self.scan, grid, x.device).argsort()]
            return patches.transpose(1, 2).unflatten(2, grid).contiguous()     # B D gh gw
        if self.out_type == 'avg_featmap':
            return self.fc_norm(patches.mean(dim=1))
        return self.fc_norm(x[:, 0 if self.out_type == 'cls_token' else -1])

    def get_layer_depth(self, param_name, prefix=''):
        """Depth of a parameter for layer-wise learning rates.

        Args:
            param_name (str): Name of the parameter in the model.
            prefix (str): Name of the backbone in the model, e.g. 'backbone.'.

        Returns:
            tuple[int, int]: Depth and number of depths: 0 for patch embedding, class
            token, registers and places, i + 1 for block i, ``num_layers + 1`` for what follows.

        Raises:
            ValueError: The name is below the prefix but no parameter of this class.
        """
        num_depths = self.num_layers + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        name = param_name[len(prefix):]
        root = name.split('.')[0]
        if root in ('patch_embed', 'cls_token', 'register_tokens', 'pos_embed'):
            return 0, num_depths
        if root == 'layers':
            return int(name.split('.')[1]) + 1, num_depths
        if root in ('norm', 'fc_norm'):
            return num_depths - 1, num_depths
        raise ValueError(f'{param_name} is no parameter of {type(self).__name__}.')
