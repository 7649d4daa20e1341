"""Save the features of images: one row per image, in a .npz file for NumPy and scikit-learn.

    python tools/extract_features.py FOLDER --checkpoint FILE --out features.npz
    python tools/extract_features.py IMAGE... --model nepa_vit-b --checkpoint FILE
        --out features.npz [--block 7] [--pool mean]

The file holds `features` (N, ...) in fp32, `files`, and how they were made: `checkpoint`,
`weights`, `block`, `pool`. If all images of a single FOLDER lie in its subfolders, these are
classes: `classes` are their names and `labels` (N,) count them from 0. An image that cannot be read
is named and left out, and the exit status is 1.
"""
import os

from nepa_mm_cli import CHECKPOINT_HELP, add_weights_argument, tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('images', nargs='+', metavar='IMAGES',
                        help='image files, folders with all their subfolders, patterns')
    parser.add_argument('--checkpoint', required=True, help=CHECKPOINT_HELP)
    parser.add_argument('--model', help='name of a config of this package or a config file '
                        '(default: what the checkpoint records)')
    parser.add_argument('--out', required=True, help='.npz file to write; must not exist')
    parser.add_argument('--block', type=int, default=-1,
                        help='block whose output is read, from 0 or from the end (default: -1, '
                        'the last, after the final norm)')
    parser.add_argument('--pool', choices=['mean', 'cls', 'last', 'none', 'map'], default='mean',
                        help='mean of the patches (default), class token, last patch, all tokens '
                        '(none) or map of the patches')
    parser.add_argument('--batch-size', type=int, default=32, help='(default: 32)')
    parser.add_argument('--workers', type=int, default=min(4, os.cpu_count() or 1),
                        help='processes that read images, 0 for none (default: %(default)s)')
    add_weights_argument(parser)
    parser.add_argument('--device', help="e.g. 'cpu' or 'cuda:1'; default: a GPU if there is one")
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.utils import ProgressBar
from torch.utils.data import DataLoader, Dataset

import nepa_mm
from nepa_mm import apis
from nepa_mm.checkpoints.io import read_checkpoint
from nepa_mm.checkpoints.loading import weights_kind
from nepa_mm.datasets.images import expand_images
from nepa_mm.utils.errors import UnreadableImageError
from nepa_mm.utils.files import atomic_write
from nepa_mm.utils.outputs import require_new_path
from nepa_mm.utils.signals import shield_workers


class Images(Dataset):
    """Input tensors of files; the error's sentence for one that cannot be read."""

    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            return self.files[index], self.transform(self.files[index])
        except UnreadableImageError as error:
            return self.files[index], str(error)


def classes_of_folder(arguments, files):
    """Return the class of each file, the subfolder of a single folder; None if some have none."""
    if len(arguments) > 1 or not os.path.isdir(arguments[0]):
        return None
    parts = [Path(os.path.relpath(file, arguments[0])).parts for file in files]
    return [part[0] for part in parts] if all(len(part) > 1 for part in parts) else None


def extract(args, model, files):
    """Return the features, the files that they belong to, and the errors of the others."""
    loader = DataLoader(Images(files, model.transform), args.batch_size, collate_fn=list,
                        num_workers=args.workers)
    shield_workers(loader)
    rows, kept, errors = [], [], []
    bar = ProgressBar(len(files), file=sys.stderr)
    for batch in loader:
        good = [(file, image) for file, image in batch if isinstance(image, torch.Tensor)]
        errors += [error for _, error in batch if isinstance(error, str)]
        sizes = {image.shape for _, image in good}
        # images of one size at once, in the order of the files
        for part in ([good] if len(sizes) == 1 else [[one] for one in good]):
            images = torch.stack([image for _, image in part])
            rows.append(nepa_mm.features(model, images, args.block, args.pool).cpu().numpy())
            kept += [file for file, _ in part]
        bar.update(len(batch))
    bar.file.write('\n')
    if len({row.shape[1:] for row in rows}) > 1:
        raise ValueError(f'--pool {args.pool} needs images of one size; the test pipeline of this '
                         'network keeps their sizes different: choose mean, cls or last.')
    return rows, kept, errors


def run(args):
    """Write the file; return the number of images that could not be read."""
    require_new_path(args.out, '--out')
    if Path(args.out).suffix != '.npz':
        raise ValueError(f'--out must end in .npz, got {args.out}.')
    if args.batch_size < 1 or args.workers < 0:
        raise ValueError('--batch-size must be at least 1 and --workers at least 0, got '
                         f'{args.batch_size} and {args.workers}.')
    files = expand_images(args.images)
    names = [args.model] if args.model else []
    model = nepa_mm.load(*names, args.checkpoint, weights=args.weights,
                         device=args.device or get_device())
    if model.transform is None:
        raise ValueError('Without an image transform no file can be read: name a config with a '
                         'test pipeline by --model.')
    count = model.backbone.num_layers
    if not -count <= args.block < count:
        raise ValueError(f'--block must be in [{-count}, {count - 1}] for {count} blocks, got '
                         f'{args.block}.')
    rows, kept, errors = extract(args, model, files)
    for error in errors:
        print(f'warning: {error}', file=sys.stderr)
    if not kept:
        raise ValueError(f'None of the {len(files)} images can be read.')
    which = weights_kind(read_checkpoint(args.checkpoint, 'meta', args.weights), args.weights)
    saved = dict(features=np.concatenate(rows), files=np.array(kept), block=args.block,
                 pool=args.pool, weights=which, checkpoint=str(args.checkpoint))
    classes = classes_of_folder(args.images, kept)
    if classes:
        saved['classes'], saved['labels'] = np.unique(classes, return_inverse=True)
    with atomic_write(args.out) as file, open(file, 'wb') as opened:
        np.savez(opened, **saved)
    print(f'Wrote {args.out}: {args.pool} of block {args.block % count} (of 0 to {count - 1}) for '
          f'{len(kept)} images' + f' in {len(saved.get("classes", ()))} classes' * bool(classes)
          + f', {which} weights of {args.checkpoint}.')
    if errors:
        print(f'{len(errors)} of {len(files)} images cannot be read; see the warnings.',
              file=sys.stderr)
    return len(errors)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    with apis.user_errors():
        failed = run(args)
    if failed:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
