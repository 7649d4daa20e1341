"""Convert published NEPA weights to ours, and ours to the published format; nothing is lost.

    python tools/convert_checkpoint.py PUBLISHED DST.safetensors [--ema]
    python tools/convert_checkpoint.py CHECKPOINT DST_FOLDER --to hf [--config CONFIG] [--ema]

PUBLISHED is a folder with config.json and weights, a weight file beside a config.json, or
hf://owner/name[@revision]. A config file that tools/test.py takes is written beside
DST.safetensors. In the other direction the network is that of --config, or the one that the
checkpoint records.
"""
import argparse
import copy
import json
import re
from pathlib import Path

from mmengine.config import Config

from nepa_mm import runtime
from nepa_mm.checkpoint import (
    read_checkpoint,
    save_weights,
    select_weights,
    weights_of,
    written_whole,
)
from nepa_mm.convert import DROPPED, fit, fold_layer_scale, match_names, to_published
from nepa_mm.convert_config import (
    DEFAULTS,
    complete_config,
    model_cfg,
    published_config,
    recorded_model,
)
from nepa_mm.hub import download

BASES = dict(NEPA='pretrain/nepa_vit-b.py', b='classification/nepa_vit-b_ft_in1k.py',
             l='classification/nepa_vit-l_ft_in1k.py')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', help='what to convert')
    parser.add_argument('dst', help='what to write; it must not exist')
    parser.add_argument('--to', choices=['mm', 'hf'], default='mm', help='format of DST')
    parser.add_argument('--ema', action='store_true', help='take the averaged weights')
    parser.add_argument('--config', help='config of CHECKPOINT, for --to hf')
    parser.add_argument(
        '--fold-layer-scale', action='store_true',
        help='multiply LayerScale into the projections; the outputs stay the same')
    return parser.parse_args(argv)


def read_config(src):
    """``config.json`` beside published weights."""
    if src.startswith('hf://'):
        file = Path(download(src, ['config.json']))
    else:
        file = Path(src) / 'config.json' if Path(src).is_dir() else Path(src).parent / 'config.json'
    if not file.is_file():
        raise FileNotFoundError(f'There is no {file}: published weights need their config.json '
                                'beside them.')
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file} is no JSON: {error}') from error


def report(pairs, new, dropped, arrow):
    """Print what became of every tensor; one line for all blocks."""
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


def config_text(model, config, src):
    """A config file for converted weights, on the base that evaluates as the authors do."""
    classifier = model['type'] == 'ImageClassifier'
    base = BASES['NEPA' if not classifier else 'l' if config['hidden_size'] == 1024 else 'b']
    channels, size = config['num_channels'], config['image_size']
    changes = dict(backbone=dict(_delete_=True, **model['backbone']),
                   data_preprocessor=dict(mean=[127.5] * channels, std=[127.5] * channels,
                                          to_rgb=channels == 3))
    if classifier:
        classes = dict(num_classes=model['head']['num_classes'])
        changes['head'] = dict(classes, in_channels=config['hidden_size'])
        changes['data_preprocessor'].update(classes, batch_augments=dict(augments=classes))
    cfg = dict(model=changes)
    if classifier and isinstance(size, int) and size != DEFAULTS['image_size']:
        pipeline = [
            dict(type='LoadWholeImage'),
            dict(type='ResizeEdge', scale=round(size * 256 / 224), edge='short',
                 interpolation='bicubic', backend='pillow'),
            dict(type='CenterCrop', crop_size=size), dict(type='PackInputs')]
        cfg['test_dataloader'] = cfg['val_dataloader'] = dict(dataset=dict(pipeline=pipeline))
    base = f"_base_ = ['nepa_mm::{base}']"
    return f'"""Converted from {src}."""\n{base}\n\n{Config(cfg).pretty_text}'


