"""Export a network for one image size and any batch size: ONNX, or torch.export.

    python tools/model_converters/export.py CONFIG CHECKPOINT --format onnx [--size 224 224]
        [--out FILE]

The rotary embedding becomes a constant. The input `image` is (batch, channels, height, width),
normalised like the config's data preprocessor: (pixel - 127.5) / 127.5. The output `output` is what
the model returns in mode 'tensor': logits of a classifier, score maps of a segmentor at the
resolution of its decode head, features of a pretraining model. The file is written only if it
agrees with PyTorch within 1e-4 of the largest value, for several batch sizes.

The metadata (metadata_props in ONNX, the extra file `nepa_mm.json` in torch.export) are JSON:
`weights` ('ema' or 'raw'), `input_size`, `mean`, `std` and `channel_order`; if known, `classes`
and, from the test pipeline, `resize`, `crop`, `interpolation` and `backend`.
"""
from nepa_mm_cli import CHECKPOINT_HELP, add_weights_argument, tool_parser

SUFFIXES = dict(onnx='.onnx', **{'torch-export': '.pt2'})


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    parser.add_argument('--format', choices=list(SUFFIXES), default='onnx',
                        help='(default: onnx)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help='of the images, in '
                        'pixels (default: the output size of the test pipeline, or 224 224)')
    add_weights_argument(parser)
    parser.add_argument('--out', help='file to write (default: <config name>_<H>x<W>.onnx or .pt2)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import importlib.util
import json
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from nepa_mm import apis
from nepa_mm.apis.input_spec import class_names, input_of, pixels_of, size_of
from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.loading import load_strict
from nepa_mm.utils.files import atomic_write
from nepa_mm.utils.nested import iter_dicts

TOLERANCE = 1e-4


class ConstantRotaryEmbedding(nn.Module):
    """Constant sine and cosine for one grid; replaces the module that computes them."""

    def __init__(self, sin, cos):
        super().__init__()
        self.register_buffer('sin', sin)
        self.register_buffer('cos', cos)

    def forward(self, grid, num_prefix, device):
        return self.sin, self.cos


class TensorMode(nn.Module):
    """Wrap an OpenMMLab model as a function of the image only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        out = self.model(image, mode='tensor')
        return out[0] if isinstance(out, (tuple, list)) and len(out) == 1 else out


def describe(cfg, args):
    """Return [height, width] of the image and the metadata without ``weights``."""
    try:
        images = input_of(cfg)
    except ValueError as error:
        images = None
        print(f'The metadata hold mean, std and channel order only: {error}')
    size = args.size or (size_of(images) if images else None) or [224, 224]
    meta = dict(input_size=size) | (images or pixels_of(cfg))
    names = class_names(cfg, read_checkpoint(args.checkpoint, weights=args.weights)['meta'])
    return size, meta | (dict(classes=names) if names else {})


def build(cfg, args, size):
    """Return the network with a constant rotary embedding, a test batch, and the set of weights."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    for node in iter_dicts(cfg.model):
        node.pop('init_cfg', None)      # the checkpoint has all weights
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
    model = MODELS.build(cfg.model).eval()
    which, _ = load_strict(model, args.checkpoint, weights=args.weights)
    backbone = model.backbone
    image = torch.randn(3, backbone.patch_embed.projection.in_channels, *size)
    _, grid = backbone.embed(image)
    backbone.rope = ConstantRotaryEmbedding(*backbone.rope(grid, backbone.num_extra_tokens, 'cpu'))
    return TensorMode(model).eval(), image, which


def export_onnx(model, image, file, meta):
    """Write the ONNX file; return a function that runs it."""
    program = torch.onnx.export(
        model, (image,), dynamo=True, dynamic_shapes=dict(image={0: torch.export.Dim('batch')}),
        input_names=['image'], output_names=['output'], verbose=False)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in meta.items()})
    program.save(str(file))
    from onnxruntime import InferenceSession
    session = InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'image': x.numpy()})[0])


def export_torch(model, image, file, meta):
    """Write the torch.export file; return a function that runs it."""
    program = torch.export.export(
        model, (image,), dynamic_shapes=dict(image={0: torch.export.Dim('batch')}))
    torch.export.save(program, file, extra_files={'nepa_mm.json': json.dumps(meta)})
    return torch.export.load(file).module()


def export(args):
    """Write the file and compare its output with PyTorch's."""
    if args.format == 'onnx':
        missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime')
                   if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f'ONNX export needs {", ".join(missing)}; '
                             f'run: pip install {" ".join(missing)}')
    cfg = apis.read_config(args.config)
    apis.check_checkpoint(args.checkpoint, 'CHECKPOINT')
    (height, width), meta = describe(cfg, args)
    out = args.out or f'{Path(args.config).stem}_{height}x{width}{SUFFIXES[args.format]}'
    with torch.no_grad(), atomic_write(out) as file:
        model, image, meta['weights'] = build(cfg, args, (height, width))
        if not isinstance(model(image[:1]), torch.Tensor):
            raise ValueError('A model with several outputs cannot be exported; set out_indices '
                             'to a single block.')
        run = (export_onnx if args.format == 'onnx' else export_torch)(
            model, image, file, meta)
        error = 0.
        for batch in (1, 3):
            expected = model(image[:batch])
            found = run(image[:batch].contiguous())
            error = max(error, ((found - expected).abs().max() / expected.abs().max()).item())
        if not error < TOLERANCE:
            raise ValueError(f'The exported network differs from PyTorch by {error:.1e} of the '
                             f'largest value, more than {TOLERANCE}; nothing was written.')
    print(f'Wrote {out}: the {meta["weights"]} weights of {args.checkpoint}, '
          f'image (batch, {image.shape[1]}, {height}, {width}) -> '
          f'{("batch", *expected.shape[1:])}; largest difference from PyTorch '
          f'{error:.1e} of the largest value')


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    with apis.user_errors():
        export(args)


if __name__ == '__main__':
    main()
