"""Classify or segment images, and save a figure of each.

    python tools/predict.py IMAGE... --model nepa_vit-b_ft_in1k
        --checkpoint hf://SixAILab/nepa-base-patch14-224-sft [--out predictions.csv]
    python tools/predict.py IMAGE... --model configs/segmentation/....py --checkpoint FILE.pth

An IMAGE is a file, a folder (all images in it and in its subfolders), or a quoted pattern such as
'photos/*.webp'. A classifier prints the most probable classes. A segmentor also saves a label map
of each image, with the numbers of the classes as pixel values, in the subfolder `labels`.

With --out, nothing is printed for each image. A row of the file has the image, its figure, and the
classes with their probabilities (classification), or the label map and the fraction of its pixels
in each class (segmentation). An image that cannot be read is named, has a row with the error, and
makes the exit status 1. All others are predicted.
"""
from nepa_mm_cli import CHECKPOINT_HELP, add_weights_argument, tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders or patterns')
    parser.add_argument('--model', required=True,
                        help="name, as in mmpretrain.list_models('nepa*'), or config file")
    parser.add_argument('--checkpoint', help=CHECKPOINT_HELP
                        + '; default: the weights that the model index lists for the model')
    add_weights_argument(parser)
    parser.add_argument('--out', help='also write this table, .csv or .json; must be new')
    parser.add_argument('--out-dir', default='predictions',
                        help='where figures and label maps go (default: predictions)')
    parser.add_argument('--no-figures', action='store_true',
                        help='draw no figures, which takes most of the time')
    parser.add_argument('--topk', type=int, default=5,
                        help='number of classes of a classifier to report (default: 5)')
    parser.add_argument('--batch-size', type=int, default=16, help='images that a classifier '
                        'predicts at once, if all have the same size there (default: 16)')
    parser.add_argument('--device', help="e.g. 'cpu' or 'cuda:1'; default: a GPU if there is one")
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import csv
import json
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from mmengine.registry import DATASETS
from PIL import Image
from rich.progress import track

from nepa_mm import apis
from nepa_mm.apis.input_spec import input_of, size_of
from nepa_mm.checkpoints.io import locate
from nepa_mm.checkpoints.loading import load_strict
from nepa_mm.datasets.images import expand_images, read_image, to_display_rgb
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.files import atomic_write
from nepa_mm.utils.nested import iter_dicts
from nepa_mm.utils.outputs import page_names, require_new_path

LABELS = 'labels'   # subfolder for label maps
SUFFIXES = ('.csv', '.json')


def check(args):
    """Reject arguments that cannot work."""
    if args.topk < 1 or args.batch_size < 1:
        raise ValueError('--topk and --batch-size must be positive, got '
                         f'{args.topk} and {args.batch_size}.')
    if args.out:
        if Path(args.out).suffix not in SUFFIXES:
            raise ValueError(f'--out must end in .csv or .json, got {args.out}.')
        require_new_path(args.out, '--out')


def read_model(args):
    """Return the config and the weight file of the model."""
    from mmpretrain.apis.model import ModelHub
    if args.model.endswith('.py'):
        cfg, weights = apis.read_config(args.model), None
    else:
        info = ModelHub.get(args.model)
        cfg, weights = info.config, info.weights
    weights = args.checkpoint or weights
    if not weights:
        raise ValueError(f'The model index has no weights for {args.model}; give --checkpoint.')
    if 'test_dataloader' not in cfg:
        raise ValueError(f'{args.model} predicts neither classes nor segments: it has no '
                         'test_dataloader, like pretraining configs.')
    apis.check_channels(cfg, 'test_dataloader')
    apis.check_checkpoint(weights, '--checkpoint')
    for node in iter_dicts(cfg.model):
        node.pop('init_cfg', None)      # the checkpoint has all weights
    return cfg, locate(weights, args.weights)


