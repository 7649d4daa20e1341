"""Write scenes of handwritten digits on textured backgrounds, in ADE20K's folder layout.

    python demo/make_digit_scenes.py [--out data/digit_scenes] [--train 100] [--val 100] [--seed 0]

This is the data of configs/demo/digits_upernet.py; see :func:`digit_scene` for the labels.
"""
from common import scene_parser


def parse_args(argv=None):
    return scene_parser(__doc__, 'data/digit_scenes').parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

from pathlib import Path

import numpy as np
from PIL import Image

from nepa_mm.apis import user_errors
from nepa_mm.datasets.digits import SPLITS, Digits
from nepa_mm.utils.outputs import claim_folder

SCENE = 32              # side of a scene in pixels: 2 x 2 cells with a digit each
DIGIT = (15, 16)        # smallest and largest side of a digit in pixels
EDGE = (0.25, 0.4)      # opacity: background below, object above, unlabelled between
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))      # row and column of the cells


def texture(rng, side, channels=3):
    """Draw a dark background of random coarseness: (side, side, channels), floats from 0 to 60."""
    cells = rng.integers(4, 17)
    pixels = rng.integers(0, 61, (cells, cells, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze()).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(side, side, channels).astype(np.float64)


def resize(pixels, side):
    """Resize grey pixels (h, w), uint8, to a square; return floats from 0 to 1."""
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64) / 255


def paste(image, label, place, opacity, colour, category):
    """Blend an object into a scene and into its labels, in place.

    Args:
        image (ndarray): The scene (height, width, channels), floats from 0 to 255.
        label (ndarray): Its labels (height, width), uint8; 0 is unlabelled.
        place (tuple[slice, slice]): Rows and columns of the object.
        opacity (ndarray): (h, w), from 0 to 1. Between the two values of ``EDGE`` pixels become
            unlabelled, above them they get the label ``category``.
        colour (ndarray | float): Of the object, from 0 to 255; broadcast to (h, w, channels).
        category (int): The label.
    """
    image[place] += opacity[..., None] * (colour - image[place])
    label[place][opacity >= EDGE[0]] = 0
    label[place][opacity >= EDGE[1]] = category


def digit_scene(rng, digits):
    """Draw four digits on a textured background.

    Args:
        rng (numpy.random.Generator): Source of all randomness.
        digits (list[dict]): Samples of :class:`Digits`.

    Returns:
        tuple[ndarray, ndarray]: Image (32, 32, 3) and labels (32, 32), both uint8. As in ADE20K, 0
        is unlabelled; 1 is background, 2 to 11 are the digits 0 to 9.
    """
    image, label = texture(rng, SCENE), np.ones((SCENE, SCENE), np.uint8)
    half = SCENE // 2
    for corner in CORNERS:
        digit, side = digits[rng.integers(len(digits))], rng.integers(DIGIT[0], DIGIT[1] + 1)
        top, left = np.multiply(corner, half) + rng.integers(0, half - side + 1, 2)
        place = np.s_[top:top + side, left:left + side]
        paste(image, label, place, resize(digit['img'][..., 0], side), 255, 2 + digit['gt_label'])
    return image.round().astype(np.uint8), label


def write_scenes(folder, draw, load, num_train, num_val, seed):
    """Write scenes in ADE20K's folder layout, a small data set for semantic segmentation.

    Args:
        folder (str | Path): Where ``images/`` and ``annotations/`` go, each with ``training/`` and
            ``validation/``.
        draw (Callable): Draws a scene: an image and its labels, from a random generator and the
            samples of a split.
        load (Callable): Returns the samples of a split, 'train' or 'test'.
        num_train (int): Number of training scenes, from training samples.
        num_val (int): Number of validation scenes, from test samples.
        seed (int): A scene depends on the seed and its own number only.

    Raises:
        FileExistsError: The folder holds other files.
    """
    claim_folder(Path(folder), '.nepa_mm_scenes')
    for split, part, num in (('train', 'training', num_train), ('test', 'validation', num_val)):
        images, labels = (Path(folder) / kind / part for kind in ('images', 'annotations'))
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        samples = load(split)
        for i in range(num):
            rng = np.random.default_rng((seed, SPLITS.index(split), i))
            image, label = draw(rng, samples)
            Image.fromarray(image).save(images / f'{i:05d}.jpg', quality=95, subsampling=0)
            Image.fromarray(label).save(labels / f'{i:05d}.png')


def write_digit_scenes(folder, num_train=100, num_val=100, seed=0):
    """Write scenes of digits; see :func:`write_scenes` for arguments and errors."""
    write_scenes(folder, digit_scene, lambda split: Digits(split, pipeline=[]).load_data_list(),
                 num_train, num_val, seed)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    with user_errors():
        write_digit_scenes(args.out, args.train, args.val, args.seed)
    print(f'Wrote {args.train} + {args.val} scenes to {args.out}.')


if __name__ == '__main__':
    main()
