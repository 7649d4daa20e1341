"""Make a checkpoint fit for giving away: weights only, named by date and hash.

    python tools/model_converters/publish_model.py work_dirs/nepa_vit-b/epoch_1600.pth nepa_vit-b
        [--weights raw]

writes nepa_vit-b_{YYYYMMDD}-{first 8 characters of the SHA-256}.safetensors. Optimizer,
schedules, message hub and the other set of weights stay behind; the config of the model, how
images become its input, the class names and which weights these are go along.
"""
import argparse
import datetime
from pathlib import Path

from nepa_mm import apis
from nepa_mm.apis.input_spec import input_of
from nepa_mm.checkpoints.hub import sha256
from nepa_mm.checkpoints.io import read_checkpoint, save_weights
from nepa_mm.checkpoints.loading import add_weights_argument, select_weights, which_weights
from nepa_mm.checkpoints.recorded import recorded_config


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='checkpoint file of a run')
    parser.add_argument('out_prefix', help='path and name of the file, without date and suffix')
    add_weights_argument(parser)
    return parser.parse_args(argv)


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
        except ValueError as error:     # the weights are worth giving away all the same
            print(f'how images become its input is not recorded: {error}')
    kept = {key: value for key, value in kept.items() if value is not None}
    which = which_weights(checkpoint, args.weights)
    draft = Path(f'{args.out_prefix}_draft.safetensors')
    save_weights(state_dict, draft, weights=dict(state_dict=which), **kept)
    final = f'{args.out_prefix}_{datetime.date.today():%Y%m%d}-{sha256(draft)[:8]}.safetensors'
    draft.rename(final)     # the content names it: what may be there already is the same
    print(f'wrote {final}: the {which} weights, {len(state_dict)} tensors')
    return final


def main(argv=None):
    args = parse_args(argv)
    with apis.user_errors():
        return publish(args)


if __name__ == '__main__':
    main()
