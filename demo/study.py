"""Pretrain NEPA on Fashion-MNIST, beside MAE and beside nothing, and repeat the paper's ablations.

    make study [QUICK=1]     or     python demo/study.py [--quick] [--work-dir DIR] [--jobs N]

Every row of ROWS is a pretraining with some change. Each is evaluated on frozen features and by
fine-tuning with few labels, with several seeds. Learning rates are chosen first, on training
images. Every step writes its record, and a second call continues where the first one stopped.
study_report.py turns the records into results.md, results.json and pictures.
"""
from pathlib import Path

from nepa_mm_cli import tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('--quick', action='store_true',
                        help='few images, epochs and rows: minutes instead of hours')
    parser.add_argument('--work-dir', type=Path,
                        help='output folder (default: work_dirs/study, or work_dirs/study_quick)')
    parser.add_argument('--data', type=Path, default=Path('data/fashion_mnist'),
                        help='folder of the four files of Fashion-MNIST, which are downloaded if '
                             'missing (default: data/fashion_mnist)')
    parser.add_argument('--jobs', type=int, help='processes at a time (default: one per core, or 2 '
                        'with a GPU)')
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or Path('work_dirs', 'study_quick' if args.quick else 'study')
    return args


if __name__ == '__main__':
    parse_args()    # before the slow imports

import gzip
import json
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')   # one single-threaded process per core
warnings.filterwarnings('ignore')

import numpy as np
import study_report
import torch
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from rich.console import Console

import nepa_mm  # noqa: F401
from common import claim_work_dir, train, train_on_few_labels
from nepa_mm.apis import load_config, user_errors
from nepa_mm.checkpoints.loading import load_pretrained
from nepa_mm.engine.hooks import NEPAMonitorHook
from nepa_mm.evaluation.frozen_features import evaluating, knn_scores, linear_scores
from nepa_mm.utils.files import atomic_write

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'fashion_mnist'
DEBIAN = Path('/usr/share/datasets/fashion-mnist')     # Debian's package dataset-fashion-mnist
HELD_OUT = 3            # one of 3 images of the bank chooses learning rates and blocks
TUNING_SEED = 1000


@dataclass(frozen=True)
class Size:
    """How much to run.

    Args:
        images (int): Training images of pretraining.
        bank (int): Training images for frozen features.
        test (int): Test images.
        epochs (int): Epochs of the main pretrainings; rows have a multiple of it.
        seeds (int): Runs of every row.
        labels (dict[int, int]): Epochs of fine-tuning by number of labels.
        lrs (tuple[float]): Learning rates of pretraining to choose from.
        finetune_lrs (tuple[tuple]): Learning rates and layer decays of fine-tuning likewise.
        rows (tuple[str], optional): Rows to run. Defaults to None: all.
    """

    images: int
    bank: int
    test: int
    epochs: int
    seeds: int
    labels: dict
    lrs: tuple = ()
    finetune_lrs: tuple = ()
    rows: tuple | None = None


FULL = Size(60000, 15000, 10000, 4, 3, {100: 60, 1000: 20, 10000: 3, 60000: 1},
            (1.5e-3, 3e-3, 6e-3), tuple((lr, decay) for lr in (2e-3, 4e-3) for decay in (0.75, 1.)))
QUICK = Size(5000, 3000, 2000, 4, 2, {100: 40, 1000: 5}, rows=(
    'NEPA', 'random start', 'MAE', 'MAE, random start', 'full', 'no shift', 'no stop-gradient'))