def build(cfg, weights, device, which=None):
    """Build the inferencer with all weights loaded; return it and the set of weights."""
    if apis.is_segmentation(cfg):
        from mmseg.apis import MMSegInferencer
        with warnings.catch_warnings():     # wrong here: classes_and_palette knows them
            for message in ('dataset_meta or class names are not saved', 'Failed to add <class'):
                warnings.filterwarnings('ignore', message)
            infer = MMSegInferencer(cfg, weights, device=device)
    else:
        from mmpretrain import ImageClassificationInferencer
        infer = ImageClassificationInferencer(cfg, pretrained=weights, device=device)
    # the inferencers only warn of mismatches and read the first set only
    which, meta = load_strict(infer.model, weights, weights=which)
    named, model = meta.get('dataset_meta') or {}, infer.model
    num_classes = (model.decode_head if apis.is_segmentation(cfg) else model.head).num_classes
    names = named.get('classes')
    if names and len(names) != max(num_classes, 2):
        raise ValueError(f'{weights} names {len(names)} classes, but the head of the config has '
                         f'{num_classes} outputs.')
    if apis.is_segmentation(cfg) and not named:     # mmseg would assume Cityscapes
        model.dataset_meta = classes_and_palette(cfg)
    return infer, which


def classes_and_palette(cfg):
    """Return classes and palette of the config's data set, or else numbers and random colours."""
    data = next((node for node in iter_dicts(cfg.test_dataloader.dataset)
                 if node.get('type') and 'pipeline' in node), {})
    known = getattr(DATASETS.get(data.get('type', '')), 'METAINFO', {}) | data.get('metainfo', {})
    num_classes = max(cfg.model.decode_head.num_classes, 2)
    names = known.get('classes') or list(map(str, range(num_classes)))
    palette = known.get('palette') or ()
    if len(palette) != len(names):
        palette = np.random.default_rng(0).integers(0, 256, (len(names), 3)).tolist()
    return dict(classes=names, palette=palette)


class Classifier:
    """Predict the most probable classes of images, and draw them as bars."""

    def __init__(self, infer, cfg, args, source):
        self.infer, self.args, self.source = infer, args, source
        try:
            images = input_of(cfg)
            self.batch_size = args.batch_size if images and size_of(images) else 1
        except ValueError:      # a pipeline of unknown effect on the size
            self.batch_size = 1

    def __call__(self, files, pixels):
        """Return a row of each image."""
        batch, = self.infer.preprocess(pixels, batch_size=len(pixels))
        samples = self.infer.forward(batch)
        return [self.row(*one) for one in zip(files, pixels, samples)]

    def row(self, file, pixels, sample):
        scores = sample.pred_score.cpu().numpy()
        top = np.argsort(-scores)[:self.args.topk]
        classes = self.infer.classes
        found = {'classes': [classes[i] if classes else f'class {i}' for i in top],
                 'scores': scores[top].tolist()}
        if self.args.no_figures:
            return found
        page, = page_names([file], self.args.out_dir)
        self.draw(page, pixels, **found)
        return found | dict(figure=str(page))

    def draw(self, page, pixels, classes, scores):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
        left.imshow(to_display_rgb(pixels))
        left.axis('off')
        bars = right.barh(range(len(scores)), scores)
        right.set_yticks(range(len(scores)), [name.split(',')[0] for name in classes])
        right.bar_label(bars, [f'{score:.1%}' for score in scores], padding=3)
        right.invert_yaxis()
        right.set_xlim(0, 1.15)
        right.set_xlabel('probability')
        fig.savefig(page, metadata=dict(Source=self.source))
        plt.close(fig)

    @staticmethod
    def report(row):
        for name, score in zip(row['classes'], row['scores']):
            print(f'  {score:6.2%}  {name}')

    def columns(self, rows):
        """Return the rows of a table with two columns for each class."""
        for row in rows:
            table = dict(file=row['file'])
            pairs = zip(row.get('classes', ()), row.get('scores', ()))
            for rank, (name, score) in enumerate(pairs, 1):
                table |= {f'class_{rank}': name, f'score_{rank}': score}
            yield table | {key: row[key] for key in ('figure', 'error') if key in row}


