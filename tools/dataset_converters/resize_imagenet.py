"""Store ImageNet at a smaller size once, so that training decodes fewer pixels in every epoch.

    python tools/dataset_converters/resize_imagenet.py data/imagenet data/imagenet256
        [--short-side 256]

Folders and names stay. A second call goes on where the first one was stopped. Images that cannot
be read are listed in TARGET/unreadable.txt. Other files are not copied. What is resized is written
as LoadImageWithPillow reads it: upright, 8-bit colour or grey, 16-bit grey by its high byte,
without transparency. Images that are small enough are copied as they are.
"""
import argparse
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

from mmengine.utils import ProgressBar

from nepa_mm import apis
from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.datasets.resize import resize_image
from nepa_mm.utils.outputs import own_folder


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder with images, in folders at will')
    parser.add_argument('target', type=Path, help='where the smaller ones go')
    parser.add_argument('--short-side', type=int, default=256, help='in pixels')
    parser.add_argument('--quality', type=int, default=95, help='of the JPEGs, 1 to 95')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    return parser.parse_args(argv)


def check(args):
    """Refuse what cannot work, and a target that has images of another size."""
    if not args.source.is_dir():
        raise FileNotFoundError(f'There is no folder {args.source}.')
    if args.target.resolve().is_relative_to(args.source.resolve()):
        raise ValueError(f'{args.target} is within {args.source}; give a target outside.')
    if args.short_side < 1 or args.workers < 1 or not 1 <= args.quality <= 95:
        raise ValueError('--short-side and --workers must be positive and --quality 1 to 95, got '
                         f'{args.short_side}, {args.workers} and {args.quality}.')
    settings = json.dumps(dict(short_side=args.short_side, quality=args.quality))
    own_folder(args.target, 'resize.json')
    note = args.target / 'resize.json'
    before = note.read_text()
    if before not in ('', settings):
        raise ValueError(f'{args.target} holds images made with {before}, not {settings}; '
                         'give another target.')
    note.write_text(settings)


def find_images(source):
    """Paths of all images, relative to ``source``, in order."""
    images = [Path(folder, file).relative_to(source)
              for folder, _, files in os.walk(source, followlinks=True)
              for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise FileNotFoundError(f'{source} holds no image.')
    return sorted(images)


def resize_one(path, args):
    """Path and error of an image that cannot be read, or None."""
    try:
        resize_image(args.source / path, args.target / path, args.short_side, args.quality)
    except (OSError, ValueError, SyntaxError) as error:     # what Pillow raises on broken files
        return f'{path}: {error}'


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line); return what was unreadable."""
    args = parse_args(argv)
    with apis.user_errors():
        check(args)
        images = find_images(args.source)
    todo = [path for path in images if not (args.target / path).exists()]
    print(f'{len(images)} images, {len(images) - len(todo)} of them done before')
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
