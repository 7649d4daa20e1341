"""Pretrain NEPA on handwritten digits, then measure the benefit of the pretraining.

    make demo        or        python demo/digits.py [--work-dir DIR] [--epochs N] [--seeds N]

Uses the same Runner as ImageNet, with the configs in configs/demo. Writes results.md, results.json,
loss.png, prediction.png, segmentation.png and explore.html, a page to explore in a browser. Exits
with status 1 if the pretraining collapsed or did not help.
"""
import common


def parse_args(argv=None):
    return common.parse_args(__doc__, argv, 'demo', 3, 'runs per start and number of labels')


if __name__ == '__main__':
    parse_args()    # before the slow imports

import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path

warnings.filterwarnings('ignore')

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import nepa_mm  # noqa: F401
from common import claim_work_dir, process_pool, train, train_on_few_labels
from make_digit_scenes import write_digit_scenes
from nepa_mm.apis import load_config
from nepa_mm.checkpoints.loading import load_pretrained
from nepa_mm.evaluation.frozen_features import knn_accuracy
from nepa_mm.visualization.html_page import describe_image, write_page
from pictures import plot_predictions, plot_segmentation

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'demo'
LABELS = {100: 80, 300: 30}     # labelled images: epochs of fine-tuning
ITERS = 250                     # training iterations of segmentation
STARTS = ('random', 'pretrained')
LAST_BLOCK = 'k-NN, last block'


class ProgressHook(Hook):
    """Show finished epochs, loss and remaining time in one line."""

    def __init__(self, console, epochs):
        self.bar = Progress(
            TextColumn('pretraining'), BarColumn(), TextColumn('{task.completed}/{task.total}'),
            TextColumn('epochs, loss {task.fields[loss]:+.3f},'), TimeRemainingColumn(),
            TextColumn('left'), console=console)
        self.task = self.bar.add_task('', total=epochs, loss=0.)

    def before_train(self, runner):
        self.bar.start()

    def after_train_epoch(self, runner):
        loss = runner.message_hub.get_scalar('train/loss').mean(len(runner.train_dataloader))
        self.bar.update(self.task, advance=1, loss=loss)
        if not self.bar.console.is_terminal and (runner.epoch + 1) % 10 == 0:
            self.bar.console.print(f'epoch {runner.epoch + 1}: loss {loss:+.3f}')

    def after_train(self, runner):
        self.bar.stop()


def classify(config, labels, start, seed, work_dir, checkpoint):
    """Train with few labels in a separate process; return top-1 in percent."""
    return train_on_few_labels(
        CONFIGS / f'{config}.py', Path(work_dir) / f'{config}_{labels}_{start}_{seed}', labels,
        LABELS[labels], seed, checkpoint if start == 'pretrained' else None)


def segment(config, start, seed, work_dir, checkpoint):
    """Train a segmentor on the scenes; return mIoU in percent."""
    options = {
        'randomness.seed': seed, 'train_cfg.max_iters': ITERS, 'train_cfg.val_interval': ITERS,
        'default_hooks.checkpoint.interval': ITERS,
        **{f'{split}_dataloader.dataset.data_root': str(Path(work_dir) / 'scenes')
           for split in ('train', 'val')}}
    if start == 'random':
        options['model.backbone.init_cfg'] = None
    else:
        options['model.backbone.init_cfg.checkpoint'] = checkpoint
    runner = train(CONFIGS / f'{config}.py', segmentor_dir(config, start, seed, work_dir), options)
    return runner.message_hub.get_scalar('val/mIoU').current()


def segmentor_dir(config, start, seed, work_dir):
    """Return the work directory of a segmentor."""
    return Path(work_dir) / f'{config}_{start}_{seed}'


