"""Convert published NEPA weights to ours, and ours to the published format or timm's, without loss.

    python tools/model_converters/convert_checkpoint.py PUBLISHED DST.safetensors [--weights ema]
    python tools/model_converters/convert_checkpoint.py CHECKPOINT DST_FOLDER --to hf
        [--config CONFIG]
        [--weights raw]
    python tools/model_converters/convert_checkpoint.py CHECKPOINT DST_FOLDER --to timm

PUBLISHED is a folder with config.json and weights, a weight file beside a config.json, or
hf://owner/name[@revision]. A config file for tools/test.py is written beside DST.safetensors. With
--to hf, network, input and class names come from --config or from the checkpoint; DST_FOLDER also
gets a preprocessor_config.json. With --to timm, after import nepa_mm,
timm.create_model('local-dir:DST_FOLDER', pretrained=True) loads the folder.
"""
from nepa_mm_cli import add_weights_argument, tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('src', help='weights to convert')
    parser.add_argument('dst', help='file or folder to write; must not exist')
    parser.add_argument('--to', choices=['mm', 'hf', 'timm'], default='mm',
                        help="format of DST: ours (default), the published one or timm's")
    add_weights_argument(parser)
    parser.add_argument('--config', help='config of CHECKPOINT, for --to hf and timm')
    parser.add_argument(
        '--fold-layer-scale', action='store_true',
        help='multiply LayerScale into the projections; outputs do not change')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import json
import re
from pathlib import Path

from mmengine.config import Config

from nepa_mm import apis
from nepa_mm.apis.huggingface_folder import write_folder
from nepa_mm.apis.input_spec import (
    class_names,
    input_of,
    pipeline_of,
    published_input,
    timm_config,
)
from nepa_mm.apis.recorded_network import read_record
from nepa_mm.checkpoints.huggingface import (
    DROPPED,
    check_and_complete,
    fold_layer_scale,
    match_names,
)
from nepa_mm.checkpoints.huggingface_config import (
    DEFAULTS,
    complete_config,
    count_classes,
    model_cfg,
    read_published_config,
)
from nepa_mm.checkpoints.io import read_checkpoint, save_weights
from nepa_mm.checkpoints.loading import select_weights, weights_kind
from nepa_mm.models.timm_eva import CFG, eva_args, to_timm
from nepa_mm.utils.files import atomic_write

BASES = dict(NEPA='pretrain/nepa_vit-b.py', b='classification/nepa_vit-b_ft_in1k.py',
             l='classification/nepa_vit-l_ft_in1k.py')


def report(pairs, new, dropped, arrow):
    """Print the mapping of every tensor, one line for all blocks."""
    rows = {}
    for ours, parts in pairs.items():
        published = parts[0].replace('.query.', '.{query,key,value}.')
        row = tuple(re.sub(r'\.\d+\.', '.N.', name) for name in (published, ours))
        rows[row] = rows.get(row, 0) + 1
    width = max(len(published) for published, _ in rows)
    for (published, ours), count in rows.items():
        print(f'{published:{width}} {arrow} {ours}' + f'  x{count}' * (count > 1))
    print(f'mapped: {sum(map(len, pairs.values()))} published tensors, {len(pairs)} of ours')
    print(f'new, without effect (weight 1, bias 0): {", ".join(new) or "none"}')
    print(f'dropped: {", ".join(dropped) or "none"}')


def config_text(model, config, src, images=None, labels=None):
    """Return the text of a config file for converted weights.

    Args:
        model (dict): The model config.
        config (dict): The complete ``config.json``.
        src (str): Source of the weights, for the docstring of the file.
        images (dict, optional): Input spec (nepa_mm/apis/input_spec.py) of the evaluation. Defaults
            to None: the authors' evaluation.
        labels (list[str], optional): Class names. Defaults to None.
    """
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
    classifier = model['type'] == 'ImageClassifier'
    base = BASES['NEPA' if not classifier else 'l' if config['hidden_size'] == 1024 else 'b']
    explicit = images or config['image_size'] != DEFAULTS['image_size']
    images = images or published_input(config)
    changes = dict(backbone=dict(_delete_=True, **model['backbone']),
                   data_preprocessor=dict(mean=images['mean'], std=images['std'],
                                          to_rgb=images['channel_order'] == 'RGB'))
    if classifier:
        classes = dict(num_classes=model['head']['num_classes'])
        changes['head'] = dict(classes, in_channels=config['hidden_size'])
    cfg = dict(model=changes)
    if classifier and explicit:
        for name in ('val_dataloader', 'test_dataloader'):
            cfg[name] = dict(dataset=dict(pipeline=pipeline_of(images)))
    if labels and tuple(labels) != IMAGENET_CATEGORIES:
        for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            cfg.setdefault(name, dict(dataset={}))['dataset']['metainfo'] = dict(classes=labels)
    # mmengine evaluates this line first; importing nepa_mm registers nepa_mm::
    base = f"_base_ = [__import__('nepa_mm') and 'nepa_mm::{base}']"
    text = f'{f"Converted from {src}."!r}\n{base}\n\n{Config(cfg).pretty_text}'
    return text.replace('{{', r'{\x7b')     # mmengine would substitute variables