@dataclass(frozen=True)
class Row:
    """One way to obtain weights, and how they are evaluated.

    Args:
        pretrain (str, optional): The config. Defaults to None: random start.
        options (dict): Changes to it; those of the network hold for fine-tuning, too.
        epochs (float): Length as a multiple of the study's. Defaults to 0.25.
        finetune (str, optional): The config. Defaults to 'finetune'. None scores raw pixels.
        labels (str): 'all' numbers of labels, or 'one': 1,000. Defaults to 'one'.
        attention (tuple[str]): Attention of fine-tuning. Defaults to ('bidirectional',).
        trainable (bool): Whether to fine-tune with a trainable patch embedding, too.
        probe (bool): Whether to train attentive probes. Defaults to False.
    """

    pretrain: str | None = 'pretrain'
    options: dict = field(default_factory=dict)
    epochs: float = 0.25
    finetune: str | None = 'finetune'
    labels: str = 'one'
    attention: tuple = ('bidirectional',)
    trainable: bool = False
    probe: bool = False

    @property
    def recipe(self):
        """Rows with the same recipe share their learning rates."""
        return f'{self.finetune}, {self.pretrain and "pretrained" or "random"}'


BACKBONE = 'model.backbone.'
BOTH = dict(labels='all', attention=('bidirectional', 'causal'), probe=True)
MAE = dict(finetune='finetune_mae', labels='all')
LS = {f'{BACKBONE}{name}': value for name, value in dict(
    rope_theta=None, use_abs_pos_emb=True, qk_norm=None).items()}
PLAIN = {**LS, f'{BACKBONE}layer_scale_init_value': None}
MAE_COMPUTE = 1.5       # multiply-adds of NEPA's training on an image over MAE's; see the test


def width(dims):
    arch = f'{BACKBONE}arch.'
    return {f'{arch}embed_dims': dims, f'{arch}num_heads': dims // 32,
            f'{arch}feedforward_channels': 4 * dims}


ROWS = {
    'NEPA': Row(epochs=1, trainable=True, **BOTH),
    'random start': Row(None, **BOTH),
    'MAE': Row('pretrain_mae', epochs=1, **MAE),
    'MAE, equal compute': Row('pretrain_mae', epochs=MAE_COMPUTE, **MAE),
    'MAE, random start': Row(None, **MAE),
    'full': Row(attention=('bidirectional', 'causal')),
    'no causal mask': Row(options={f'{BACKBONE}causal': False}),
    'no shift': Row(options={'model.head.shift': 0}),
    'no stop-gradient': Row(options={'model.head.stop_gradient': False}),
    'plain': Row(options=PLAIN),
    'LayerScale': Row(options=LS),
    'LayerScale, RoPE': Row(options={f'{BACKBONE}qk_norm': None}),
    'gated MLP': Row(options={f'{BACKBONE}gated_mlp': True, f'{BACKBONE}act_cfg': dict(
        type='SiLU')}),
    'plain, 40 % masked': Row(options={**PLAIN, 'model.mask_ratio': 0.4}),
    'plain, 60 % masked': Row(options={**PLAIN, 'model.mask_ratio': 0.6}),
    'mse': Row(options={'model.head.loss': 'mse'}),
    'infonce': Row(options={'model.head.loss': 'infonce'}),
    'width 64': Row(options=width(64)),
    'width 192': Row(options=width(192)),
    'half the epochs': Row(epochs=0.5),
    'raw pixels': Row(None, finetune=None)}


def record(path, function, *args):
    """Return the record of a step, from its file or by running the step."""
    if path.exists():
        return json.loads(path.read_text())
    begin = time.time()
    result = function(*args)
    result['seconds'] = round(time.time() - begin, 1)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result))
    return result


