"""Resize ImageNet once, so that training decodes fewer pixels in every epoch.

    python tools/dataset_converters/resize_imagenet.py data/imagenet data/imagenet256
        [--short-side 256]

Keeps folders and names. A second call resumes an interrupted one. Unreadable images are listed in
TARGET/unreadable.txt. Other files are not copied. Resized images are written as LoadImageWithPillow
reads them: upright, 8-bit colour or grey, the high byte of 16-bit grey, without transparency.
Images that are small enough are copied unchanged.
"""
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

from nepa_mm_cli import tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('source', type=Path, help='folder with images, nested or not')
    parser.add_argument('target', type=Path, help='where resized images go')
    parser.add_argument('--short-side', type=int, default=256, help='in pixels (default: 256)')
    parser.add_argument('--quality', type=int, default=95, help='of the JPEGs, 1 to 95 '
                        '(default: 95)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

from mmengine.utils import ProgressBar

from nepa_mm import apis
from nepa_mm.datasets.images import expand_images
from nepa_mm.datasets.resize import resize_image
from nepa_mm.utils.outputs import claim_folder


def check(args):
    """Reject invalid arguments, and a target made with other settings."""
    if not args.source.is_dir():
        raise FileNotFoundError(f'There is no folder {args.source}.')
    if args.target.resolve().is_relative_to(args.source.resolve()):
        raise ValueError(f'{args.target} is inside {args.source}; give a target outside.')
    if args.short_side < 1 or args.workers < 1 or not 1 <= args.quality <= 95:
        raise ValueError('--short-side and --workers must be positive and --quality 1 to 95, got '
                         f'{args.short_side}, {args.workers} and {args.quality}.')
    settings = json.dumps(dict(short_side=args.short_side, quality=args.quality))
    claim_folder(args.target, 'resize.json')
    note = args.target / 'resize.json'
    before = note.read_text()
    if before not in ('', settings):
        raise ValueError(f'{args.target} holds images made with {before}, not {settings}; '
                         'give another target.')
    note.write_text(settings)


def resize_one(path, args):
    """Resize one image; return path and error if it cannot be read, else None."""
    try:
        resize_image(args.source / path, args.target / path, args.short_side, args.quality)
    except (OSError, ValueError, SyntaxError) as error:     # Pillow raises these on corrupt files
        return f'{path}: {error}'


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line); return unreadable images."""
    args = parse_args(argv)
    with apis.user_errors():
        check(args)
        images = [Path(image).relative_to(args.source) for image in expand_images([args.source])]
    todo = [path for path in images if not (args.target / path).exists()]
    print(f'{len(images)} images, {len(images) - len(todo)} of them already resized')
    unreadable = []
    if todo:
        bar = ProgressBar(len(todo))
        with multiprocessing.Pool(args.workers) as pool:
            for problem in pool.imap_unordered(partial(resize_one, args=args), todo, chunksize=16):
                unreadable += [problem] if problem else []
                bar.update()
        print()
    (args.target / 'unreadable.txt').write_text(''.join(f'{line}\n' for line in sorted(unreadable)))
    print(f'{len(images) - len(unreadable)} images in {args.target}, {len(unreadable)} unreadable'
          + (', listed in unreadable.txt' if unreadable else ''))
    return sorted(unreadable)


if __name__ == '__main__':
    main()
