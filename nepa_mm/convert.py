"""The published weights (Hugging Face layout of github.com/SihanXU/nepa) in our names and back.

Pure functions on configs and state dicts. Two things differ besides the names: query,
key and value are one matrix here, and the classifier's parts live in the backbone
(``fc_norm``) and the head (``fc``).
"""
import re

import torch

# published name below `vit_nepa.` <-> name below `backbone.`; {} stands for the block's number
NAMES = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.patch_embeddings.projection': 'patch_embed.projection',
    'encoder.layer.{}.layernorm_before': 'layers.{}.ln1',
    'encoder.layer.{}.attention.attention.q_norm': 'layers.{}.attn.q_norm',
    'encoder.layer.{}.attention.attention.k_norm': 'layers.{}.attn.k_norm',
    'encoder.layer.{}.attention.output.dense': 'layers.{}.attn.proj',
    'encoder.layer.{}.layer_scale.lambda1': 'layers.{}.ls1.gamma',
    'encoder.layer.{}.layernorm_after': 'layers.{}.ln2',
    'encoder.layer.{}.intermediate.gate_proj': 'layers.{}.mlp.fc1_g',
    'encoder.layer.{}.intermediate.up_proj': 'layers.{}.mlp.fc1',      # fc1_x when gated
    'encoder.layer.{}.output.dense': 'layers.{}.mlp.fc2',
    'encoder.layer.{}.output.layer_scale.lambda1': 'layers.{}.ls2.gamma',
    'layernorm': 'norm',
}
QKV = tuple(f'vit_nepa.encoder.layer.{{}}.attention.attention.{part}'
            for part in ('query', 'key', 'value'))
OUTER = {'fc_norm': 'backbone.fc_norm', 'classifier': 'head.fc'}
ACTIVATIONS = {
    **dict.fromkeys(['gelu', 'gelu_python'], dict(type='GELU')),
    **dict.fromkeys(['gelu_new', 'gelu_pytorch_tanh', 'gelu_python_tanh', 'gelu_fast',
                     'gelu_accurate'], dict(type='GELU', approximate='tanh')),
    **dict.fromkeys(['silu', 'swish'], dict(type='SiLU')),
    'quick_gelu': dict(type='timm.layers.QuickGELU'), 'mish': dict(type='torch.nn.Mish'),
    'relu': dict(type='ReLU'), 'relu6': dict(type='ReLU6'), 'leaky_relu': dict(type='LeakyReLU'),
    'sigmoid': dict(type='Sigmoid'), 'tanh': dict(type='Tanh'),
    'linear': dict(type='torch.nn.Identity'),
}


def backbone_cfg(config):
    """The arguments of :class:`NEPAViT` for a published ``config.json``.

    Args:
        config (dict): The published fields.

    Returns:
        dict: Config with ``type='NEPAViT'``; the output is the one that the published
        classifier reads (patch mean and ``fc_norm``, or the last token).

    Raises:
        ValueError: The activation has no counterpart here.
    """
    if config['hidden_act'] not in ACTIVATIONS:
        raise ValueError(f'hidden_act {config["hidden_act"]!r} has no counterpart here; known are '
                         f'{sorted(ACTIVATIONS)}.')
    qk_norm = None
    if config['qk_norm']:
        affine = 'affine_bias' if config['qk_norm_bias'] else 'affine'
        qk_norm = affine if config['qk_norm_affine'] else 'plain'
    pooled = config['add_pooling_layer']
    return dict(
        type='NEPAViT',
        arch=dict(embed_dims=config['hidden_size'], num_layers=config['num_hidden_layers'],
                  num_heads=config['num_attention_heads'],
                  feedforward_channels=config['intermediate_size']),
        patch_size=config['patch_size'], in_channels=config['num_channels'],
        causal=config['is_causal'], qkv_bias=config['qkv_bias'], qk_norm=qk_norm,
        gated_mlp=config['use_gated_mlp'], act_cfg=ACTIVATIONS[config['hidden_act']],
        layer_scale_init_value=config['layerscale_value'], norm_eps=config['layer_norm_eps'],
        drop_rate=config['hidden_dropout_prob'],
        attn_drop_rate=config['attention_probs_dropout_prob'],
        drop_path_rate=config['drop_path_prob'], rope_theta=config['rope_theta'],
        rope_shift=config['pos_embed_shift'], rope_jitter=config['pos_embed_jitter'],
        rope_rescale=config['pos_embed_rescale'], remainder='drop',
        out_type='avg_featmap' if pooled else 'last_token', fc_norm=pooled)


def _rename(key, names):
    """Translate by a table of templates, keeping the block's number and the last part."""
    for source, target in names.items():
        match = re.fullmatch(re.escape(source).replace(r'\{\}', r'(\d+)') + r'(\.weight|\.bias|)',
                             key)
        if match:
            *number, parameter = match.groups()
            return target.format(*number) + parameter
    raise ValueError(f'The tensor {key} belongs to no NEPA model.')


def from_published(state_dict):
    """Published tensors in our names.

    Args:
        state_dict (dict[str, Tensor]): Keys as published: below ``vit_nepa.``, and
            ``fc_norm`` and ``classifier`` of a classifier.

    Returns:
        dict[str, Tensor]: Keys below ``backbone.``, and ``head.fc`` of a classifier.

    Raises:
        ValueError: A key is unknown, or a query, key or value is missing.
    """
    gated = any('.gate_proj.' in key for key in state_dict)
    names = {'vit_nepa.' + k: 'backbone.' + v + '_x' * (gated and k.endswith('up_proj'))
             for k, v in NAMES.items()} | OUTER
    packed, out = {part: 'backbone.layers.{}.attn.qkv' for part in QKV}, {}
    for key, tensor in state_dict.items():
        qkv = re.search(r'\.attention\.attention\.(query|key|value)\.', key)
        if not qkv:
            out[_rename(key, names)] = tensor
        elif qkv[1] == 'query':
            parts = [key.replace('.query.', f'.{part}.') for part in ('query', 'key', 'value')]
            missing = [part for part in parts if part not in state_dict]
            if missing:
                raise ValueError(f'The tensor {missing[0]} is missing beside {key}.')
            out[_rename(key, packed)] = torch.cat([state_dict[part] for part in parts])
    return out


def to_published(state_dict):
    """Our tensors in published names: the inverse of :func:`from_published`.

    Args:
        state_dict (dict[str, Tensor]): Keys below ``backbone.`` and ``head.fc``.

    Returns:
        dict[str, Tensor]: Keys as published.

    Raises:
        ValueError: A key has no published counterpart.
    """
    names = {'backbone.' + v: 'vit_nepa.' + k for k, v in NAMES.items()}
    names['backbone.layers.{}.mlp.fc1_x'] = names['backbone.layers.{}.mlp.fc1']
    names |= {v: k for k, v in OUTER.items()}
    out = {}
    for key, tensor in state_dict.items():
        if '.attn.qkv.' in key:
            for name, part in zip(QKV, tensor.chunk(3)):
                out[_rename(key, {'backbone.layers.{}.attn.qkv': name})] = part.contiguous()
        else:
            out[_rename(key, names)] = tensor
    return out
