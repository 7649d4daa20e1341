"""NEPA's Vision Transformer: a plain causal ViT whose only position signal is RoPE."""
from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nepa_mm.checkpoints.loading import load_pretrained
from nepa_mm.models.compilation import can_compile, compiled
from nepa_mm.models.layers import SCANS, Block, PatchEmbed, RotaryEmbedding, scan_order


def run_block(layer: nn.Module, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Call a block. All blocks share the compiled graph of this function."""
    return layer(x, sin, cos)


@MODELS.register_module()
class NEPAViT(BaseBackbone):
    """Vision Transformer of NEPA (arXiv 2512.16922), exact to the released code.

    Pre-norm blocks over [class token, patch 1 ... patch N] in raster order. There is no
    position parameter: rotary coordinates are relative to the image. The same weights
    accept any image size and aspect ratio without interpolation.

    Absolute positions, registers and scan orders leave the paper's network; they exist for
    ablations.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', 'large' (or the first letter), or a dict
            with ``embed_dims``, ``num_layers``, ``num_heads`` and
            ``feedforward_channels``. Defaults to 'base'.
        patch_size (int | tuple): Height and width of a patch in pixels. Defaults to 14.
        in_channels (int): Channels of the image. Defaults to 3.
        causal (bool): Whether a token attends only to itself and to earlier tokens.
            Pretraining needs it; the released fine-tuning turns it off. Defaults to True.
        out_indices (int | Sequence[int]): Blocks whose output is returned; negative
            indices count from the end. Defaults to -1.
        out_type (str): Form of each output: 'raw', all tokens (B, 1+N, D); 'cls_token' or
            'last_token', one token (B, D); 'avg_featmap', the mean over the patches
            (B, D); 'featmap', a map (B, D, gh, gw). Defaults to 'raw'.
        final_norm (bool): Whether to normalise the last block's output. Defaults to True.
        fc_norm (bool): Whether to normalise the pooled token or mean again, as in the
            released classifiers. Defaults to False.
        qkv_bias (bool): Bias of the query, key and value projections. Defaults to True.
        qk_norm (str, optional): LayerNorm of queries and keys per head: None, 'plain' (no
            parameters: the paper and the released base pretraining), 'affine' (weight: the
            released large pretraining and all fine-tuning) or 'affine_bias'. Defaults to
            'plain'.
        gated_mlp (bool): act(gate) * up instead of act(up), both of
            ``feedforward_channels``; with SiLU this is SwiGLU. Defaults to False.
        act_cfg (dict): Activation of the MLP. Defaults to ``dict(type='GELU')``.
        layer_scale_init_value (float, optional): Initial LayerScale of both branches; None
            for no LayerScale. Defaults to 1e-5.
        norm_eps (float): Epsilon of every LayerNorm. Defaults to 1e-12.
        drop_rate (float): Dropout after the embedding and both branches. Defaults to 0.
        attn_drop_rate (float): Dropout of attention weights. Defaults to 0.
        drop_path_rate (float): Stochastic depth of the last block, rising linearly from 0
            at the first. Defaults to 0.
        rope_theta (float, optional): Base of the rotary frequencies; None disables the
            rotary embedding (Table 1b). Defaults to 100.
        rope_shift, rope_jitter, rope_rescale (float, optional): Training-time augmentation
            of the coordinates, see :class:`RotaryEmbedding`. Default to None, None and 2.
        use_abs_pos_emb (bool): Whether to add a learned position embedding to the input of
            the first block, not to the targets (Table 1b, plain ViT). Ties the network to
            ``img_size``. Defaults to False.
        img_size (int | tuple): Height and width in pixels for ``use_abs_pos_emb``; unused
            otherwise. Defaults to 224.
        num_register_tokens (int): Learned tokens between class token and patches
            (arXiv 2309.16588). They are not rotated, not part of the loss, and returned
            only by 'raw'. Defaults to 0.
        scan (str): Order of the patches: 'raster', 'snake' or 'random', see
            :func:`nepa_mm.models.layers.scan_order`. Token sequences follow it, and so does
            "next"; 'featmap' is always a map. Defaults to 'raster'.
        remainder (str): For an image whose sides are not multiples of the patch: 'error'
            raises, 'pad' adds zeros at the right and bottom, 'drop' cuts the rest, as the
            reference's convolution does. Defaults to 'error'.
        frozen_stages (int): -1 trains everything; 0 freezes the patch embedding (released
            fine-tuning); k also freezes class token, registers, positions and the first k
            blocks; ``num_layers`` freezes the network. Defaults to -1.
        with_cp (bool): Whether to recompute each block in the backward pass to save
            memory. Defaults to False.
        compile_blocks (bool, optional): Whether to compile the blocks, and the loss of
            :class:`NEPA`, in training. All blocks share one graph per shape of their input,
            so the first step takes seconds longer, not minutes. Modules and parameters stay
            as they are. Defaults to None: on a GPU with Triton and a C compiler.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=...,
            prefix='backbone.', weights=None | 'ema' | 'raw',
            adapt_input_conv=False | True)`` loads a checkpoint, see
            :func:`nepa_mm.checkpoints.loading.load_pretrained`. Defaults to None: normal
            weights with a standard deviation of 0.02, zero biases.

    Raises:
        ValueError: An option has an unknown value; ``embed_dims`` is not a multiple of
            ``num_heads``; the head dimension is not a multiple of 4.
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

    def __init__(self, arch: str | dict = 'base', patch_size: int | tuple[int, int] = 14,
                 in_channels: int = 3, causal: bool = True,
                 out_indices: int | Sequence[int] = -1, out_type: str = 'raw',
                 final_norm: bool = True, fc_norm: bool = False, qkv_bias: bool = True,
                 qk_norm: str | None = 'plain', gated_mlp: bool = False,
                 act_cfg: dict = dict(type='GELU'), layer_scale_init_value: float | None = 1e-5,
                 norm_eps: float = 1e-12, drop_rate: float = 0., attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0., rope_theta: float | None = 100.,
                 rope_shift: float | None = None, rope_jitter: float | None = None,
                 rope_rescale: float | None = 2., use_abs_pos_emb: bool = False,
                 img_size: int | tuple[int, int] = 224, num_register_tokens: int = 0,
                 scan: str = 'raster', remainder: str = 'error', frozen_stages: int = -1,
                 with_cp: bool = False, compile_blocks: bool | None = None,
                 init_cfg: dict | None = None):
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
        """Load the checkpoint of ``init_cfg``, or keep the constructor's values."""
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
        """Set the training mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def embed(self, img: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed the patches of an image, without positions.

        Args:
            img (Tensor): (B, C, height, width), normalised.

        Returns:
            tuple[Tensor, tuple[int, int]]: Embeddings (B, gh * gw, D) in scan order, and
            the grid (gh, gw).
        """
        return self.patch_embed(img)

    def encode(self, z: Tensor, grid: tuple[int, int],
               out_indices: Sequence[int] = (-1,)) -> list[Tensor]:
        """Run the transformer.

        Args:
            z (Tensor): Patch embeddings (B, n, D), the first n of the grid in scan order.
            grid (tuple[int, int]): Rows and columns of the image.
            out_indices (Sequence[int]): Blocks to return. Defaults to the last one.

        Returns:
            list[Tensor]: Tokens (B, 1 + n, D) after each of these blocks: class token,
            registers if any, patches. The last block's are normalised if ``final_norm``.

        Raises:
            ValueError: ``use_abs_pos_emb`` was built for another grid.
        """
        out_indices = self._resolve(out_indices)
        z = z.to(self.cls_token.dtype)                              # fp32 residual stream
        if self.pos_embed is not None:
            z = z + self._positions(grid)[:, :z.shape[1]]
        prefix = [self.cls_token.expand(z.shape[0], -1, -1)]        # len(z) is static in exports
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(z.shape[0], -1, -1))
        x = torch.cat((*prefix, z), dim=1)
        x = self.drop(x)
        sin, cos = self.rope(grid, self.num_extra_tokens, x.device)
        sin, cos = sin[:x.shape[1]], cos[:x.shape[1]]
        run = compiled(run_block) if self.compiles(x) else run_block
        outs = []
        for i, layer in enumerate(self.layers):
            if self.with_cp and self.training:
                x = checkpoint(run, layer, x, sin, cos, use_reentrant=False)
            else:
                x = run(layer, x, sin, cos)
            if i in out_indices:
                outs.append(x)
        if self.num_layers - 1 in out_indices:
            outs[-1] = self.norm(x)
        return outs

    def compiles(self, x: Tensor) -> bool:
        """Whether work on ``x`` is compiled: see ``compile_blocks``."""
        if self.training and self.compile_blocks is None:
            return x.is_cuda and can_compile()
        return self.training and self.compile_blocks

    def _positions(self, grid):                                     # 1 N D, in scan order
        if tuple(grid) != self.pos_embed.shape[1:3]:
            raise ValueError('use_abs_pos_emb has positions for {}x{} patches, but the image has '
                             '{}x{}; set img_size to the size of the images.'.format(
                                 *self.pos_embed.shape[1:3], *grid))
        positions = self.pos_embed.flatten(1, 2)
        if self.scan == 'raster':
            return positions
        return positions[:, scan_order(self.scan, grid, positions.device)]

    def without_registers(self, x: Tensor) -> Tensor:
        """Drop the registers from the tokens that :meth:`encode` returns: (B, 1 + n, D)."""
        if self.register_tokens is None:
            return x
        return torch.cat((x[:, :1], x[:, self.num_extra_tokens:]), dim=1)

    def forward(self, img: Tensor) -> tuple[Tensor, ...]:
        """Features of an image.

        Args:
            img (Tensor): (B, C, height, width), normalised.

        Returns:
            tuple[Tensor]: One entry per ``out_indices``, shaped by ``out_type``.
        """
        z, grid = self.embed(img)
        return tuple(self.format_output(x, grid)
                     for x in self.encode(z, grid, self.out_indices))

    def format_output(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn tokens (B, 1 + N, D) into the form of ``out_type``."""
        return self.fc_norm(self.pool(x, grid, self.out_type))

    def pool(self, x: Tensor, grid: tuple[int, int], out_type: str) -> Tensor:
        """Turn tokens (B, 1 + N, D) into the form of any ``out_type``, without ``fc_norm``."""
        if out_type == 'raw':
            return x
        patches = x[:, self.num_extra_tokens:]
        if out_type == 'featmap':
            if self.scan != 'raster':
                patches = patches[:, scan_order(self.scan, grid, x.device).argsort()]
            return patches.transpose(1, 2).unflatten(2, grid).contiguous()     # B D gh gw
        if out_type == 'avg_featmap':
            return patches.mean(dim=1)
        return x[:, 0 if out_type == 'cls_token' else -1]

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates.

        Args:
            param_name (str): Name of the parameter in the model.
            prefix (str): Name of the backbone in the model, e.g. 'backbone.'.

        Returns:
            tuple[int, int]: Depth and number of depths. Depth is 0 for patch embedding,
            class token, registers and positions, i + 1 for block i, ``num_layers + 1``
            above the blocks.

        Raises:
            ValueError: The name starts with the prefix but is no parameter of this class.
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
