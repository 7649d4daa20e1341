"""Visualize attention, features and predictions of a network: figures, or a page to explore.

    python tools/analysis_tools/visualize.py CONFIG CHECKPOINT IMAGE... [--query ROW COL] [--grid]
    python tools/analysis_tools/visualize.py CONFIG CHECKPOINT IMAGE... --html page.html

Writes one figure per image: the attention of a query patch and features as colours; for a
pretraining model also its prediction at the query, how well every patch is predicted, and the lift
over copying. Classifiers and segmentors do not predict.

--html writes one page for all images instead. Open it in a browser, point at a patch, and see where
it looks in each block and head, what the network expects next, how sure it is, and how much of that
is beyond copying. The page needs no network and no server.

Files are read as in the config. With more than three channels the first three are shown as red,
green and blue; one channel is shown as grey. Values other than 8-bit are stretched from the
smallest to the largest.
"""
from nepa_mm_cli import CHECKPOINT_HELP, add_cfg_options, add_weights_argument, tool_parser

SHEET = 16      # images on one contact sheet
OF_FIGURES = ('seed', 'rollout', 'block', 'grid', 'out_dir')    # options without effect on a page


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('config', help='config of pretraining, a classifier or a segmentor')
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    parser.add_argument('--query', nargs=2, type=int, metavar=('ROW', 'COL'),
                        help='query patch, from 0 (default: a random one in each image; on a page '
                        'the middle one to begin with)')
    parser.add_argument('--seed', type=int, help='seed of random queries (default: 0)')
    parser.add_argument('--layers', nargs='+', type=int, metavar='L',
                        help='layers whose attention is averaged, from 0 or from the end '
                        '(default: the first two thirds, 0 to 15 of ViT-L as in the paper; '
                        'with --html, the blocks to choose from, default: all)')
    parser.add_argument('--heads', nargs='+', type=int, metavar='H',
                        help='heads to average, from 0 (default: all)')
    parser.add_argument('--rollout', action='store_true', default=None,
                        help='follow attention through these layers instead of averaging them')
    parser.add_argument('--block', type=int,
                        help='block whose features are shown as colours, from 0 or from the end '
                        '(default: the last of the first two thirds)')
    parser.add_argument('--size', type=int, help='short side of the model input in pixels, '
                        "rounded to whole patches (default: the config's training crop)")
    parser.add_argument('--grid', action='store_true', default=None,
                        help=f'also write contact sheets of up to {SHEET} images')
    parser.add_argument('--out-dir', help='where figures go (default: visualization)')
    parser.add_argument('--html', metavar='FILE', help='write this page instead of figures; if the '
                        'file exists, the page gets the next free name')
    add_weights_argument(parser)
    parser.add_argument('--device', help="e.g. 'cpu' or 'cuda:1'; default: a GPU if there is one")
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    given = [name for name in OF_FIGURES if getattr(args, name) is not None]
    if args.html and not args.html.endswith('.html'):
        parser.error(f'--html must name a file that ends in .html, got {args.html!r}.')
    if args.html and given:
        parser.error(f'--{given[0].replace("_", "-")} belongs to figures and cannot be combined '
                     'with --html.')
    return args


if __name__ == '__main__':
    parse_args()    # before the slow imports

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from PIL import Image, ImageOps

from nepa_mm import apis
from nepa_mm.apis.channel_checks import preprocessor_settings, type_name
from nepa_mm.checkpoints.loading import load_strict
from nepa_mm.datasets.images import read_image, to_display_rgb
from nepa_mm.models.vit import NEPAViT
from nepa_mm.utils.nested import iter_dicts
from nepa_mm.utils.outputs import free_path, page_names
from nepa_mm.visualization.html_page import check_size, count_weights, describe_image, write_page
from nepa_mm.visualization.image_maps import inspect_image
from nepa_mm.visualization.pages import draw_page, draw_sheet

READS = ('model', 'data_preprocessor', 'train_dataloader', 'default_scope', 'custom_imports')
UNREAD = {'model.backbone.init_cfg': 'CHECKPOINT names the weights'}