@dataclass(frozen=True)
class Study:
    """The steps of one study.

    Args:
        work_dir (Path): Where records, logs and checkpoints go.
        data (Path): Folder of the images.
        size (Size): How much to run.
    """

    work_dir: Path
    data: Path
    size: Size

    def run(self, name, seed):
        """Run all steps of a row that are missing, with the chosen learning rates."""
        row, folder = ROWS[name], self.folder(name, seed)
        checkpoint = self.pretrain(row, folder, seed, self.chosen(row.pretrain))
        blocks = record(folder / 'blocks.json', self.blocks, row, checkpoint, seed)
        labels = self.size.labels if row.labels == 'all' else [1000] if row.finetune else []
        for count in labels:
            for attention in row.attention:
                record(folder / f'finetune_{attention}_{count}.json', self.finetune, row, folder,
                       seed, checkpoint, count, attention == 'causal')
        if row.trainable:
            record(folder / 'finetune_trainable_1000.json', self.finetune, row, folder, seed,
                   checkpoint, 1000, False, True)
        if row.probe:
            for block in sorted({len(blocks['held_out']) - 1, int(np.argmax(blocks['held_out']))}):
                record(folder / f'attentive_{block}.json', self.probe, folder, seed, checkpoint,
                       block)

    def folder(self, name, seed):
        return self.work_dir / 'runs' / f'{name.replace(",", "").replace(" ", "-")}_{seed}'

    def epochs(self, row):
        return max(round(row.epochs * self.size.epochs), 1)

    def pretrain(self, row, folder, seed, lr):
        """Pretrain unless it is done; return the checkpoint, or None for a random start."""
        if row.pretrain is None:
            return None
        epochs = self.epochs(row)
        record(folder / 'pretrain.json', self._pretrain, row, folder, seed, epochs, lr)
        return folder / 'pretrain' / f'epoch_{epochs}.pth'

    def _pretrain(self, row, folder, seed, epochs, lr):
        runner = train(CONFIGS / f'{row.pretrain}.py', folder / 'pretrain', {
            'train_cfg.max_epochs': epochs, 'param_scheduler.end': epochs,
            'default_hooks.checkpoint.interval': max(epochs // 5, 1), 'randomness.seed': seed,
            'train_dataloader.dataset.data_root': str(self.data),
            'train_dataloader.dataset.indices': self.size.images,
            **({'model.backbone.compile_blocks': False} if row.pretrain == 'pretrain' else {}),
            **({'optim_wrapper.optimizer.lr': lr} if lr else {}), **row.options}, resume=True)
        scalars = runner.message_hub.log_scalars
        losses = np.asarray(scalars['train/loss'].data[0])
        result = dict(
            epochs=epochs, images=self.size.images, lr=runner.cfg.optim_wrapper.optimizer.lr,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
            torch=torch.__version__,
            loss=[float(part.mean()) for part in np.array_split(losses, min(100, len(losses)))])
        for hook in runner.hooks:
            if isinstance(hook, NEPAMonitorHook):
                result['warned'] = sorted(hook.warned)
                result['monitors'] = {
                    key.removeprefix('train/'): [float(value) for value in buffer.data[0]]
                    for key, buffer in scalars.items() if key.endswith(study_report.MONITORS)}
        return result

    def blocks(self, row, checkpoint, seed, test=True):
        """Score the mean over the patches behind every block, without training the network.

        Returns:
            dict: ``held_out`` (linear probe with 1,000 labels on held-out training images); on the
            test images ``linear_1000`` and so on, and ``knn``. One accuracy in percent for each
            block.
        """
        model = self.network(row, checkpoint, seed) if row.finetune else None
        bank, labels = self.features(model, 'train', self.size.bank)
        first = len(labels) - len(labels) // HELD_OUT
        order = np.random.default_rng(seed).permutation(first)
        result = {}

        def score(name, function, chosen, queries, truth):
            result[name] = [
                100 * (function(x[chosen], labels[chosen], queries[i], 10).argmax(1) == truth)
                .float().mean().item() for i, x in enumerate(bank)]

        score('held_out', linear_scores, order[:1000], [x[first:] for x in bank], labels[first:])
        if test:
            queries, targets = self.features(model, 'test', self.size.test)
            for count in self.size.labels:
                if count <= 10000:
                    score(f'linear_{count}', linear_scores, order[:count], queries, targets)
            score('knn', knn_scores, order, queries, targets)
        return result

    def network(self, row, checkpoint, seed):
        """A network that returns the mean over the patches behind every block."""
        config = 'pretrain_mae' if row.finetune == 'finetune_mae' else 'pretrain'
        cfg = load_config(CONFIGS / f'{config}.py', {
            **{key: value for key, value in row.options.items() if key.startswith(BACKBONE)},
            **({'model.backbone.compile_blocks': False} if config == 'pretrain' else {})})
        backbone = cfg.model.backbone
        if backbone.type == 'MAEViT':
            backbone.pop('mask_ratio')
            backbone.type = 'VisionTransformer'
        backbone.update(out_type='avg_featmap', out_indices=list(range(6)))
        init_default_scope('mmpretrain')
        torch.manual_seed(seed)
        model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, data_preprocessor=dict(
            mean=[127.5], std=[127.5], to_rgb=False))).to(get_device())
        model.init_weights()
        if checkpoint:
            load_pretrained(model.backbone, checkpoint, 'backbone.')
        return model

    def features(self, model, split, count):
        """Features (blocks, images, D) and labels of the first images of a split."""
        dataset = dict(type='FashionMNISTSubset', data_root=str(self.data), split=split,
                       indices=count, pipeline=[dict(type='PackInputs')])
        loader = Runner.build_dataloader(dict(
            batch_size=500, dataset=dataset, collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False)))
        found, labels = [], []
        with evaluating(model) if model else nullcontext(), torch.no_grad():
            for batch in loader:
                if model is None:
                    found.append(batch['inputs'].flatten(1).float()[None].to(get_device()))
                else:
                    images = model.data_preprocessor(batch)['inputs']
                    found.append(torch.stack([x.float() for x in model.backbone(images)]))
                labels += [sample.gt_label for sample in batch['data_samples']]
        return torch.cat(found, 1), torch.cat(labels).to(found[0].device)

    def finetune(self, row, folder, seed, checkpoint, labels, causal=False, trainable=False,
                 chosen=None):
        """Fine-tune; return top-1 on the test images in percent.

        With ``chosen``, a pair of learning rate and layer decay, the result is that on held-out
        training images.
        """
        options = {key: value for key, value in row.options.items() if key.startswith(BACKBONE)}
        if chosen:
            options |= {'train_dataloader.dataset.num_labels': None,
                        'train_dataloader.dataset.indices': labels,
                        'val_dataloader.dataset.split': 'train',
                        'val_dataloader.dataset.indices': -(self.size.bank // HELD_OUT)}
        if row.finetune == 'finetune':
            options |= {f'{BACKBONE}causal': causal, f'{BACKBONE}compile_blocks': False}
            if trainable or not checkpoint:
                options[f'{BACKBONE}frozen_stages'] = -1
        if f'{BACKBONE}arch.embed_dims' in options:
            options['model.head.in_channels'] = options[f'{BACKBONE}arch.embed_dims']
        lr, decay = chosen or self.chosen(row.recipe) or (None, None)
        if lr:
            options |= {'optim_wrapper.optimizer.lr': lr, 'optim_wrapper.paramwise_cfg': dict(
                layer_decay_rate=decay, head_lr=lr)}
        name = f'finetune_{labels}{"_causal" * causal}{"_trainable" * trainable}'
        return self.classify(row.finetune, folder / name, labels, seed, checkpoint, options)

    def probe(self, folder, seed, checkpoint, block):
        """Train an attentive probe on a frozen network."""
        labels = max(count for count in self.size.labels if count <= 10000)
        return self.classify('attentive', folder / f'attentive_{block}', labels, seed, checkpoint, {
            f'{BACKBONE}out_indices': block, f'{BACKBONE}compile_blocks': False})

    def classify(self, config, folder, labels, seed, checkpoint, options):
        return dict(top1=train_on_few_labels(
            CONFIGS / f'{config}.py', folder, labels, self.size.labels[labels], seed, checkpoint, {
                'train_dataloader.dataset.data_root': str(self.data),
                'val_dataloader.dataset.data_root': str(self.data),
                'val_dataloader.dataset.indices': self.size.test, **options}))

    def chosen(self, recipe):
        """The chosen learning rate of a recipe, or None: that of the config."""
        path = self.work_dir / 'chosen.json'
        return json.loads(path.read_text()).get(recipe) if path.exists() else None

    def try_lr(self, name, lr):
        """Score a learning rate of pretraining on held-out training images."""
        row, folder = ROWS[name], self.work_dir / 'tuning' / f'{name}_{lr:g}'
        short = Row(**{**vars(row), 'epochs': 0.25})
        checkpoint = self.pretrain(short, folder, TUNING_SEED, lr)
        return max(record(folder / 'blocks.json', self.blocks, row, checkpoint,
                          TUNING_SEED, False)['held_out'])

    def try_finetuning(self, name, chosen):
        """Score a learning rate and layer decay of fine-tuning likewise."""
        row, checkpoint = ROWS[name], None
        if row.pretrain:
            best = self.work_dir / 'tuning' / f'{name}_{self.chosen(row.pretrain):g}'
            checkpoint = best / 'pretrain' / f'epoch_{max(round(0.25 * self.size.epochs), 1)}.pth'
        folder = self.work_dir / 'tuning' / f'finetune_{name}_{chosen[0]:g}_{chosen[1]:g}'
        return record(folder / 'finetune.json', self.finetune, row, folder, TUNING_SEED,
                      checkpoint, 1000, False, False, chosen)['top1']


def call(method, *args):
    torch.set_num_threads(1)
    return method(*args)


def choose(pool, study, report):
    """Choose learning rates of pretraining, then of fine-tuning, on held-out training images."""
    path = study.work_dir / 'chosen.json'
    found = json.loads(path.read_text()) if path.exists() else {}
    scores = {}
    for attempt, names, values, key in (
            (study.try_lr, ('NEPA', 'MAE'), study.size.lrs, lambda row: row.pretrain),
            (study.try_finetuning, ('NEPA', 'MAE', 'random start', 'MAE, random start'),
             study.size.finetune_lrs, lambda row: row.recipe)):
        futures = {(name, value): pool.submit(call, attempt, name, value)
                   for name in names for value in values if key(ROWS[name]) not in found}
        for (name, value), future in futures.items():
            scores.setdefault(key(ROWS[name]), []).append((future.result(), value))
        for recipe, pairs in scores.items():
            found[recipe] = max(pairs)[1]
        if futures:
            with atomic_write(path, overwrite=True) as temporary:
                temporary.write_text(json.dumps(found))
            lines = [f'{recipe}: {found[recipe]}' for recipe in scores]
            report('Learning rates, chosen on held-out training images: ' + '; '.join(lines))


def prepare_data(folder):
    """Unpack Debian's files into ``folder`` if it has none; mmpretrain downloads otherwise."""
    for archive in DEBIAN.glob('*.gz'):
        target = folder / archive.stem
        if not target.exists():
            with gzip.open(archive) as source, atomic_write(target) as temporary:
                with open(temporary, 'wb') as file:
                    shutil.copyfileobj(source, file)


def main(argv=None):
    """Run the study with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    console, size = Console(file=sys.stdout), QUICK if args.quick else FULL
    claim_work_dir(args, 'study')
    prepare_data(args.data)
    study = Study(args.work_dir.resolve(), args.data.resolve(), size)
    jobs = args.jobs or 2 if torch.cuda.is_available() else os.cpu_count()
    report = partial(console.print, soft_wrap=True, highlight=False)
    begin, rows = time.time(), size.rows or tuple(ROWS)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context('spawn')) as pool:
        choose(pool, study, report)
        futures = {pool.submit(call, study.run, name, seed): f'{name}, seed {seed}'
                   for seed in range(size.seeds) for name in rows}
        for count, future in enumerate(as_completed(futures), 1):
            future.result()
            report(f'{(time.time() - begin) / 60:6.1f} min  {count}/{len(futures)}  '
                   f'{futures[future]}')
    with user_errors():
        study_report.write(study.work_dir)
    report(f'Tables and pictures are in {args.work_dir}.')


if __name__ == '__main__':
    sys.exit(main())
