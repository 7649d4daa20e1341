"""Export a network for one image size and any batch size: ONNX, or torch.export.

    python tools/export.py CONFIG CHECKPOINT --format onnx --size 224 224 [--out FILE]

The rotary embedding becomes a constant. The input, `image`, is (batch, channels, height, width),
normalised as the data preprocessor of the config does: (pixel - 127.5) / 127.5. The output,
`output`, is what the model returns in mode 'tensor': logits of a classifier, score maps of a
segmentor at the resolution of its decode head, features of a pretraining model. The file is
written only if it agrees with PyTorch within 1e-4 of the largest value, for several batch sizes.
"""
import argparse
import importlib.util
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from nepa_mm import runtime
from nepa_mm.checkpoint import load_all, written_whole

TOLERANCE = 1e-4
SUFFIXES = dict(onnx='.onnx', **{'torch-export': '.pt2'})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='.pth or .safetensors file, folder with published '
                        'weights, or hf://owner/name[@revision]')
    parser.add_argument('--format', choices=list(SUFFIXES), default='onnx')
    parser.add_argument('--size', type=int, nargs=2, default=[224, 224], metavar=('H', 'W'),
                        help='of the images, in pixels (default: 224 224)')
    parser.add_argument('--out', help='the file; default: <config name>_<H>x<W>.onnx or .pt2')
    return parser.parse_args(argv)


class ConstantRotaryEmbedding(nn.Module):
    """Sine and cosine for one grid, in place of the module that computes them."""

    def __init__(self, sin, cos):
        super().__init__()
        self.register_buffer('sin', sin)
        self.register_buffer('cos', cos)

    def forward(self, grid, num_prefix, device):
        return self.sin, self.cos


class TensorMode(nn.Module):
    """A model of OpenMMLab as a function of the image alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        out = self.model(image, mode='tensor')
        return out[0] if isinstance(out, (tuple, list)) and len(out) == 1 else out


def build(args):
    """The network with its weights, its rotary embedding fixed for one size, and an image."""
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    for node in runtime.dicts(cfg.model):
        node.pop('init_cfg', None)      # the checkpoint has all of it
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
    model = MODELS.build(cfg.model).eval()
    runtime.check_checkpoint(args.checkpoint, 'CHECKPOINT')
    load_all(model, args.checkpoint)
    backbone = model.backbone
    image = torch.randn(3, backbone.patch_embed.projection.in_channels, *args.size)
    _, grid = backbone.embed(image)
    backbone.rope = ConstantRotaryEmbedding(*backbone.rope(grid, backbone.num_extra_tokens, 'cpu'))
    return TensorMode(model).eval(), image


def export_onnx(model, image, file):
    """Write the ONNX file; return how to run it."""
    program = torch.onnx.export(
        model, (image,), dynamo=True, dynamic_shapes=dict(image={0: torch.export.Dim('batch')}),
        input_names=['image'], output_names=['output'], verbose=False)
    program.save(str(file))
    from onnxruntime import InferenceSession
    session = InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'image': x.numpy()})[0])


def export_torch(model, image, file):
    """Write the torch.export file; return how to run it."""
    program = torch.export.export(
        model, (image,), dynamic_shapes=dict(image={0: torch.export.Dim('batch')}))
    torch.export.save(program, file)
    return torch.export.load(file).module()


def export(args):
    if args.format == 'onnx':
        missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime')
                   if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f'ONNX export needs {", ".join(missing)}, not installed here; '
                             f'type: pip install {" ".join(missing)}')
    height, width = args.size
    out = args.out or f'{Path(args.config).stem}_{height}x{width}{SUFFIXES[args.format]}'
    with torch.no_grad(), written_whole(out) as file:
        model, image = build(args)
        if not isinstance(model(image[:1]), torch.Tensor):
            raise ValueError('A model with several outputs cannot be exported; give out_indices '
                             'a single block.')
        run = (export_onnx if args.format == 'onnx' else export_torch)(model, image, file)
        error = 0.
        for batch in (1, 3):
            expected = model(image[:batch])
            found = run(image[:batch].contiguous())
            error = max(error, ((found - expected).abs().max() / expected.abs().max()).item())
        if not error < TOLERANCE:
            raise ValueError(f'The exported network differs from PyTorch by {error:.1e} of the '
                             f'largest value, more than {TOLERANCE}; nothing was written.')
    print(f'wrote {out}: image (batch, {image.shape[1]}, {height}, {width}) -> '
          f'{("batch", *expected.shape[1:])}; largest difference from PyTorch {error:.1e} of the '
          'largest value')


def main(argv=None):
    args = parse_args(argv)
    with runtime.one_sentence_errors():
        export(args)


if __name__ == '__main__':
    main()
