"""Write scenes of clothes on textured backgrounds, in ADE20K's folder layout.

    python demo/make_garment_scenes.py [--out data/garment_scenes] [--train 100] [--val 100]
                                       [--seed 0] [--data data/fashion_mnist]

The clothes are those of Fashion-MNIST. This is the data of fashion_upernet.py and
fashion_segment_linear.py in configs/fashion_mnist; see :func:`garment_scene` for the labels.
"""
from common import scene_parser


def parse_args(argv=None):
    parser = scene_parser(__doc__, 'data/garment_scenes')
    parser.add_argument('--data', default='data/fashion_mnist',
                        help='folder of the four files of Fashion-MNIST, which are downloaded if '
                             'missing (default: data/fashion_mnist)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import numpy as np

from make_digit_scenes import CORNERS, paste, resize, texture, write_scenes
from nepa_mm.apis import user_errors
from nepa_mm.datasets import FashionMNISTSubset

SCENE = 56              # side of a scene in pixels: 2 x 2 cells with a garment each
GARMENT = (20, 28)      # smallest and largest side of a garment's image in pixels
OVERLAP = 2             # pixels by which it may leave its cell
OPAQUE = 0.2            # brightness from which a garment's pixel hides what is behind it


def garment_scene(rng, garments):
    """Draw four garments, some of them mirrored, on a textured background.

    Args:
        rng (numpy.random.Generator): Source of all randomness.
        garments (list[dict]): Samples of mmpretrain's FashionMNIST.

    Returns:
        tuple[ndarray, ndarray]: Image and labels, both (56, 56), uint8. As in ADE20K, 0 is
        unlabelled; 1 is background, 2 to 11 are the classes of Fashion-MNIST.
    """
    image, label = texture(rng, SCENE, channels=1), np.ones((SCENE, SCENE), np.uint8)
    for corner in CORNERS:
        garment, side = garments[rng.integers(len(garments))], rng.integers(*GARMENT, endpoint=True)
        pixels = resize(np.asarray(garment['img']), side)
        if rng.integers(2):
            pixels = pixels[:, ::-1]
        margin = SCENE // 2 - side + OVERLAP
        top, left = np.clip(np.multiply(corner, SCENE // 2) + rng.integers(-OVERLAP, margin + 1, 2),
                            0, SCENE - side)
        paste(image, label, np.s_[top:top + side, left:left + side],
              np.minimum(pixels / OPAQUE, 1), 255 * pixels[..., None], 2 + garment['gt_label'])
    return image[..., 0].round().astype(np.uint8), label


def write_garment_scenes(folder, num_train=100, num_val=100, seed=0, data='data/fashion_mnist'):
    """Write scenes of clothes.

    Args:
        folder (str | Path): Where they go, see :func:`write_scenes`, also for its errors.
        num_train (int): Number of training scenes. Defaults to 100.
        num_val (int): Number of validation scenes. Defaults to 100.
        seed (int): A scene depends on the seed and its own number only. Defaults to 0.
        data (str | Path): Folder of Fashion-MNIST. Defaults to 'data/fashion_mnist'.
    """
    def load(split):
        dataset = FashionMNISTSubset(data_root=str(data), split=split, pipeline=[])
        return [dataset.get_data_info(i) for i in range(len(dataset))]

    write_scenes(folder, garment_scene, load, num_train, num_val, seed)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    with user_errors():
        write_garment_scenes(args.out, args.train, args.val, args.seed, args.data)
    print(f'Wrote {args.train} + {args.val} scenes to {args.out}.')


if __name__ == '__main__':
    main()
