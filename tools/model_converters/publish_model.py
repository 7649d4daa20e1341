"""Reduce a checkpoint for publication: weights only, named by date and hash.

    python tools/model_converters/publish_model.py work_dirs/nepa_vit-b/epoch_1600.pth nepa_vit-b
        [--weights raw]

Writes nepa_vit-b_{YYYYMMDD}-{first 8 characters of the SHA-256}.safetensors. Keeps the model
config, the input spec, the class names and the name of the set of weights. Drops optimizer,
schedules, message hub and the other set of weights.
"""
from nepa_mm_cli import add_weights_argument, tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file of a run')
    parser.add_argument('out_prefix', help='path and name of the file, without date and suffix')
    add_weights_argument(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import datetime
from pathlib import Path

from nepa_mm import apis
from nepa_mm.apis.input_spec import input_of
from nepa_mm.checkpoints.hub import sha256
from nepa_mm.checkpoints.io import read_checkpoint, save_weights
from nepa_mm.checkpoints.loading import select_weights, weights_kind
from nepa_mm.checkpoints.recorded_config import recorded_config


def publish(args):
    """Write the file and return its path."""
    checkpoint = read_checkpoint(args.checkpoint)
    state_dict = select_weights(checkpoint, args.weights, args.checkpoint)
    meta = checkpoint['meta']
    kept = {key: meta[key] for key in ('dataset_meta', 'epoch', 'iter') if key in meta}
    config = recorded_config(meta, args.checkpoint)
    if 'model' in config:
        kept['model'] = config['model']
        try:
            kept['input'] = input_of(config)
        except ValueError as error:     # the weights are useful without it
            print(f'The input spec is not recorded: {error}')
    kept = {key: value for key, value in kept.items() if value is not None}
    which = weights_kind(checkpoint, args.weights)
    draft = Path(f'{args.out_prefix}_draft.safetensors')
    save_weights(state_dict, draft, weights=dict(state_dict=which), **kept)
    final = f'{args.out_prefix}_{datetime.date.today():%Y%m%d}-{sha256(draft)[:8]}.safetensors'
    draft.rename(final)     # the hash is in the name: an existing file has the same content
    print(f'Wrote {final}: the {which} weights, {len(state_dict)} tensors.')
    return final


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line) and return the path."""
    args = parse_args(argv)
    with apis.user_errors():
        return publish(args)


if __name__ == '__main__':
    main()
