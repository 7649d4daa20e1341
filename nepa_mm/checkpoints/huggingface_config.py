"""Conversion between a published ``config.json`` and our model configs, in both directions.

The functions execute nothing from a file: they evaluate no recorded config, and output only class
names of this format.
"""
import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path

from mmengine.registry import MODELS
from torch import Tensor

from nepa_mm.checkpoints.hub import download

ACTIVATIONS = {
    **dict.fromkeys(['gelu', 'gelu_python'], dict(type='GELU')),
    **dict.fromkeys(['gelu_pytorch_tanh', 'gelu_new', 'gelu_python_tanh', 'gelu_fast',
                     'gelu_accurate'], dict(type='GELU', approximate='tanh')),
    **dict.fromkeys(['silu', 'swish'], dict(type='SiLU')),
    'quick_gelu': dict(type='timm.layers.QuickGELU'), 'mish': dict(type='torch.nn.Mish'),
    'relu': dict(type='ReLU'), 'relu6': dict(type='ReLU6'), 'leaky_relu': dict(type='LeakyReLU'),
    'sigmoid': dict(type='Sigmoid'), 'tanh': dict(type='Tanh'),
    'linear': dict(type='torch.nn.Identity'),
}
QK_NORM = {None: {}, 'plain': dict(qk_norm=True), 'affine': dict(qk_norm=True, qk_norm_affine=True),
           'affine_bias': dict(qk_norm=True, qk_norm_affine=True, qk_norm_bias=True)}
# fields of a published config.json and their defaults
DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    use_gated_mlp=False, hidden_act='gelu', hidden_dropout_prob=0., attention_probs_dropout_prob=0.,
    layer_norm_eps=1e-12, rope_theta=100., image_size=224, patch_size=16, num_channels=3,
    qkv_bias=True, qk_norm=False, qk_norm_bias=False, qk_norm_affine=False, layerscale_value=1e-5,
    drop_path_prob=0., add_pooling_layer=False, is_causal=True, pos_embed_shift=None,
    pos_embed_jitter=None, pos_embed_rescale=2.)

# minimum and exclusive maximum, for fields other than positive integers
RANGES = dict(
    hidden_dropout_prob=(0, 1), attention_probs_dropout_prob=(0, 1), drop_path_prob=(0, 1),
    layer_norm_eps=(1e-30, 1), rope_theta=(1e-6, 1e12), layerscale_value=(0, 1e6),
    pos_embed_shift=(0, 1e6), pos_embed_jitter=(1, 1e6), pos_embed_rescale=(1, 1e6),
    image_size=(1, 2 ** 14), patch_size=(1, 2 ** 14))
PAIRS = ('image_size', 'patch_size')
NULLABLE = ('layerscale_value', 'pos_embed_shift', 'pos_embed_jitter', 'pos_embed_rescale')
# our argument -> equivalent published field
FIELDS = dict(
    patch_size='patch_size', in_channels='num_channels', causal='is_causal', qkv_bias='qkv_bias',
    gated_mlp='use_gated_mlp', layer_scale_init_value='layerscale_value', norm_eps='layer_norm_eps',
    drop_rate='hidden_dropout_prob', attn_drop_rate='attention_probs_dropout_prob',
    drop_path_rate='drop_path_prob', rope_theta='rope_theta', rope_shift='pos_embed_shift',
    rope_jitter='pos_embed_jitter', rope_rescale='pos_embed_rescale')
ARCH_FIELDS = dict(embed_dims='hidden_size', num_layers='num_hidden_layers',
                   num_heads='num_attention_heads', feedforward_channels='intermediate_size')


def read_published_config(src: str | Path) -> dict:
    """Read the ``config.json`` of published weights.

    Args:
        src (str | Path): The folder, the weight file beside the ``config.json``, or
            ``hf://owner/name[@revision]``.

    Raises:
        FileNotFoundError: There is no ``config.json``.
        ValueError: It is not JSON, or cannot be downloaded.
    """
    src = str(src)
    if src.startswith('hf://'):
        file = Path(download(src, ['config.json']))
    else:
        path = Path(src).expanduser()
        file = (path if path.is_dir() else path.parent) / 'config.json'
    if not file.is_file():
        raise FileNotFoundError(f'There is no {file}: published weights need their config.json '
                                'beside them.')
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file} is not valid JSON: {error}') from error


