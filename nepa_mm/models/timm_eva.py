"""NEPAViT as a timm ``Eva`` model, and back."""
from functools import partial
from inspect import signature

import timm
from timm.layers import LayerNorm
from timm.models.eva import Eva
from torch import Tensor, nn

from nepa_mm.checkpoints.huggingface import rename
from nepa_mm.models.vit import NEPAViT

NAMES = {
    'backbone.cls_token': 'cls_token',
    'backbone.patch_embed.projection': 'patch_embed.proj',
    'backbone.layers.{}.ln1': 'blocks.{}.norm1',
    'backbone.layers.{}.attn.qkv': 'blocks.{}.attn.qkv',
    'backbone.layers.{}.attn.q_norm': 'blocks.{}.attn.q_norm',
    'backbone.layers.{}.attn.k_norm': 'blocks.{}.attn.k_norm',
    'backbone.layers.{}.attn.proj': 'blocks.{}.attn.proj',
    'backbone.layers.{}.ls1.gamma': 'blocks.{}.gamma_1',
    'backbone.layers.{}.ln2': 'blocks.{}.norm2',
    'backbone.layers.{}.mlp.fc1': 'blocks.{}.mlp.fc1',
    'backbone.layers.{}.mlp.fc1_g': 'blocks.{}.mlp.fc1_g',
    'backbone.layers.{}.mlp.fc1_x': 'blocks.{}.mlp.fc1_x',
    'backbone.layers.{}.mlp.fc2': 'blocks.{}.mlp.fc2',
    'backbone.layers.{}.ls2.gamma': 'blocks.{}.gamma_2',
    'backbone.norm': 'norm', 'backbone.fc_norm': 'fc_norm', 'head.fc': 'head',
}
POOLS = dict(raw='', cls_token='token', avg_featmap='avg')


def eva_args(backbone: dict, num_classes: int = 0) -> dict:
    """The arguments of timm's ``Eva`` for a config of :class:`NEPAViT`.

    ``Eva`` has no argument for ``causal``; see :func:`to_timm`.

    Args:
        backbone (dict): Config of NEPAViT.
        num_classes (int): Classes of the linear head, 0 for none. Defaults to 0.

    Returns:
        dict: Arguments. The model accepts images of any size.

    Raises:
        ValueError: ``Eva`` cannot express an option; the message names it.
    """
    args = {name: p.default for name, p in signature(NEPAViT).parameters.items()} | backbone
    arch = args['arch']
    arch = NEPAViT.arch_zoo[arch.lower()] if isinstance(arch, str) else arch
    wanted = dict(
        act_cfg=[dict(type='SiLU')] if args['gated_mlp'] else [dict(type='GELU')],
        out_type=list(POOLS), out_indices=[-1, arch['num_layers'] - 1], drop_rate=[0],
        use_abs_pos_emb=[False], num_register_tokens=[0], scan=['raster'])
    if args['rope_theta'] is None:
        raise ValueError("rope_theta=None cannot be expressed in timm's Eva, only a number.")
    for name, allowed in wanted.items():
        if args[name] not in allowed:
            raise ValueError(f"{name}={args[name]!r} cannot be expressed in timm's Eva"
                             f'{" with gated_mlp" * args["gated_mlp"]}, only {allowed}.')
    return dict(
        embed_dim=arch['embed_dims'], depth=arch['num_layers'], num_heads=arch['num_heads'],
        # Eva takes int(embed_dim * mlp_ratio); the half keeps rounding from losing a channel
        mlp_ratio=(arch['feedforward_channels'] + 0.5) / arch['embed_dims'],
        patch_size=args['patch_size'], in_chans=args['in_channels'], num_classes=num_classes,
        global_pool=POOLS[args['out_type']], dynamic_img_size=True,
        dynamic_img_pad=args['remainder'] == 'pad', use_abs_pos_emb=False, use_rot_pos_emb=True,
        rope_type='dinov3', rope_rotate_half=True, rope_temperature=args['rope_theta'],
        rope_shift_coords=args['rope_shift'], rope_jitter_coords=args['rope_jitter'],
        rope_rescale_coords=args['rope_rescale'], attn_type='rope', qkv_bias=args['qkv_bias'],
        qk_norm=args['qk_norm'] is not None, swiglu_mlp=args['gated_mlp'],
        swiglu_align_to=1,      # any number but 0 keeps gate and value two layers, as ours are
        init_values=args['layer_scale_init_value'],
        norm_layer=partial(LayerNorm, eps=args['norm_eps']),
        use_post_transformer_norm=args['final_norm'], use_fc_norm=args['fc_norm'],
        attn_drop_rate=args['attn_drop_rate'], drop_path_rate=args['drop_path_rate'])


def set_causal(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a timm block: mask later tokens."""
    return args, kwargs | dict(is_causal=True)


def to_timm(model: dict, state_dict: dict[str, Tensor]) -> Eva:
    """A timm ``Eva`` model with the outputs of ours.

    timm passes causality as an argument of each call. Here a forward pre-hook of the blocks
    (:func:`set_causal`) sets it, so every method of the model is causal. The hook is not in
    the state dict: call this function again to rebuild the model.

    Args:
        model (dict): Config of ``NEPA`` or of an ``ImageClassifier``. ``NEPA`` gives its
            backbone with its ``out_type``.
        state_dict (dict[str, Tensor]): Weights in our names.

    Returns:
        Eva: In evaluation mode.

    Raises:
        ValueError: ``Eva`` cannot express an option, a tensor does not fit, or timm is too
            old.
    """
    args = eva_args(model['backbone'], (model.get('head') or {}).get('num_classes', 0))
    unknown = [name for name in args if name not in signature(Eva).parameters]
    if unknown:
        raise ValueError(f'timm {timm.__version__} has an Eva without {", ".join(unknown)}; '
                         'run: pip install "timm>=1.0.31"')
    eva = Eva(**args).eval()
    tensors = {rename(key, NAMES): value for key, value in state_dict.items()}
    # timm's QK-norm always has parameters; one and zero equal ours without
    missing, unexpected = eva.load_state_dict(tensors, strict=False)
    missing = [key for key in missing if '.q_norm.' not in key and '.k_norm.' not in key]
    if missing or unexpected:
        raise ValueError('The weights are not those of the config: '
                         f'{", ".join(missing + unexpected)}.')
    if model['backbone'].get('causal', True):
        for block in eva.blocks:
            block.register_forward_pre_hook(set_causal, with_kwargs=True)
    return eva


def from_timm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a :func:`to_timm` model in our names.

    Args:
        state_dict (dict[str, Tensor]): Weights of the timm model.

    Returns:
        dict[str, Tensor]: Keys below ``backbone.`` and ``head.fc``. QK-norm has weights and
        biases, so load them with ``qk_norm='affine_bias'``.
    """
    names = {theirs: ours for ours, theirs in NAMES.items()}
    return {rename(key, names): value for key, value in state_dict.items()}