def compare(jobs, work_dir, checkpoint, seeds):
    """Run jobs from both starts over all seeds, one process per core.

    Args:
        jobs (dict[str, Callable]): Functions of start, seed, ``work_dir`` and ``checkpoint``, by
            name.
        work_dir (str): The demo's work directory.
        checkpoint (str): Checkpoint of the pretraining.
        seeds (int): Runs per job and start.

    Returns:
        dict[str, dict[str, list]]: Results by name and start, one per seed.
    """
    with process_pool() as pool:
        futures = {(name, start): [pool.submit(job, start, seed, work_dir, checkpoint)
                                   for seed in range(seeds)]
                   for name, job in jobs.items() for start in STARTS}
        return {name: {start: [f.result() for f in futures[name, start]] for start in STARTS}
                for name in jobs}


def check(results):
    """Check that the pretraining did not collapse and that it helped.

    One row is not checked. The last block's features are trained to resemble the next embedding
    and are shallow by construction (paper, Table 6).

    Args:
        results (dict): ``loss`` (float, at the end); ``spread`` (float, standard deviation of the
            normalised embeddings times sqrt(D): 1 if they fill the sphere, 0 if they are all
            equal); ``rows`` (accuracies by name and start).

    Returns:
        list[str]: Messages about failures.
    """
    problems = []
    if results['loss'] < -0.999 or results['spread'] < 0.1:
        problems.append(f'The pretraining collapsed: its loss is {results["loss"]:.4f} and the '
                        f'spread of the embeddings {results["spread"]:.3f} (1 is all '
                        'directions, 0 is one point).')
    for name, row in results['rows'].items():
        random, pretrained = (np.mean(row[start]) for start in STARTS)
        if pretrained <= random and name != LAST_BLOCK:
            problems.append(f'The pretraining did not help: {name} yields {pretrained:.1f} % '
                            f'with it and {random:.1f} % without.')
    return problems


@torch.no_grad()
def embedding_spread(model, images):
    """Return the standard deviation of the normalised embeddings times sqrt(D)."""
    z = F.normalize(model.backbone.embed(images)[0].flatten(0, 1), dim=-1)
    return (z.var(dim=0).sum().sqrt()).item()