def count_classes(state_dict: Mapping[str, Tensor]) -> int | None:
    """Number of classes of tensors in our names; None for a network without a classifier."""
    return len(state_dict['head.fc.weight']) if 'head.fc.weight' in state_dict else None


def complete_config(config: dict) -> dict:
    """Check a published ``config.json`` and add the format's defaults for missing fields.

    Args:
        config (dict): The published fields. Fields that are not in ``DEFAULTS`` are kept.

    Returns:
        dict: ``config`` and the missing fields.

    Raises:
        ValueError: ``config`` is not a dict or describes another architecture, or a field has an
            invalid value; the message names the field.
    """
    if not isinstance(config, dict):
        raise ValueError(f'A published config is a JSON object, got {repr(config)[:50]}.')
    if config.get('model_type', 'vit_nepa') != 'vit_nepa':
        raise ValueError(f'model_type {config["model_type"]!r} is another architecture; only '
                         "'vit_nepa' can be converted.")
    full = DEFAULTS | config
    for key, default in DEFAULTS.items():
        values = full[key] if key in PAIRS and isinstance(full[key], list) else [full[key]]
        if not (all(_known(key, value) for value in values)
                and (values == [full[key]] or len(values) == 2)):
            low, high = RANGES.get(key, (1, 2 ** 31))
            numbers = '' if isinstance(default, (bool, str)) else (
                f' and it is at least {low} and below {high}')
            raise ValueError(f'{key} cannot be {repr(full[key])[:50]} in a published config; its '
                             f'default is {default!r}{numbers}.')
    if not isinstance(full.get('id2label', {}), dict):
        raise ValueError('id2label must be an object that maps numbers to names, got '
                         f'{repr(full["id2label"])[:50]}.')
    if full['hidden_act'] not in ACTIVATIONS:
        raise ValueError(f'hidden_act {full["hidden_act"]!r} has no counterpart here; known are '
                         f'{sorted(ACTIVATIONS)}.')
    return full


def _known(key, value):
    """Whether a value of a field is valid."""
    default = DEFAULTS[key]
    if value is None:
        return key in NULLABLE
    if isinstance(default, (bool, str)) or isinstance(value, bool):
        return type(value) is type(default)
    low, high = RANGES.get(key, (1, 2 ** 31))       # 2 ** 31 exceeds every size of a tensor
    return isinstance(value, int if isinstance(default, int) else (int, float)) and (
        low <= value < high)


def backbone_cfg(config: dict) -> dict:
    """Build the config of :class:`NEPAViT` from a published ``config.json``.

    Args:
        config (dict): The published fields, see :func:`complete_config`.

    Returns:
        dict: Config with ``type='NEPAViT'``. Its output is the input of the published classifier
        (patch mean and ``fc_norm``, or the last token).

    Raises:
        ValueError: See :func:`complete_config`.
    """
    config = complete_config(config)
    qk_norm = None
    if config['qk_norm']:
        affine = 'affine_bias' if config['qk_norm_bias'] else 'affine'
        qk_norm = affine if config['qk_norm_affine'] else 'plain'
    pooled = config['add_pooling_layer']
    return dict(
        type='NEPAViT', arch={ours: config[field] for ours, field in ARCH_FIELDS.items()},
        **{ours: config[field] for ours, field in FIELDS.items()},
        qk_norm=qk_norm, act_cfg=ACTIVATIONS[config['hidden_act']], remainder='drop',
        out_type='avg_featmap' if pooled else 'last_token', fc_norm=pooled)