class Segmentor:
    """Predict label maps of images, and draw them over the images."""

    batch_size = 1      # images differ in size

    def __init__(self, infer, cfg, args, source):
        self.infer, self.args = infer, args
        self.labels = Path(args.out_dir) / LABELS
        self.labels.mkdir(exist_ok=True)
        infer.visualizer.set_dataset_meta(**infer.model.dataset_meta)
        infer.visualizer.alpha = 0.8

    def __call__(self, files, pixels):
        """Return a row of the single image."""
        batch, = self.infer.preprocess(pixels)
        sample = self.infer.forward(batch)[0].cpu().numpy()
        label_map = sample.pred_sem_seg.data[0].astype(np.uint8)
        page, = page_names(files, self.args.out_dir, self.labels)
        Image.fromarray(label_map).save(self.labels / page.name)
        classes = self.infer.model.dataset_meta['classes']
        counts = np.bincount(label_map.ravel(), minlength=len(classes))
        row = dict(mask=str(self.labels / page.name),
                   shares=dict(zip(classes, (counts / label_map.size).tolist())))
        if not self.args.no_figures:
            self.infer.visualizer.add_datasample(
                page.stem, to_display_rgb(pixels[0]), sample, draw_gt=False, out_file=str(page))
            row['figure'] = str(page)
        return [row]

    @staticmethod
    def report(row):
        largest = sorted(row['shares'].items(), key=lambda item: -item[1])[:5]
        for name, share in largest:
            if share:
                print(f'  {share:6.2%}  {name}')
        print(f'  label map: {row["mask"]}')

    def columns(self, rows):
        """Return the rows of a table with one column for each class."""
        for row in rows:
            shares = row.get('shares', {})
            table = {key: value for key, value in row.items() if key != 'shares'}
            yield table | {f'share_{name}': share for name, share in shares.items()}


def predict(predictor, images, args, **how):
    """Return a row of each image; print it unless a table is written."""
    rows, size = [], predictor.batch_size
    batches = [images[start:start + size] for start in range(0, len(images), size)]
    hidden = len(batches) == 1 or not sys.stdout.isatty()
    for batch in track(batches, 'Predicting', disable=hidden):
        pixels, errors = {}, {}
        for image in batch:
            try:
                pixels[image] = read_image(image, **how)
            except DataError as error:
                errors[image] = dict(error=str(error))
                print(f'warning: {error}', file=sys.stderr)
        found = predictor(list(pixels), list(pixels.values())) if pixels else ()
        found = errors | dict(zip(pixels, found))
        for image in batch:
            rows.append(dict(file=image) | found[image])
            if not args.out and image in pixels:
                print(image)
                predictor.report(found[image])
                if 'figure' in found[image]:
                    print(f'  -> {found[image]["figure"]}')
    return rows


def write_table(out, rows, columns):
    """Write the rows as CSV or JSON."""
    with atomic_write(out) as file:
        if Path(out).suffix == '.json':
            file.write_text(json.dumps(rows, indent=1) + '\n')
            return
        rows = list(columns(rows))
        names = dict.fromkeys(name for row in rows for name in row)
        names = [name for name in names if name != 'error'] + ['error'] * ('error' in names)
        with open(file, 'w', newline='', encoding='utf-8', errors='surrogateescape') as opened:
            table = csv.DictWriter(opened, names)
            table.writeheader()
            table.writerows(rows)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    matplotlib.use('Agg')
    with apis.user_errors():
        check(args)
        images = expand_images(args.images)
        cfg, weights = read_model(args)
        infer, which = build(cfg, weights, args.device, args.weights)
        kind = Segmentor if apis.is_segmentation(cfg) else Classifier
        draws = kind is Segmentor or not args.no_figures
        if draws:
            Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        predictor = kind(infer, cfg, args, f'{which} weights of {weights}')
        rows = predict(predictor, images, args,
                       color_type=apis.color_type(cfg, 'test_dataloader'),
                       channels=cfg.model.backbone.get('in_channels', 3))
        if args.out:
            write_table(args.out, rows, predictor.columns)
    failed = [row['file'] for row in rows if 'error' in row]
    places = [args.out] * bool(args.out) + [args.out_dir] * draws
    print(f'{len(rows) - len(failed)} of {len(rows)} images predicted with the {which} weights of '
          f'{weights}' + f', see {" and ".join(places)}' * bool(places) + '.')
    if failed:
        print(f'error: {len(failed)} of {len(rows)} images cannot be read: '
              + ', '.join(failed[:5]) + ', ...' * (len(failed) > 5), file=sys.stderr)
        raise SystemExit(1)


if __name__ == '__main__':
    main()