def to_mm(args):
    """Write our weights and their config file."""
    if Path(args.dst).suffix != '.safetensors':
        raise ValueError(f'DST of --to mm must be a .safetensors file, got {args.dst}.')
    given = read_published_config(args.src)
    config = complete_config(given)
    missing = sorted(DEFAULTS.keys() - given.keys())
    if missing:
        print('Not in config.json, set to the defaults of the format: '
              + ', '.join(f'{key}={DEFAULTS[key]}' for key in missing))
    checkpoint = read_checkpoint(args.src, weights=args.weights)
    state_dict = select_weights(checkpoint, args.weights, args.src)
    which = weights_kind(checkpoint, args.weights)
    names = checkpoint.get('published_names')
    if names is None:
        raise ValueError(f'{args.src} holds no published NEPA weights: it has keys like '
                         f'{", ".join(list(state_dict)[:3])}, but none below vit_nepa.')
    classes = count_classes(state_dict)
    model = model_cfg(config, classes)
    new = check_and_complete(state_dict, model)
    if args.fold_layer_scale:
        state_dict = fold_layer_scale(state_dict)
        model['backbone']['layer_scale_init_value'] = None
    labels = [config.get('id2label', {}).get(str(i)) for i in range(classes or 0)]
    unnamed = labels == [f'LABEL_{i}' for i in range(classes or 0)]     # as in transformers
    if unnamed or not all(isinstance(label, str) for label in labels):
        labels = []
    kept = dict(dataset_meta=dict(classes=labels)) if labels else {}
    images = input_of(dict(input=checkpoint['meta'].get('input')))
    if images:
        kept['input'] = images
    text, dst = config_text(model, config, args.src, images, labels), Path(args.dst)
    with atomic_write(dst.with_suffix('.py')) as file:
        file.write_text(text, encoding='utf-8')
        save_weights(state_dict, dst, model=model, published=given, source=args.src,
                     weights=dict(state_dict=which), **kept)
    report(match_names(names, 'mm'), new, [name for name in names if name in DROPPED], '->')
    print(f'Wrote {dst}, the {which} weights, and {dst.with_suffix(".py")}.')


def to_hf(args):
    """Write a folder in the published format."""
    which, files, mapping = write_folder(args.src, args.dst, args.weights, args.config,
                                         fold=args.fold_layer_scale)
    report(*mapping, '<-')
    print(f'Wrote {", ".join(files)} to {args.dst}: the {which} weights.')


def to_timm_folder(args):
    """Write a folder for timm.create_model('local-dir:...')."""
    folder = Path(args.dst)
    if folder.exists():
        raise FileExistsError(f'{folder} exists already; remove it or choose another name.')
    if args.fold_layer_scale:
        raise ValueError('--fold-layer-scale is for --to mm and --to hf.')
    checkpoint = read_checkpoint(args.src, weights=args.weights)
    state_dict = select_weights(checkpoint, args.weights, args.src)
    if args.config:
        cfg, meta = Config.fromfile(args.config).to_dict(), checkpoint['meta']
    else:
        cfg, meta, _ = read_record(args.src, args.weights)
    eva = to_timm(cfg['model'], state_dict)
    model_args = eva_args(cfg['model']['backbone'], eva.num_classes)
    # stated here, because timm's own names of models have other defaults
    pretrained = dict(CFG, num_classes=eva.num_classes)
    images = input_of(cfg)
    if images:
        pretrained |= timm_config(images)
        if images['backend'] == 'cv2':
            print("timm's transform resizes with Pillow, the test pipeline with OpenCV: pixels "
                  'differ.')
    else:
        print('No input spec is recorded: the preprocessing is that of the authors; --config '
              'provides the real one.')
    names = class_names(cfg, meta)
    if names and len(names) == eva.num_classes:
        pretrained['label_names'] = names
    config = dict(architecture='nepa_vit', num_classes=eva.num_classes,
                  num_features=eva.num_features, global_pool=model_args['global_pool'],
                  model_args=model_args, pretrained_cfg=pretrained)
    text = json.dumps(config, indent=2) + '\n'
    save_weights(eva.state_dict(), folder / 'model.safetensors', for_transformers=True,
                 source=args.src, weights=dict(state_dict=weights_kind(checkpoint, args.weights)))
    with atomic_write(folder / 'config.json') as file:
        file.write_text(text)
    print(f'Wrote {folder}, the {weights_kind(checkpoint, args.weights)} weights: import nepa_mm; '
          f"timm.create_model('local-dir:{folder}', pretrained=True)")


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    with apis.user_errors():
        dict(mm=to_mm, hf=to_hf, timm=to_timm_folder)[args.to](args)


if __name__ == '__main__':
    main()