def plot_loss(losses, path):
    """Plot the loss of every update and its running mean."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    smooth = np.convolve(losses, np.ones(21) / 21, mode='valid')
    axes.plot(losses, color='#93c5fd', linewidth=0.7, label='each update')
    axes.plot(np.arange(len(smooth)) + 10, smooth, color='#1d4ed8', label='mean of 21 updates')
    axes.set(xlabel='update', ylabel='loss = - mean cosine', title='NEPA on handwritten digits')
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_explorer(model, images, source, path):
    """Write a page to explore attention and predictions.

    Args:
        model (NEPA): The pretrained model, in evaluation mode.
        images (Tensor): Normalised images to show (n, 3, H, W).
        source (str): Name of the checkpoint.
        path (Path): The page.
    """
    backbone = model.backbone
    shown = dict(layers=range(backbone.num_layers), heads=range(backbone.layers[0].attn.num_heads),
                 shift=model.head.shift)
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    entries = [describe_image(backbone, image[None], f'test digit {index}', picture, **shown)
               for index, (image, picture) in enumerate(zip(images, pixels))]
    write_page(path, entries, backbone, source=source, overwrite=True, **shown)


def show(console, results, path):
    """Print the table and write it as Markdown."""
    head = 'accuracy on 500 test digits or mIoU on 100 scenes, %'
    table = Table(head, 'without', 'with pretraining', 'gain')
    lines = [f'| {head} | without | with pretraining | gain |',
             '| --- | --- | --- | --- |']
    for name, row in results['rows'].items():
        cells = [f'{np.mean(row[s]):.1f}' + (f' ± {np.std(row[s]):.1f}' if len(row[s]) > 1 else '')
                 for s in STARTS]
        cells.append(f'{np.mean(row["pretrained"]) - np.mean(row["random"]):+.1f}')
        table.add_row(name, *cells)
        lines.append(f'| {name} | {" | ".join(cells)} |')
    console.print(table)
    path.write_text('\n'.join(lines) + '\n')


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line); return whether a check failed."""
    args = parse_args(argv)
    claim_work_dir(args, 'demo')
    console, begin, out = Console(file=sys.stdout), time.time(), args.work_dir
    torch.set_num_threads(1)

    console.print('NEPA reads the 16 patches of a digit in order and predicts the next one.')
    runner = train(CONFIGS / 'digits_pretrain.py', out / 'digits_pretrain', {
        'train_cfg.max_epochs': args.epochs, 'param_scheduler.end': args.epochs,
        'param_scheduler.warmup': min(3, args.epochs - 1),
        'default_hooks.checkpoint.interval': args.epochs}, ProgressHook(console, args.epochs))
    losses = np.array(runner.message_hub.get_scalar('train/loss').data[0])
    checkpoint = out / 'digits_pretrain' / f'epoch_{args.epochs}.pth'

    console.print('Classifying by nearest neighbours, training with few labels, segmenting ...')
    cfg = load_config(CONFIGS / 'digits_finetune.py',
                      {'train_dataloader.dataset.num_labels': None})
    cfg.train_dataloader.dataset.pipeline = cfg.test_dataloader.dataset.pipeline
    init_default_scope('mmpretrain')
    bank, queries = (Runner.build_dataloader(loader)
                     for loader in (cfg.train_dataloader, cfg.test_dataloader))
    torch.manual_seed(0)
    models = {start: MODELS.build(runner.cfg.model).eval() for start in STARTS}
    load_pretrained(models['pretrained'].backbone, checkpoint, 'backbone.')
    rows = {name: {start: [knn_accuracy(models[start], bank, queries, block=block)['top1']]
                   for start in STARTS}
            for name, block in (('k-NN, first block', 0), (LAST_BLOCK, -1))}
    write_digit_scenes(out / 'scenes')
    jobs = {'linear probe, first block, 300 labels': partial(classify, 'digits_linear', 300),
            **{f'fine-tuning, {n} labels': partial(classify, 'digits_finetune', n)
               for n in LABELS},
            'linear segmentation, first block, mIoU': partial(segment, 'digits_segment_linear')}
    rows |= compare(jobs, str(out), str(checkpoint), args.seeds)
    miou = segment('digits_upernet', 'pretrained', 0, out, str(checkpoint))

    model = models['pretrained']
    normalise = model.data_preprocessor
    images = {name: torch.cat([normalise(batch)['inputs'] for batch in loader])
              for name, loader in (('bank', bank), ('queries', queries))}
    results = dict(rows=rows, upernet=miou, loss=float(losses[-21:].mean()),
                   spread=embedding_spread(model, images['queries']),
                   seconds=round(time.time() - begin))
    (out / 'results.json').write_text(json.dumps(results, indent=2))
    plot_loss(losses, out / 'loss.png')
    plot_predictions(model, images['bank'], images['queries'][:8], 'digits',
                     out / 'prediction.png')
    write_explorer(model, images['queries'][:8], checkpoint.name, out / 'explore.html')
    plot_segmentation(out / 'scenes', {
        'prediction': segmentor_dir('digits_upernet', 'pretrained', 0, out)},
        'UPerNet on pretrained NEPA, scenes of digits that it has not seen',
        out / 'segmentation.png')
    show(console, results, out / 'results.md')
    problems = check(results)
    for problem in problems:
        console.print(problem, style='red')
    console.print(f'UPerNet with the pretrained network segments the scenes with {miou:.1f} mIoU.',
                  soft_wrap=True)
    console.print(f'{results["seconds"]} s. Table, loss curve and figures of predictions '
                  f'and segmentation are in {out}.', soft_wrap=True)
    console.print(f'Open {out / "explore.html"} in a browser to see where the network looks and '
                  'what it expects next.', soft_wrap=True)
    return bool(problems)


if __name__ == '__main__':
    sys.exit(main())
