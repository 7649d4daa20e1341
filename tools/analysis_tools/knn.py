"""Measure the k-NN accuracy of a checkpoint's frozen features on a classification config.

    python tools/analysis_tools/knn.py CONFIG CHECKPOINT [--feature avg_featmap] [--block -1]
        [--weights ema]

Neighbours come from the config's train_dataloader with its test pipeline; the images of its
test_dataloader are classified. The result names the feature, because figures for NEPA depend on it.
The config sets the attention: for a pretraining checkpoint use a causal config such as
configs/classification/nepa_vit-b_linear_in1k.py.
"""
from nepa_mm_cli import add_cfg_options, add_weights_argument, tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('config', help='config with train_dataloader and test_dataloader')
    parser.add_argument('checkpoint', help='pretraining or fine-tuned checkpoint')
    parser.add_argument('--feature', choices=['avg_featmap', 'last_token', 'cls_token'],
                        default='avg_featmap',
                        help='mean of the patches (default), last patch or class token')
    parser.add_argument('--block', type=int, default=-1,
                        help='block whose output is read, from 0 or from the end (default: -1, '
                        'the last, after the final norm)')
    parser.add_argument('-k', type=int, default=20, help='neighbours (default: 20)')
    parser.add_argument('--temperature', type=float, default=0.07, help='(default: 0.07)')
    add_weights_argument(parser)
    add_cfg_options(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from nepa_mm import apis
from nepa_mm.checkpoints.loading import load_strict
from nepa_mm.datasets.classes import align_datasets, skipped_images
from nepa_mm.datasets.pipelines import use_one_reader
from nepa_mm.evaluation.frozen_features import knn_accuracy

READS = ('model', 'train_dataloader', 'test_dataloader', 'default_scope', 'custom_imports')
UNREAD = {
    'model.backbone.init_cfg': 'CHECKPOINT names the weights',
    **{f'{name}_dataloader.drop_last': 'all images are used' for name in ('train', 'test')},
    'train_dataloader.sampler': 'images are read once, in order',
    **{f'train_dataloader.{key}': f'set test_dataloader.{key}, which is used for both'
       for key in ('dataset.pipeline', 'batch_size')}}


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line) and return the accuracies."""
    args = parse_args(argv)
    with apis.user_errors():
        cfg = apis.load_config(args.config, args.cfg_options, reads=READS, unread=UNREAD)
        if not (cfg.get('train_dataloader') and cfg.get('test_dataloader')):
            raise ValueError(f'{args.config!r} has no labelled train_dataloader and '
                             'test_dataloader; use a config of configs/classification.')
        apis.check_checkpoint(args.checkpoint, 'CHECKPOINT')
        apis.check_data(cfg, 'train_dataloader', 'test_dataloader')
        apis.check_channels(cfg, 'train_dataloader', 'test_dataloader')
        cfg.train_dataloader.dataset.pipeline = cfg.test_dataloader.dataset.pipeline
        cfg.train_dataloader.batch_size = cfg.test_dataloader.batch_size
        cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
        cfg.model.backbone.update(init_cfg=None, fc_norm=False)     # k-NN does not use it
        for name in ('train_dataloader', 'test_dataloader'):
            cfg[name].drop_last = False
        apis.fill_dataloaders(cfg)
        init_default_scope(cfg.get('default_scope', 'mmpretrain'))
        model = MODELS.build(cfg.model).to(get_device())
        which, _ = load_strict(model.backbone, args.checkpoint, prefix='backbone.',
                            weights=args.weights)
        bank, queries = (Runner.build_dataloader(cfg[name])
                         for name in ('train_dataloader', 'test_dataloader'))
        args.k = min(args.k, len(bank.dataset))
        for loader in (bank, queries):
            use_one_reader(loader.dataset, model)
        for message in [*align_datasets(queries.dataset, 'test_dataloader', bank.dataset,
                                        'train_dataloader'),
                        *skipped_images(bank.dataset, 'train_dataloader'),
                        *skipped_images(queries.dataset, 'test_dataloader')]:
            print(f'warning: {message}')
        accuracy = knn_accuracy(model, bank, queries, feature=args.feature, block=args.block,
                                k=args.k, temperature=args.temperature)
    last = model.backbone.num_layers - 1
    print(f'{args.k}-NN on {args.feature} of block {args.block % (last + 1)} (of 0 to {last}), '
          f'{which} weights of {args.checkpoint}: '
          + ', '.join(f'{name} {value:.2f} %' for name, value in accuracy.items()))
    return accuracy


if __name__ == '__main__':
    main()
