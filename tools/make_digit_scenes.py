"""Write scenes of handwritten digits on textured backgrounds, in ADE20K's folder layout.

    python tools/make_digit_scenes.py [--out data/digit_scenes] [--train 100] [--val 100] [--seed 0]

The data of configs/demo/digits_upernet.py; see nepa_mm.datasets.digit_scene for the labels.
"""
import argparse

from nepa_mm.datasets import write_digit_scenes
from nepa_mm.errors import one_sentence_errors


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data/digit_scenes', help='the folder')
    parser.add_argument('--train', type=int, default=100, help='training scenes (default: 100)')
    parser.add_argument('--val', type=int, default=100, help='validation scenes (default: 100)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    with one_sentence_errors():
        write_digit_scenes(args.out, args.train, args.val, args.seed)
    print(f'wrote {args.train} + {args.val} scenes into {args.out}')


if __name__ == '__main__':
    main()
