"""Reduce a checkpoint for publication: weights only, named by date and hash.

    python tools/model_converters/publish_model.py work_dirs/nepa_vit-b/epoch_1600.pth nepa_vit-b
        [--weights raw]
    python tools/model_converters/publish_model.py CHECKPOINT FOLDER --to hf [--license apache-2.0]

Writes nepa_vit-b_{YYYYMMDD}-{first 8 characters of the SHA-256}.safetensors. Keeps the model
config, the input spec, the class names and the name of the set of weights. Drops optimizer,
schedules, message hub and the other set of weights.

--to hf writes a new folder in the authors' format instead, to be uploaded to the Hugging Face Hub:
config.json, model.safetensors, preprocessor_config.json and README.md. The README is a model card
with what the checkpoint records. Read it before you upload it. Segmentors have no such format.
"""
from nepa_mm_cli import add_weights_argument, tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file of a run')
    parser.add_argument('out_prefix', help='path and name of the file, without date and suffix; '
                        'with --to hf the folder')
    parser.add_argument('--to', choices=['mm', 'hf'], default='mm',
                        help='a .safetensors file of ours (default), or a folder for the Hub')
    parser.add_argument('--config', help='with --to hf: config of CHECKPOINT (default: the '
                        'one that it records)')
    parser.add_argument('--license', help='with --to hf: licence in the model card, e.g. '
                        'apache-2.0, as the Hub names it (default: unknown)')
    add_weights_argument(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import datetime
import re
from pathlib import Path

from nepa_mm import apis
from nepa_mm.apis.huggingface_folder import write_folder
from nepa_mm.apis.input_spec import input_of
from nepa_mm.checkpoints.hub import sha256
from nepa_mm.checkpoints.io import read_checkpoint, save_weights
from nepa_mm.checkpoints.loading import select_weights, weights_kind
from nepa_mm.checkpoints.recorded_config import recorded_config


def publish_folder(args):
    """Write the folder and return its path."""
    if args.license and not re.fullmatch(r'[a-z0-9.-]+', args.license):
        raise ValueError("--license must be a name of the Hub's, such as apache-2.0, got "
                         f'{args.license!r}.')
    which, files, _ = write_folder(args.checkpoint, args.out_prefix, args.weights, args.config,
                                   card=True, license=args.license or 'unknown')
    print(f'Wrote {", ".join(files)} to {args.out_prefix}: the {which} weights.')
    if not args.license:
        print('The licence in README.md is "unknown"; --license sets it.')
    return args.out_prefix


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
        if args.to == 'hf':
            return publish_folder(args)
        for flag in ('config', 'license'):
            if getattr(args, flag):
                raise ValueError(f'--{flag} needs --to hf.')
        return publish(args)


if __name__ == '__main__':
    main()
