"""Evaluate a checkpoint: top-1 and top-5 of a classifier, mIoU of a segmentor.

    python tools/test.py CONFIG CHECKPOINT [--tta] [--show-dir DIR] [--out FILE]
    tools/dist_test.sh CONFIG CHECKPOINT GPUS [the same flags]

Tests one set of weights: the EMA weights if the checkpoint has them, else the raw ones. Metrics,
saved predictions and images all use that set. --weights raw selects the raw weights.
"""
from nepa_mm_cli import (
    CHECKPOINT_HELP,
    add_cfg_options,
    add_weights_argument,
    parse_with_launcher,
    tool_parser,
)


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    add_weights_argument(parser)
    parser.add_argument(
        '--work-dir', help='where logs and metrics go (default: work_dirs/<config name>)')
    parser.add_argument(
        '--out', help='save predictions: a .pkl file for classification, a folder of label maps '
        '(.png) for segmentation; with --out-item metrics a .json, .yaml or .pkl file; must '
        'be new')
    parser.add_argument(
        '--out-item', choices=['metrics', 'pred'], default='pred', help='what --out saves')
    parser.add_argument('--show-dir', help='save images of the predictions in this folder; '
                        'existing files are kept')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation: tta_pipeline and tta_model of '
        'the config; without them, flipping for classification')
    add_cfg_options(parser)
    return parse_with_launcher(parser, argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

from copy import deepcopy
from pathlib import Path

import mmengine
from mmengine.evaluator import DumpResults
from mmengine.hooks import EMAHook

from nepa_mm import apis  # registers the `mmseg::` and `nepa_mm::` config scopes
from nepa_mm.apis.run_check import RunCheckHook
from nepa_mm.checkpoints.io import locate
from nepa_mm.checkpoints.loading import load_strict
from nepa_mm.utils.outputs import require_new_path
from nepa_mm.visualization.predictions import SeenImageHook, segmentation_hook


def unread_keys(args):
    """Return the config keys that this tool ignores, with the reasons."""
    keys = dict(load_from='CHECKPOINT names the weights', resume='nothing is trained')
    if not args.tta:
        keys.update(dict.fromkeys(('tta_model', 'tta_pipeline'), 'give --tta, too'))
    return keys


def merge_args(cfg, args):
    """Apply the flags of this tool to the config."""
    if not cfg.get('test_dataloader'):
        raise ValueError(f'{args.config!r} has no test_dataloader, like pretraining configs: '
                         'test a fine-tuned checkpoint with its config in configs/classification '
                         'or configs/segmentation.')
    apis.check_checkpoint(args.checkpoint, 'CHECKPOINT')
    cfg.load_from, cfg.resume = locate(args.checkpoint, args.weights), False
    if args.out:
        require_new_path(args.out, '--out')
    if args.show_dir:
        if args.out and Path(args.out).resolve() == Path(args.show_dir).resolve():
            raise ValueError(f'--out and --show-dir are both {args.out}; name two folders.')
        show_predictions(cfg, args.show_dir)
    if args.tta:
        augment(cfg)
    if args.out and args.out_item == 'pred' and apis.is_segmentation(cfg):
        cfg.test_evaluator.output_dir = args.out


def show_predictions(cfg, show_dir):
    """Make the visualization hook draw every test image into ``show_dir``."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if not hook:
        raise ValueError('--show-dir needs default_hooks.visualization, which the config lacks.')
    if apis.is_segmentation(cfg):
        kind = segmentation_hook(apis.color_type(cfg, 'test_dataloader'), show_dir)
        hook.update(type=kind, draw=True, interval=1)
    else:
        hook.update(type=SeenImageHook.__name__, enable=True, out_dir=show_dir)
        hook.setdefault('interval', 1)


def augment(cfg):
    """Wrap the model and the pipeline for test-time augmentation."""
    dataset = cfg.test_dataloader.dataset
    if 'tta_pipeline' not in cfg:
        if apis.is_segmentation(cfg):
            raise ValueError('--tta needs a tta_pipeline, which the config lacks.')
        flips = [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)]
        *load, pack = deepcopy(dataset.pipeline)
        cfg.tta_pipeline = [*load, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    if 'tta_model' not in cfg:
        cfg.tta_model = dict(
            type='SegTTAModel' if apis.is_segmentation(cfg) else 'mmpretrain.AverageClsScoreTTA')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)


class NamedResults(DumpResults):
    """Dump predictions together with the set of weights that made them."""

    def __init__(self, weights, **kwargs):
        super().__init__(**kwargs)
        self.weights = weights

    def compute_metrics(self, results):
        return super().compute_metrics([dict(sample, weights=self.weights) for sample in results])


def load(runner, cfg, weights):
    """Load the weights; afterwards no hook changes them and the Runner loads no others."""
    which, meta = load_strict(runner.model, cfg.load_from, weights=weights)
    run_check, = [hook for hook in runner.hooks if isinstance(hook, RunCheckHook)]
    run_check.note_classes(meta, cfg.load_from)
    runner.hooks[:] = [hook for hook in runner.hooks if not isinstance(hook, EMAHook)]
    runner._has_loaded = True
    runner.logger.info(f'Testing the {which} weights of {cfg.load_from}.')
    return which


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line) and return the metrics."""
    args = parse_args(argv)
    with apis.user_errors() as start:
        cfg = apis.load_config(
            args.config, args.cfg_options, args.work_dir, args.launcher, unread=unread_keys(args))
        merge_args(cfg, args)
        apis.check_data(cfg, 'test_dataloader')
        apis.check_channels(cfg, 'test_dataloader')
        runner = apis.start_runner(cfg, start, 'test')
        which = load(runner, cfg, args.weights)
        if args.out and args.out_item == 'pred' and not apis.is_segmentation(cfg):
            runner.test_evaluator.metrics.append(NamedResults(which, out_file_path=args.out))
        metrics = runner.test()
    if runner.rank == 0:
        if args.out and args.out_item == 'metrics':
            mmengine.dump(dict(metrics, weights=which), args.out)
        print(f'{which} weights of {args.checkpoint}: '
              + ', '.join(f'{name} {value}' for name, value in metrics.items()))
    return metrics


if __name__ == '__main__':
    main()
