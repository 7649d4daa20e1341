"""Classify or segment images: print the top-5 classes and save a figure of each image.

    python tools/predict.py IMAGE... --model nepa_vit-b_ft_in1k
        --checkpoint hf://SixAILab/nepa-base-patch14-224-sft
    python tools/predict.py IMAGE... --model configs/segmentation/....py --checkpoint FILE.pth
"""
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmpretrain import ImageClassificationInferencer
from mmpretrain.apis.model import ModelHub
from PIL import Image

from nepa_mm import apis
from nepa_mm.checkpoints.io import locate
from nepa_mm.checkpoints.loading import add_weights_argument, load_strict
from nepa_mm.datasets.images import read_image, to_display_rgb
from nepa_mm.utils.nested import iter_dicts
from nepa_mm.utils.outputs import page_names

LABELS = 'labels'   # subfolder for label maps


def parse_args(argv=None):
    parser = apis.tool_parser(__doc__)
    parser.add_argument('images', nargs='+', help='image files')
    parser.add_argument('--model', required=True,
                        help="name, as in mmpretrain.list_models('nepa*'), or config file")
    parser.add_argument('--checkpoint', help=apis.CHECKPOINT_HELP
                        + '; default: the weights that the model index lists for the model')
    add_weights_argument(parser)
    parser.add_argument('--out-dir', default='predictions',
                        help='where figures go (default: predictions)')
    parser.add_argument('--device', help="e.g. 'cpu' or 'cuda:1'; default: a GPU if there is one")
    return parser.parse_args(argv)


def read_model(args):
    """Return the config and the weight file of the model."""
    if args.model.endswith('.py'):
        cfg, weights = Config.fromfile(args.model), None
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


def classify(infer, args, source):
    """Print the top-5 classes of each image and save a figure with their probabilities."""
    for image, page in zip(args.images, page_names(args.images, args.out_dir)):
        pixels = read_image(image, infer.color_type)
        result, = infer(pixels)
        scores = result['pred_scores']
        top = np.argsort(-scores)[:5]
        names = [infer.classes[i] if infer.classes else f'class {i}' for i in top]
        print(image)
        for name, score in zip(names, scores[top]):
            print(f'  {score:6.2%}  {name}')
        print(f'  -> {page}')
        fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
        left.imshow(to_display_rgb(pixels))
        left.axis('off')
        bars = right.barh([name.split(',')[0] for name in names], scores[top])
        right.bar_label(bars, [f'{score:.1%}' for score in scores[top]], padding=3)
        right.invert_yaxis()
        right.set_xlim(0, 1.15)
        right.set_xlabel('probability')
        fig.savefig(page, metadata=dict(Source=source))
        plt.close(fig)


def build(cfg, weights, device, which=None):
    """Build the inferencer with all weights loaded; return it and the set of weights."""
    if apis.is_segmentation(cfg):
        infer = segmenter_class()(cfg, weights, device=device)
    else:
        infer = ImageClassificationInferencer(cfg, pretrained=weights, device=device)
    infer.color_type = apis.color_type(cfg, 'test_dataloader')
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


def segmenter_class():
    """Return mmseg's inferencer, changed to read and draw images with our reader, not OpenCV."""
    from mmseg.apis import MMSegInferencer

    class Segmenter(MMSegInferencer):
        def preprocess(self, inputs, *args, **kwargs):
            arrays = (read_image(image, self.color_type) for image in inputs)
            return super().preprocess(arrays, *args, **kwargs)

        def visualize(self, inputs, preds, img_out_dir='', **kwargs):
            self.visualizer.set_dataset_meta(**self.model.dataset_meta)
            self.visualizer.alpha = 0.8
            for image, pred in zip(inputs, preds):
                page, pred = next(self.pages), pred.numpy()
                print(f'{image} -> {page}')
                self.visualizer.add_datasample(
                    page.stem, to_display_rgb(read_image(image, self.color_type)), pred,
                    draw_gt=False, out_file=str(page))
                labels = page.parent / LABELS / page.name
                Image.fromarray(pred.pred_sem_seg.data[0].astype(np.uint8)).save(labels)

    return Segmenter


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    matplotlib.use('Agg')
    with apis.user_errors():
        for image in args.images:
            if not Path(image).is_file():
                raise FileNotFoundError(f'There is no image {image}.')
        cfg, weights = read_model(args)
        infer, which = build(cfg, weights, args.device, args.weights)
        for image in args.images:       # reject unreadable images before writing
            read_image(image, infer.color_type)
        out = Path(args.out_dir)
        out.mkdir(parents=True, exist_ok=True)
        if apis.is_segmentation(cfg):
            (out / LABELS).mkdir(exist_ok=True)
            infer.pages = page_names(args.images, out, out / LABELS)
            infer(args.images)
        else:
            classify(infer, args, f'{which} weights of {weights}')
    print(f'Figures of the {which} weights of {weights} are in {args.out_dir}.')


if __name__ == '__main__':
    main()