def build_backbone(cfg, args):
    """Build the config's backbone with the checkpoint's weights; return it and the set used."""
    backbone = (cfg.get('model') or {}).get('backbone') or {}
    if type_name(backbone) != NEPAViT.__name__:
        raise ValueError(f'The backbone in {args.config} must be a NEPAViT, got '
                         f'{backbone.get("type")}.')
    if backbone.get('scan', 'raster') != 'raster':
        raise ValueError(f'{args.config} reads patches in scan order {backbone["scan"]!r}; '
                         "figures support 'raster' only.")
    backbone.pop('init_cfg', None)      # the checkpoint has all weights
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    backbone = MODELS.build(backbone)
    weights, _ = load_strict(backbone, args.checkpoint, prefix='backbone.', weights=args.weights)
    return backbone.to(args.device or get_device()).eval(), weights


def training_size(cfg):
    """Return the short side of the config's training crops; 224 if it has none."""
    sizes = [step.get('crop_size', step.get('scale'))
             for step in iter_dicts(cfg.get('train_dataloader') or {})]
    sizes = [np.min(size) for size in sizes if size is not None]
    return int(sizes[-1]) if sizes else 224


def fit_image(image, size, patch_size):
    """Resize an image to a whole number of patches with its aspect kept.

    Args:
        image (ndarray): (height, width) or (height, width, C), of any size.
        size (int): Its short side in pixels, rounded to whole patches.
        patch_size (tuple[int, int]): Height and width of a patch in pixels.

    Returns:
        ndarray: The resized image. Less than half a patch is cropped at either end.

    Raises:
        ValueError: ``size`` is less than two patches.
    """
    if size < 2 * max(patch_size):
        raise ValueError(f'The short side must have at least two patches, {2 * max(patch_size)} '
                         f'pixels, got {size}.')
    scale = size / min(image.shape[:2])
    height, width = (round(side * scale / patch) * patch
                     for side, patch in zip(image.shape, patch_size))
    channels = [np.asarray(ImageOps.fit(Image.fromarray(np.ascontiguousarray(channel)),
                                        (width, height), Image.Resampling.BICUBIC))
                for channel in np.moveaxis(np.atleast_3d(image), 2, 0)]
    return np.dstack(channels) if image.ndim == 3 else channels[0]


def load_image(path, cfg, size, patch_size):
    """Read an image file at the model's input size: (height, width) or (height, width, C), BGR."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'There is no image {path}.')
    return fit_image(read_image(path, apis.color_type(cfg, 'test_dataloader', 'train_dataloader')),
                     size, patch_size)


def normalise(image, cfg, device):
    """Return an image as the network's input (1, C, height, width)."""
    settings = preprocessor_settings(cfg)
    image = np.atleast_3d(image)
    if image.shape[2] == 3 and (settings.get('to_rgb') or settings.get('bgr_to_rgb')):
        image = image[..., ::-1]
    image = (image - np.array(settings.get('mean', 0.))) / np.array(settings.get('std', 1.))
    return torch.tensor(image.transpose(2, 0, 1)[None], dtype=torch.float32, device=device)


def choose_query(query, path, grid, shift, rng):
    """Return the index of the query patch; a random one has a patch to predict."""
    if query is None:
        return int(rng.integers(grid[0] * grid[1] - (shift or 0)))
    if not all(0 <= i < n for i, n in zip(query, grid)):
        raise ValueError(f'--query {query[0]} {query[1]} is outside of {path}, which has rows 0 to '
                         f'{grid[0] - 1} and columns 0 to {grid[1] - 1} of patches.')
    return query[0] * grid[1] + query[1]


def resolve_indices(indices, num, flag, from_end=True):
    """Return sorted, unique indices below ``num``; negative ones count from the end."""
    for i in indices:
        if not -num * from_end <= i < num:
            raise ValueError(f'{flag} must be from {-num * from_end} to {num - 1}, got {i}.')
    return sorted({i % num for i in indices})


def why_no_prediction(kind, causal, shift):
    """Return why a page shows no predictions, or None, and the shift of those that it shows."""
    if shift is None:
        return (f'The page shows no predictions: this {kind} was not trained to predict '
                'embeddings.'), None
    if not causal:
        return ('The page shows no predictions: this network reads all patches at once, so every '
                'output has seen the patch that it would have to predict.'), None
    return None, shift