def count_classes(state_dict):
    """How many classes the classifier has, None for a network without one."""
    return len(state_dict['head.fc.weight']) if 'head.fc.weight' in state_dict else None


def to_mm(args):
    if Path(args.dst).suffix != '.safetensors':
        raise ValueError(f'DST of --to mm is a .safetensors file, got {args.dst}.')
    weights = 'ema' if args.ema else None
    given = read_config(args.src)
    config = complete_config(given)
    missing = sorted(DEFAULTS.keys() - given.keys())
    if missing:
        print('not in config.json, taken as the format says: '
              + ', '.join(f'{key}={DEFAULTS[key]}' for key in missing))
    checkpoint = read_checkpoint(args.src, weights=weights)
    state_dict = select_weights(checkpoint, weights, args.src)
    names = checkpoint.get('published_names')
    if names is None:
        raise ValueError(f'{args.src} holds no published NEPA weights: it has keys like '
                         f'{", ".join(list(state_dict)[:3])}, and none below vit_nepa.')
    classes = count_classes(state_dict)
    model = model_cfg(config, classes)
    new = fit(state_dict, model)
    if args.fold_layer_scale:
        state_dict = fold_layer_scale(state_dict)
        model['backbone']['layer_scale_init_value'] = None
    labels = [config.get('id2label', {}).get(str(i)) for i in range(classes or 0)]
    named = dict(dataset_meta=dict(classes=labels)) if labels and all(
        isinstance(label, str) for label in labels) else {}
    text, dst = config_text(model, config, args.src), Path(args.dst)
    with written_whole(dst.with_suffix('.py')) as file:
        file.write_text(text)
        save_weights(state_dict, dst, model=model, published=given, source=args.src,
                     weights=dict(state_dict=weights_of(checkpoint)), **named)
    report(match_names(names, 'mm'), new, [name for name in names if name in DROPPED], '->')
    print(f'wrote {dst} and {dst.with_suffix(".py")}')


def to_hf(args):
    folder = Path(args.dst)
    if folder.exists():
        raise FileExistsError(f'{folder} exists already; remove it or name another.')
    weights = 'ema' if args.ema else 'raw'
    checkpoint = read_checkpoint(args.src)
    if not args.ema and 'ema_state_dict' not in checkpoint:
        weights = None      # whatever the file holds
    state_dict = select_weights(checkpoint, weights, args.src)
    meta = checkpoint['meta']
    model = (Config.fromfile(args.config).model if args.config
             else recorded_model(meta, args.src))
    if model is None:
        raise ValueError('The checkpoint does not record its config; give it by --config.')
    model, classes = copy.deepcopy(model), count_classes(state_dict)
    expected = (model.get('head') or {}).get('num_classes')
    if expected != classes:
        raise ValueError(f'The config has a head for {expected} classes, and {args.src} for '
                         f'{classes}.')
    dropped = [key for key in state_dict if key in DROPPED]
    state_dict = {key: value for key, value in state_dict.items() if key not in DROPPED}
    if args.fold_layer_scale:
        state_dict = fold_layer_scale(state_dict)
        model['backbone']['layer_scale_init_value'] = None
    config = published_config(model, meta.get('published'))
    new = fit(state_dict, model_cfg(config, classes))
    # config.json comes last: a folder without it is refused wherever weights are read
    save_weights(to_published(state_dict), folder / 'model.safetensors', for_transformers=True,
                 source=args.src, weights=dict(state_dict=weights or weights_of(checkpoint)))
    with written_whole(folder / 'config.json') as file:
        file.write_text(json.dumps(config, indent=2) + '\n')
    report(match_names(state_dict, 'hf'), new, dropped, '<-')
    print(f'wrote {folder / "model.safetensors"} and {folder / "config.json"}')


def main(argv=None):
    args = parse_args(argv)
    with runtime.one_sentence_errors():
        (to_mm if args.to == 'mm' else to_hf)(args)


if __name__ == '__main__':
    main()