def model_cfg(config: dict, num_classes: int | None = None) -> dict:
    """Build the config of :class:`NEPA` or a classifier from a published ``config.json``.

    Args:
        config (dict): The published fields, see :func:`complete_config`.
        num_classes (int, optional): Number of classes of a classifier; None for the pretraining
            model. Defaults to None.

    Returns:
        dict: Config of ``NEPA`` or of mmpretrain's ``ImageClassifier``, without a
        data preprocessor.
    """
    backbone = backbone_cfg(config)
    if num_classes is None:
        backbone.update(out_type='raw', fc_norm=False)
        return dict(type='NEPA', backbone=backbone, head=dict(type='NEPAHead'))
    head = dict(type='LinearClsHead', num_classes=num_classes, in_channels=config['hidden_size'])
    return dict(type='ImageClassifier', backbone=backbone, head=head)


def published_config(model: dict, stored: dict | None = None) -> dict:
    """Build the published ``config.json`` of a model; the inverse of :func:`model_cfg`.

    Args:
        model (dict): Config of ``NEPA`` or of an ``ImageClassifier``.
        stored (dict, optional): Published fields that the model was converted from. Fields with
            the same meaning are kept. Defaults to None.

    Returns:
        dict: The published fields.

    Raises:
        ValueError: An option has no published counterpart; the message names it. Or the model
            has other classes than the above, or lacks their required fields.
    """
    try:
        config = _published_config(model, stored)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'No NEPA model has a config like this: {error!r}.') from error
    complete_config(config)
    return config


def _published_config(model, stored):
    types = [part['type'].rpartition('.')[2] for part in (
        model, model['backbone'], *([model['head']] if model.get('head') else []))]
    if types not in (['NEPA', 'NEPAViT', 'NEPAHead'], ['NEPA', 'NEPAViT'],
                     ['ImageClassifier', 'NEPAViT', 'LinearClsHead']):
        raise ValueError(f'A model of {", ".join(types)} has no place in the published format, '
                         'which knows NEPA and ImageClassifier with LinearClsHead.')
    classifier = types[0] == 'ImageClassifier'
    vit = MODELS.get('NEPAViT')
    args = {name: p.default for name, p in signature(vit).parameters.items()} | model['backbone']
    arch = vit.arch_zoo[args['arch'].lower()] if isinstance(args['arch'], str) else args['arch']
    acts = [name for name, cfg in ACTIVATIONS.items() if cfg == args['act_cfg']]
    refused = dict(act_cfg=not acts, final_norm=not args['final_norm'],
                   rope_theta=args['rope_theta'] is None, use_abs_pos_emb=args['use_abs_pos_emb'],
                   num_register_tokens=args['num_register_tokens'] > 0,
                   scan=args['scan'] != 'raster')
    if classifier:
        read_outs = [('avg_featmap', True), ('last_token', False)]
        refused.update(
            out_type=(args['out_type'], bool(args['fc_norm'])) not in read_outs,
            out_indices=args['out_indices'] not in (-1, arch['num_layers'] - 1),
            neck=model.get('neck') is not None)
    for name, wrong in refused.items():
        if wrong:
            hint = ' with this fc_norm' if name == 'out_type' else ''
            value = args.get(name, model.get(name))
            raise ValueError(f'{name}={value!r}{hint} cannot be expressed in the published format.')
    base = DEFAULTS | dict(
        model_type='vit_nepa',
        architectures=[f'ViTNepaFor{"ImageClassification" if classifier else "PreTraining"}'])
    if classifier:
        labels = {str(i): f'LABEL_{i}' for i in range(model['head']['num_classes'])}
        base.update(id2label=labels, label2id={name: int(i) for i, name in labels.items()})
    config = {ARCH_FIELDS[ours]: value for ours, value in arch.items()}
    config |= {field: args[ours] for ours, field in FIELDS.items()}
    config |= dict(qk_norm=False, qk_norm_affine=False, qk_norm_bias=False) | QK_NORM[
        args['qk_norm']]
    if classifier:
        config['add_pooling_layer'] = bool(args['fc_norm'])
    if not stored:
        return base | config | dict(hidden_act=acts[0])
    if stored.get('hidden_act', DEFAULTS['hidden_act']) not in acts:
        config['hidden_act'] = acts[0]
    same = DEFAULTS | stored
    if same['qk_norm'] and config['qk_norm']:   # qk_norm_bias has no effect without qk_norm_affine
        same['qk_norm_bias'] &= same['qk_norm_affine']
    return stored | {key: value for key, value in config.items() if same[key] != value}
