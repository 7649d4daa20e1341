"""NEPAViT as a timm ``Eva`` model, and back.

Importing this module registers the models ``nepa_vit*`` for ``timm.create_model``. A folder of
``convert_checkpoint.py --to timm`` names ``nepa_vit`` and its arguments.
"""
from functools import partial
from inspect import signature
from typing import Any

import timm
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from torch import Tensor, nn

from nepa_mm.checkpoints.huggingface import from_published, rename
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
# what every NEPAViT has in common
EVA = dict(dynamic_img_size=True, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type='dinov3',
           rope_rotate_half=True, attn_type='rope',
           swiglu_align_to=1)      # any number but 0 keeps gate and value two layers, as ours are
# with the images of the authors' evaluation
CFG = dict(num_classes=0, input_size=(3, 224, 224), interpolation='bicubic', crop_pct=0.875,
           mean=(0.5,) * 3, std=(0.5,) * 3, first_conv='patch_embed.proj', classifier='head')
POOLS = dict(raw='', cls_token='token', avg_featmap='avg')


def eva_args(backbone: dict, num_classes: int = 0) -> dict:
    """The arguments of :func:`nepa_vit` for a config of :class:`NEPAViT`.

    Args:
        backbone (dict): Config of NEPAViT.
        num_classes (int): Classes of the linear head, 0 for none. Defaults to 0.

    Returns:
        dict: Arguments, plain values. The model accepts images of any size.

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
        global_pool=POOLS[args['out_type']], dynamic_img_pad=args['remainder'] == 'pad',
        causal=args['causal'], norm_eps=args['norm_eps'], rope_temperature=args['rope_theta'],
        rope_shift_coords=args['rope_shift'], rope_jitter_coords=args['rope_jitter'],
        rope_rescale_coords=args['rope_rescale'], qkv_bias=args['qkv_bias'],
        qk_norm=args['qk_norm'] is not None, swiglu_mlp=args['gated_mlp'],
        init_values=args['layer_scale_init_value'],
        use_post_transformer_norm=args['final_norm'], use_fc_norm=args['fc_norm'],
        attn_drop_rate=args['attn_drop_rate'], drop_path_rate=args['drop_path_rate'])


def set_causal(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a timm block: mask later tokens."""
    return args, kwargs | dict(is_causal=True)


def rename_for_timm(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert published tensors or tensors in our names to timm's; others stay as they are.

    timm's QK-norm always has parameters: one and zero where ours has none.
    """
    if any(key.startswith('vit_nepa.') for key in state_dict):
        state_dict = from_published(state_dict)
    if any(key.startswith('backbone.') for key in state_dict):
        state_dict = {rename(key, NAMES): value for key, value in state_dict.items()}
    return {key: value for key, value in model.state_dict().items()
            if '.q_norm.' in key or '.k_norm.' in key} | state_dict


def _create(variant, pretrained=False, causal=True, norm_eps=1e-12, **kwargs):
    unknown = [name for name in EVA | kwargs if name not in signature(Eva).parameters
               and name not in BUILDER]
    if unknown:
        raise ValueError(f'timm {timm.__version__} has an Eva without {", ".join(unknown)}; '
                         'run: pip install "timm>=1.0.31"')
    model = build_model_with_cfg(
        Eva, variant, pretrained, pretrained_filter_fn=rename_for_timm,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        norm_layer=partial(LayerNorm, eps=norm_eps), **EVA | kwargs)
    if causal:
        for block in getattr(model, 'model', model).blocks:     # features_only wraps the model
            block.register_forward_pre_hook(set_causal, with_kwargs=True)
    return model


# arguments of timm's factory, which the model does not see
BUILDER = ('pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args', 'cache_dir',
           'features_only', 'out_indices', 'pretrained_strict')
default_cfgs = generate_default_cfgs({
    'nepa_vit': CFG,
    'nepa_vit_base_patch14_224': CFG | dict(hf_hub_id='SixAILab/nepa-base-patch14-224'),
    'nepa_vit_large_patch14_224': CFG | dict(
        hf_hub_id='SixAILab/nepa-large-patch14-224', crop_pct=224 / 235, crop_mode='squash')})


@register_model
def nepa_vit(pretrained: bool = False, **kwargs: Any) -> Eva:
    """A timm model of any NEPAViT that timm can express; by default ViT-B/14.

    Args:
        pretrained (bool): Whether to load the weights that timm's ``pretrained_cfg`` names.
            Defaults to False.
        **kwargs: ``causal`` (default True), ``norm_eps`` (default 1e-12), and arguments of timm's
            ``Eva``, see :func:`eva_args`.

    Returns:
        Eva: With a causal mask if ``causal``. Its ``global_pool`` is 'avg' by default.
    """
    return _create('nepa_vit', pretrained, **PRESETS['base'] | kwargs)


@register_model
def nepa_vit_base_patch14_224(pretrained: bool = False, **kwargs: Any) -> Eva:
    """The published pretrained ViT-B/14, see :func:`nepa_vit`."""
    return _create('nepa_vit_base_patch14_224', pretrained, **PRESETS['base'] | kwargs)


@register_model
def nepa_vit_large_patch14_224(pretrained: bool = False, **kwargs: Any) -> Eva:
    """The published pretrained ViT-L/14, see :func:`nepa_vit`."""
    return _create('nepa_vit_large_patch14_224', pretrained, **PRESETS['large'] | kwargs)


PRESETS = {arch: eva_args(dict(arch=arch, out_type='avg_featmap')) for arch in ('base', 'large')}


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
    eva = nepa_vit(**args).eval()
    missing, unexpected = eva.load_state_dict(rename_for_timm(state_dict, eva), strict=False)
    if missing or unexpected:
        raise ValueError('The weights are not those of the config: '
                         f'{", ".join(missing + unexpected)}.')
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
