"""Conversion of state dicts between published names and ours, in both directions.

Published weights have the Hugging Face layout of github.com/SihanXU/nepa. huggingface_config.py
converts their configs. Besides names, two things differ: here query, key and value are one matrix,
and a classifier is split into backbone (``fc_norm``) and head (``fc``).
"""
import re
from collections.abc import Iterable

import torch
from mmengine.registry import MODELS, DefaultScope

# published name without `vit_nepa.` -> our name without `backbone.`; {} is the block's number
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
PARTS = ('query', 'key', 'value')
QKV = 'vit_nepa.encoder.layer.{}.attention.attention.query', 'backbone.layers.{}.attn.qkv'
OUTER = {'fc_norm': 'backbone.fc_norm', 'classifier': 'head.fc'}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# the token of masked modelling, which files contain and NEPA does not use
DROPPED = ('vit_nepa.embeddings.mask_token', 'mask_token')


def rename(key: str, names: dict[str, str]) -> str:
    """Rename by a table of templates; keeps the block's number, and ``.weight`` or ``.bias``."""
    for source, target in names.items():
        match = re.fullmatch(re.escape(source).replace(r'\{\}', r'(\d+)') + r'(\.weight|\.bias|)',
                             key)
        if match:
            *number, parameter = match.groups()
            return target.format(*number) + parameter
    raise ValueError(f'The tensor {key} belongs to no NEPA model.')


def match_names(keys: Iterable[str], to: str) -> dict[str, list[str]]:
    """Map our tensor names to published names.

    Args:
        keys (Iterable[str]): Names of the tensors in the file.
        to (str): Target format. 'mm': ``keys`` are published names; 'hf': ``keys`` are ours.

    Returns:
        dict[str, list[str]]: For each of our names the published name, or the three names of
        query, key and value. Skips names in ``DROPPED``.

    Raises:
        ValueError: A name belongs to no NEPA model, or a query, key or value is missing.
    """
    keys = [key for key in keys if key not in DROPPED]
    gated = any('.gate_proj.' in key or '.fc1_g.' in key for key in keys)
    names = {'vit_nepa.' + k: 'backbone.' + v + '_x' * (gated and k.endswith('up_proj'))
             for k, v in NAMES.items()} | OUTER
    if to == 'hf':
        back = {v: k for k, v in names.items()}
        query = {QKV[1]: QKV[0]}
        return {key: [rename(key, query).replace('.query.', f'.{part}.') for part in PARTS]
                if '.attn.qkv.' in key else [rename(key, back)] for key in keys}
    pairs = {}
    for key in keys:
        qkv = re.search(r'\.attention\.attention\.(query|key|value)\.', key)
        if not qkv:
            pairs[rename(key, names)] = [key]
            continue
        parts = [key.replace(f'.{qkv[1]}.', f'.{part}.') for part in PARTS]
        missing = [part for part in parts if part not in keys]
        if missing:
            raise ValueError(f'The tensor {missing[0]} is missing beside {key}.')
        pairs[rename(parts[0], dict([QKV]))] = parts
    return pairs


def from_published(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert published tensors to our names.

    Args:
        state_dict (dict[str, Tensor]): Published keys: prefix ``vit_nepa.``; a classifier also
            has ``fc_norm`` and ``classifier``.

    Returns:
        dict[str, Tensor]: Keys with prefix ``backbone.``; a classifier also has ``head.fc``.

    Raises:
        ValueError: See :func:`match_names`.
    """
    return {ours: torch.cat([state_dict[part] for part in parts]) if parts[1:]
            else state_dict[parts[0]]
            for ours, parts in match_names(state_dict, 'mm').items()}


def to_published(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert our tensors to published names: the inverse of :func:`from_published`.

    Args:
        state_dict (dict[str, Tensor]): Keys with prefix ``backbone.`` or ``head.fc``.

    Returns:
        dict[str, Tensor]: Published keys.

    Raises:
        ValueError: See :func:`match_names`.
    """
    return {part: tensor
            for ours, parts in match_names(state_dict, 'hf').items()
            for part, tensor in zip(parts, state_dict[ours].chunk(len(parts)))}


def check_and_complete(state_dict: dict[str, torch.Tensor], model: dict) -> list[str]:
    """Check that tensors are exactly those of a model; add missing QK-norms as no-ops.

    Args:
        state_dict (dict[str, Tensor]): Tensors in our names. Missing weights (one) and biases
            (zero) of QK-norm are added in place.
        model (dict): Config of the model, see :func:`model_cfg`.

    Returns:
        list[str]: Names of the added tensors.

    Raises:
        ValueError: The model cannot be built. Or a tensor is missing, is not in the model, has
            another shape, or is not floating-point and finite; the message names it.
    """
    last = f'backbone.layers.{model["backbone"]["arch"]["num_layers"] - 1}.ln1.weight'
    if last not in state_dict:      # before a config requests millions of blocks
        raise ValueError(f'The file has no tensor {last}, which the network of its config has.')
    try:
        with torch.device('meta'), DefaultScope.overwrite_default_scope('mmpretrain'):
            wanted = MODELS.build(model).state_dict()
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f'The network of the config cannot be built: {error}') from error
    new = [key for key in wanted if key not in state_dict]
    for key in new:
        if not re.search(r'\.[qk]_norm\.', key):
            raise ValueError(f'The file has no tensor {key}, which the network of its config has.')
    for key, tensor in state_dict.items():
        if key not in wanted:
            raise ValueError(f'The tensor {key} is in the file, but not in the network of its '
                             'config.')
        if tensor.shape != wanted[key].shape:
            raise ValueError(f'The tensor {key} has shape {tuple(tensor.shape)}, but the network '
                             f'of its config needs {tuple(wanted[key].shape)}.')
        if tensor.dtype not in FLOATS:
            raise ValueError(f'The tensor {key} holds {tensor.dtype}, not floating-point numbers.')
        if not tensor.isfinite().all():
            raise ValueError(f'The tensor {key} holds NaN or infinity.')
    dtype = next(iter(state_dict.values())).dtype
    for key in new:
        state_dict[key] = torch.full(wanted[key].shape, float(key.endswith('weight')), dtype=dtype)
    return new


def fold_layer_scale(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiply LayerScale into the projections before it; the function stays the same.

    Args:
        state_dict (dict[str, Tensor]): Tensors in our names, with LayerScale.

    Returns:
        dict[str, Tensor]: Tensors without LayerScale, for ``layer_scale_init_value=None``.

    Raises:
        ValueError: There is no LayerScale.
    """
    out = dict(state_dict)
    gammas = [key for key in state_dict if re.search(r'\.ls[12]\.gamma$', key)]
    if not gammas:
        raise ValueError('There is no LayerScale to fold.')
    for key in gammas:
        gamma = out.pop(key).double()
        layer = key.replace('ls1.gamma', 'attn.proj').replace('ls2.gamma', 'mlp.fc2')
        weight, bias = out[f'{layer}.weight'], out[f'{layer}.bias']
        out[f'{layer}.weight'] = (gamma[:, None] * weight.double()).to(weight.dtype)
        out[f'{layer}.bias'] = (gamma * bias.double()).to(bias.dtype)
    return out