def describe_indices(indices, num, noun):
    """Return e.g. 'layers 0-7 of 12'."""
    if len(indices) == num:
        return f'all {noun}s'
    spans = f'{indices[0]}-{indices[-1]}'
    if len(indices) < 3 or indices != list(range(indices[0], indices[-1] + 1)):
        spans = ', '.join(map(str, indices))
    return f'{noun}{"s" * (len(indices) > 1)} {spans} of {num}'


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    matplotlib.use('Agg')
    with apis.user_errors():
        cfg = apis.load_config(args.config, args.cfg_options, reads=READS, unread=UNREAD)
        apis.check_channels(cfg)
        apis.check_checkpoint(args.checkpoint, 'CHECKPOINT')
        backbone, weights = build_backbone(cfg, args)
        num_layers, num_heads = backbone.num_layers, backbone.layers[0].attn.num_heads
        first = range(max(num_layers * 2 // 3, 1))
        layers = resolve_indices(args.layers or first, num_layers, '--layers')
        heads = resolve_indices(
            args.heads or range(num_heads), num_heads, '--heads', from_end=False)
        block, = resolve_indices(
            [first[-1] if args.block is None else args.block], num_layers, '--block')
        shift = cfg.model.head.get('shift', 1) if cfg.model.type == 'NEPA' else None
        patch_size = backbone.patch_embed.patch_size
        size = training_size(cfg) if args.size is None else args.size
        images = [load_image(path, cfg, size, patch_size) for path in args.images]
        rng = np.random.default_rng(args.seed or 0)
        grids = [(image.shape[0] // patch_size[0], image.shape[1] // patch_size[1])
                 for image in images]
        queries = [choose_query(args.query, path, grid, shift, rng)
                   for path, grid in zip(args.images, grids)]
        if args.html:
            layers = layers if args.layers else list(range(num_layers))
            check_size(count_weights(grids, backbone.num_extra_tokens, len(layers), len(heads),
                                     backbone.causal))
        out = Path(args.html).parent if args.html else Path(args.out_dir or 'visualization')
        out.mkdir(parents=True, exist_ok=True)
    source = args.checkpoint
    if '://' not in source:
        source = '/'.join(Path(source).parts[-2:])
    source += f' ({weights} weights)'
    titles = [Path(path).name for path in args.images]
    if len(set(titles)) < len(titles):
        titles = ['/'.join(Path(path).parts[-2:]) for path in args.images]
    inputs = (normalise(image, cfg, backbone.cls_token.device) for image in images)
    if args.html:
        note, shift = why_no_prediction(cfg.model.type, backbone.causal, shift)
        entries = [describe_image(backbone, img, name, to_display_rgb(image), layers, heads, shift)
                   for img, name, image in zip(inputs, titles, images)]
        page = free_path(args.html)
        write_page(page, entries, backbone, layers, heads, source, note, shift,
                   args.query)
        print(page)
        return
    settings = dict(
        attention=f'{"rollout" if args.rollout else "mean"} over '
                  f'{describe_indices(layers, num_layers, "layer")}, '
                  f'{describe_indices(heads, num_heads, "head")}',
        pca=describe_indices([block], num_layers, 'block'))
    sheets = ['grid'] * (math.ceil(len(images) / SHEET) if args.grid else 0)
    pages = page_names([*args.images, *sheets], out)
    entries = []
    for name, image, img, query in zip(titles, images, inputs, queries):
        page = next(pages)
        view = inspect_image(backbone, img, query, layers, heads, block, bool(args.rollout),
                             shift)
        image = to_display_rgb(image)
        draw_page(page, name, image, view, source, settings, backbone.causal)
        print(page)
        entries.append((name, image, view))
    for start in range(0, len(entries) if args.grid else 0, SHEET):
        sheet = next(pages)
        draw_sheet(sheet, entries[start:start + SHEET], source, settings, backbone.causal)
        print(sheet)


if __name__ == '__main__':
    main()
