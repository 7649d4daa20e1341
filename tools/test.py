"""Evaluate a checkpoint: top-1 and top-5 of a classifier, mIoU of a segmentor.

    python tools/test.py CONFIG CHECKPOINT [--tta] [--show-dir DIR] [--out FILE]
    tools/dist_test.sh CONFIG CHECKPOINT GPUS [the same flags]
"""
import argparse
import os
from copy import deepcopy

import mmengine
from mmengine.config import DictAction
from mmengine.evaluator import DumpResults

from nepa_mm import runtime  # the import makes `mmseg::` and `nepa_mm::` bases resolve
from nepa_mm.channels import check_channels
from nepa_mm.checkpoint import load_all, locate


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint', help='.pth or .safetensors file, folder with published weights, or '
        'hf://owner/name[@revision]')
    parser.add_argument(
        '--work-dir', help='where logs and metrics go (default: work_dirs/<config name>)')
    parser.add_argument(
        '--out', help='save predictions: a .pkl file for classification, a folder of label maps '
        '(.png) for segmentation; with --out-item metrics a .json, .yaml or .pkl file')
    parser.add_argument(
        '--out-item', choices=['metrics', 'pred'], default='pred', help='what --out saves')
    parser.add_argument('--show-dir', help='save pictures of the predictions in this folder')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation: tta_pipeline and tta_model of '
        'the config; without them, flipping for classification')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
        help='override settings of the config, e.g. test_dataloader.batch_size=64; lists as '
        'key="[a,b]" or key=a,b, without blanks')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
        help='what started the processes; the shell scripts beside this file set it')
    parser.add_argument(
        '--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def is_segmentation(cfg):
    return cfg.get('default_scope') == 'mmseg'


def merge_args(cfg, args):
    """Apply the flags that only testing has."""
    if not cfg.get('test_dataloader'):
        raise ValueError(f'{args.config!r} has no test_dataloader, as a pretraining config: test '
                         'a fine-tuned checkpoint with its config under configs/classification '
                         'or configs/segmentation.')
    runtime.check_checkpoint(args.checkpoint, 'CHECKPOINT')
    cfg.load_from, cfg.resume = locate(args.checkpoint), False
    if args.show_dir:
        show_predictions(cfg, args.show_dir)
    if args.tta:
        augment(cfg)
    if args.out and args.out_item == 'pred' and is_segmentation(cfg):
        cfg.test_evaluator.output_dir = args.out


def show_predictions(cfg, show_dir):
    """Let the visualization hook draw every test image into ``show_dir``."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if not hook:
        raise ValueError('--show-dir needs default_hooks.visualization, which the config lacks.')
    if is_segmentation(cfg):
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = show_dir
    else:
        hook.update(enable=True, out_dir=show_dir)
        hook.setdefault('interval', 1)


def augment(cfg):
    """Wrap the model and the pipeline for test-time augmentation."""
    dataset = cfg.test_dataloader.dataset
    if 'tta_pipeline' not in cfg:
        if is_segmentation(cfg):
            raise ValueError('--tta needs a tta_pipeline, which the config lacks.')
        flips = [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)]
        *load, pack = deepcopy(dataset.pipeline)
        cfg.tta_pipeline = [*load, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    if 'tta_model' not in cfg:
        cfg.tta_model = dict(
            type='SegTTAModel' if is_segmentation(cfg) else 'mmpretrain.AverageClsScoreTTA')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line) and return the metrics."""
    args = parse_args(argv)
    with runtime.one_sentence_errors():
        cfg = runtime.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
        merge_args(cfg, args)
        runtime.check_data(cfg, 'test_dataloader')
        check_channels(cfg, 'test_dataloader')
        runner = runtime.build_runner(cfg)
        load_all(runner.model, cfg.load_from)     # the Runner itself would only warn
        if args.out and args.out_item == 'pred' and not is_segmentation(cfg):
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.out and args.out_item == 'metrics' and runner.rank == 0:
        mmengine.dump(metrics, args.out)
    return metrics


if __name__ == '__main__':
    main()
