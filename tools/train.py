"""Pretrain, fine-tune or train a segmentor, as the config defines.

    python tools/train.py CONFIG [--work-dir DIR] [--cfg-options key=value ...]
    tools/dist_train.sh CONFIG GPUS [the same flags]
"""
from nepa_mm_cli import add_cfg_options, parse_with_launcher, tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='where logs and checkpoints go (default: work_dirs/<config name>)')
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        '--resume', nargs='?', const='auto', metavar='PATH',
        help='resume from this checkpoint; without PATH, or with "auto", from the newest one in '
        'the work dir, or start anew if it has none (the default of our configs)')
    start.add_argument(
        '--no-resume', dest='resume', action='store_false',
        help='start anew even if the work dir holds checkpoints')
    parser.add_argument(
        '--amp', action='store_true', help='bf16 autocast, with fp32 weights and no loss scaler')
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate during training')
    parser.add_argument(
        '--auto-scale-lr', action='store_true',
        help='lr x (processes x batch_size x accumulative_counts) / auto_scale_lr.base_batch_size')
    add_cfg_options(parser)
    parser.set_defaults(resume=None)
    return parse_with_launcher(parser, argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

from nepa_mm import apis  # registers the `mmseg::` and `nepa_mm::` config scopes

TTA = ('tta_model', 'tta_pipeline')


def merge_args(cfg, args):
    """Apply the flags of this tool to the config."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        cfg.optim_wrapper.type = 'BF16OptimWrapper'
        for key in ('loss_scale', 'dtype'):     # arguments of an AmpOptimWrapper in the config
            cfg.optim_wrapper.pop(key, None)
    if args.auto_scale_lr:
        cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or {}, enable=True)
    apis.resolve_resume(cfg, args.resume)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line) and return the Runner."""
    args = parse_args(argv)
    with apis.user_errors() as start:
        cfg = apis.load_config(
            args.config, args.cfg_options, args.work_dir, args.launcher,
            unread=dict.fromkeys(TTA, 'only tools/test.py --tta reads it'))
        merge_args(cfg, args)
        apis.check_data(cfg, 'train_dataloader', 'val_dataloader')
        apis.check_channels(cfg, 'train_dataloader', 'val_dataloader')
        runner = apis.start_runner(cfg, start, 'train')
        runner.train()
    return runner


if __name__ == '__main__':
    main()
