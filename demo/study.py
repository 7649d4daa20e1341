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
    if args.jobs is not None and args.jobs < 1:
        parser.error(f'--jobs must be positive, got {args.jobs}.')
    args.work_dir = args.work_dir or Path('work_dirs', 'study_quick' if args.quick else 'study')
    return args


if __name__ == '__main__':
    parse_args()    # before the slow imports

import gzip
import json
import shutil
import sys
import time
import warnings
from concurrent.futures import as_completed
from urllib.error import URLError

warnings.filterwarnings('ignore')

import torch
from rich.console import Console

import nepa_mm  # noqa: F401
import study_report
from common import claim_work_dir, process_pool
from make_garment_scenes import write_garment_scenes
from nepa_mm.apis import user_errors
from nepa_mm.datasets import FashionMNISTSubset
from nepa_mm.utils.files import atomic_write
from study_steps import BACKBONE, Row, Size, Study

DEBIAN = Path('/usr/share/datasets/fashion-mnist')     # Debian's package dataset-fashion-mnist
FULL = Size(60000, 15000, 10000, 4, (3, 2), {100: 60, 1000: 20, 10000: 3, 60000: 1},
            lrs=dict(pretrain=(2e-3, 4e-3, 8e-3), pretrain_mae=(5e-4, 1e-3, 2e-3)),
            finetune_lrs=tuple((lr, decay) for lr in (2e-3, 5e-3) for decay in (0.75, 1.)))
QUICK = Size(3000, 1500, 1000, 8, (2, 2), {300: 20}, few=300, scenes=(10,), iters=30, rows=(
    'NEPA', 'random start', 'MAE', 'full', 'no shift', 'no stop-gradient', 'raw pixels'))

BOTH = dict(labels='all', attention=('bidirectional', 'causal'), probe=True)
MAE = dict(finetune='finetune_mae')
LS = {f'{BACKBONE}{name}': value for name, value in dict(
    rope_theta=None, use_abs_pos_emb=True, qk_norm=None).items()}
PLAIN = {**LS, f'{BACKBONE}layer_scale_init_value': None}
MAE_COMPUTE = 1.5       # multiply-adds of NEPA's training on an image over MAE's; see the test
WIDER = {f'{BACKBONE}arch.{name}': value for name, value in dict(
    embed_dims=192, num_heads=6, feedforward_channels=768).items()}

ROWS = {
    'NEPA': Row(epochs=1, trainable=True, **BOTH),
    'random start': Row(None, **BOTH),
    'MAE': Row('pretrain_mae', epochs=1, labels='all', **MAE),
    'MAE, equal compute': Row('pretrain_mae', epochs=MAE_COMPUTE, **MAE),
    'MAE, random start': Row(None, labels='all', **MAE),
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
    'width 192': Row(options=WIDER),
    'half the epochs': Row(epochs=0.5),
    'raw pixels': Row(None, finetune=None)}


def choose(pool, study, report):
    """Choose learning rates of pretraining, then of fine-tuning, on held-out training images."""
    path = study.work_dir / 'chosen.json'
    found = json.loads(path.read_text()) if path.exists() else {}
    scores = {}
    for attempt, names, values, key in (
            (study.try_lr, ('NEPA', 'MAE'), lambda row: study.size.lrs.get(row.pretrain, ()),
             lambda row: row.pretrain),
            (study.try_finetuning, ('NEPA', 'MAE', 'random start', 'MAE, random start'),
             lambda row: study.size.finetune_lrs, lambda row: row.recipe)):
        futures = {(name, value): pool.submit(attempt, name, ROWS[name], value)
                   for name in names for value in values(ROWS[name])
                   if key(ROWS[name]) not in found}
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
    try:
        FashionMNISTSubset(data_root=str(folder), split='test')
    except URLError as error:
        raise FileNotFoundError(
            f'{folder} does not have the four files of Fashion-MNIST, and they cannot be '
            f"downloaded ({error.reason}); put them there, or install Debian's package "
            'dataset-fashion-mnist.') from error


def main(argv=None):
    """Run the study with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    console, size = Console(file=sys.stdout), QUICK if args.quick else FULL
    claim_work_dir(args, 'study')
    study = Study(args.work_dir.resolve(), args.data.resolve(), size)
    with user_errors():
        study.require_same_size()
        prepare_data(args.data)
        write_garment_scenes(study.work_dir / 'scenes', size.scenes[-1], 2 * size.scenes[-1],
                             data=study.data)
    jobs = args.jobs or (2 if torch.cuda.is_available() else None)
    begin = time.time()
    runs = [(name, seed) for seed in range(max(size.seeds)) for name in size.rows or ROWS
            if seed < size.seeds[not ROWS[name].probe]]
    # two seeds of the main rows, two of the ablations, then third ones
    runs.sort(key=lambda run: (run[1] > 1, ROWS[run[0]].labels == 'few'))

    def report(text):
        console.print(f'{(time.time() - begin) / 60:6.1f} min  {text}', soft_wrap=True,
                      highlight=False)

    with process_pool(jobs) as pool:
        choose(pool, study, report)
        futures = {pool.submit(study.run, name, ROWS[name], seed): f'{name}, seed {seed}'
                   for name, seed in runs}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                report(f'{count} of {len(futures)}: {futures[future]}')
        except Exception:
            pool.shutdown(wait=False, cancel_futures=True)      # rows that have not begun
            raise
    study.draw(ROWS['NEPA'])
    study_report.write(study.work_dir, docs=not args.quick)
    report(f'Tables and pictures are in {args.work_dir}.')


if __name__ == '__main__':
    sys.exit(main())
