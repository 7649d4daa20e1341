"""Run the paper's core ablations (Table 1a) on handwritten digits and watch each one fail.

    make ablations   or
    python demo/ablations.py [--work-dir DIR] [--epochs N] [--seeds N] [--rows ROW [ROW ...]]

Without the shift the network copies its input. Without stop-gradient all embeddings become equal.
Without the causal mask the patch to predict is among the inputs. --rows also runs options of newer
papers: SIGReg instead of the stop-gradient, and the losses mse and infonce. Writes results.md,
results.json and monitors.png. Exits with status 1 if an expected failure did not occur, or occurred
in the full method.
"""
import common

NO_STOP = {'model.head.stop_gradient': False}
# row: changes to the full method, published ImageNet-1K top-1 (Table 1a), colour
ROWS = {
    'full': ({}, '76.8', '#1d4ed8'),
    'no causal mask': ({'model.backbone.causal': False}, '73.6', '#d97706'),
    'no shift': ({'model.head.shift': 0}, 'fail', '#15803d'),
    'no stop-gradient': (NO_STOP, 'fail', '#be123c'),
    # not in the paper
    'SIGReg': ({**NO_STOP, 'model.regularizer.type': 'SIGReg',
                'model.regularizer.num_slices': 32}, '–', '#7c3aed'),
    'mse': ({'model.head.loss': 'mse'}, '–', '#0e7490'),
    'infonce': ({'model.head.loss': 'infonce'}, '–', '#78716c')}
SCRATCH = 'no pretraining'
DEFAULT_ROWS = (*list(ROWS)[:4], SCRATCH)


def parse_args(argv=None):
    return common.parse_args(__doc__, argv, 'ablations', 1, 'pretrainings per row',
                             (*ROWS, SCRATCH), DEFAULT_ROWS)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import json
import sys
import time
import warnings
from concurrent.futures import as_completed
from pathlib import Path

warnings.filterwarnings('ignore')

import numpy as np
from rich.console import Console
from rich.table import Table

import nepa_mm  # noqa: F401
from common import claim_work_dir, process_pool, train, train_on_few_labels
from nepa_mm.engine.hooks import NEPAMonitorHook

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'demo'
MONITORS = {
    'next_cosine': 'cosine with the patch to predict',
    'copy_cosine': 'cosine with the patch just read',
    'lift': 'lift: difference of the two',
    'embedding_std': 'spread of the embeddings',
    'embedding_rank': 'effective rank of the embeddings',
    'output_rank': 'effective rank of the outputs'}
LABELS, FINETUNE_EPOCHS = 300, 30
DRAWS = 3       # random sets of labelled images, one fine-tuning each


def run(row, seed, epochs, work_dir):
    """Run one pretraining and its fine-tunings, in a separate process.

    Args:
        row (str): A key of ``ROWS``, or ``SCRATCH``, which is fine-tuned only.
        seed (int): Seed of the pretraining; those of the fine-tunings are derived from it.
        epochs (int): Epochs of pretraining.
        work_dir (str): Where logs and checkpoints go.

    Returns:
        dict: ``top1`` (percent, one per draw); after a pretraining also ``loss`` (last value),
        ``warned`` (the monitor's warnings), ``iterations``, and each of ``MONITORS`` as a curve.
    """
    folder, result, checkpoint = Path(work_dir) / f'{row.replace(" ", "-")}_{seed}', {}, None
    if row != SCRATCH:
        runner = train(CONFIGS / 'digits_pretrain.py', folder, {
            'train_cfg.max_epochs': epochs, 'param_scheduler.end': epochs,
            'param_scheduler.warmup': min(3, epochs - 1), 'randomness.seed': seed,
            'default_hooks.checkpoint.interval': epochs, **ROWS[row][0]})
        checkpoint, scalars = folder / f'epoch_{epochs}.pth', runner.message_hub.log_scalars
        monitor = next(hook for hook in runner.hooks if isinstance(hook, NEPAMonitorHook))
        result = {name: scalars[f'train/{name}'].data[0].tolist() for name in MONITORS}
        result.update(
            loss=scalars['train/loss'].current(), warned=sorted(monitor.warned),
            iterations=[monitor.interval * (i + 1) for i in range(len(result['lift']))])
    result['top1'] = [
        train_on_few_labels(CONFIGS / 'digits_finetune.py', folder / f'finetune_{draw}', LABELS,
                            FINETUNE_EPOCHS, seed * DRAWS + draw, checkpoint)
        for draw in range(DRAWS)]
    return result


def run_all(rows, epochs, seeds, work_dir, report):
    """Run each of ``rows`` with every seed, one process per core; call ``report`` with each line.

    Returns:
        dict[str, list[dict]]: Results of :func:`run` by row, one per seed.
    """
    with process_pool() as pool:
        futures = {pool.submit(run, row, seed, epochs, str(work_dir)): (row, seed)
                   for seed in range(seeds) for row in rows}
        for future in as_completed(futures):
            row, seed = futures[future]
            report(f'{row}, seed {seed}: fine-tuned {np.mean(future.result()["top1"]):.1f} %')
    results = {row: [None] * seeds for row in rows}
    for future, (row, seed) in futures.items():
        results[row][seed] = future.result()
    return results


def check(results):
    """Check every seed at the end of its run.

    Returns:
        list[str]: Messages about expected failures that did not occur, and unexpected ones.
    """
    problems = []

    def expect(row, ok, what):
        for seed, result in enumerate(results.get(row, ())):
            values = {name: result[name][-1] for name in MONITORS} | dict(loss=result['loss'])
            if not ok(result['warned'], values):
                shown = ', '.join(f'{name} {value:.3f}' for name, value in values.items())
                problems.append(f'{row}, seed {seed}: {what}, but the monitor warned of '
                                f'{" and ".join(result["warned"]) or "nothing"} and ended at '
                                f'{shown}.')

    expect('full', lambda warned, v: not warned and v['lift'] > 0.2 and v['embedding_std'] > 0.3,
           'expected no warning, lift > 0.2 and embedding_std > 0.3')
    expect('no shift', lambda warned, v: 'copying' in warned and v['copy_cosine'] > 0.99
           and v['lift'] < -0.2,
           'expected the identity (a warning of copying, copy_cosine > 0.99, lift < -0.2)')
    expect('no stop-gradient', lambda warned, v: 'collapse' in warned and v['loss'] < -0.99
           and v['embedding_std'] < 0.1 and v['embedding_rank'] < 2,
           'expected equal embeddings (a warning of collapse, loss < -0.99, embedding_std < 0.1, '
           'embedding_rank < 2)')
    expect('SIGReg', lambda warned, v: not warned and v['lift'] > 0.2 and v['embedding_std'] > 0.3,
           'expected no collapse (no warning, lift > 0.2, embedding_std > 0.3)')
    top1 = {row: np.mean([run['top1'] for run in runs]) for row, runs in results.items()}
    for row in ('no causal mask', 'no shift', 'no stop-gradient'):
        if 'full' in top1 and row in top1 and top1[row] >= top1['full']:
            problems.append(f'{row}: {top1[row]:.1f} % after fine-tuning, no less than the '
                            f'{top1["full"]:.1f} % of the full method.')
    return problems


def explain(results):
    """Explain what the monitors show, with the numbers of this run (means over the seeds)."""
    ends = {row: {name: np.mean([np.ravel(run[name])[-1] for run in runs])
                  for name in (*MONITORS, 'loss')}
            for row, runs in results.items() if row in ROWS}
    sentences = {
        'no shift':
        'No shift: the output is the patch just read (copy_cosine {copy_cosine:.3f}), so the loss '
        'of {loss:.4f} says nothing about the next patch (lift {lift:+.2f}). The monitor warns of '
        'copying.',
        'no stop-gradient':
        'No stop-gradient: all embeddings point the same way (embedding_std {embedding_std:.3f}, '
        'effective rank {embedding_rank:.2f}), so any constant yields the loss of {loss:.4f}. The '
        'monitor warns of collapse.',
        'SIGReg':
        'SIGReg: the embeddings stay apart without the stop-gradient (embedding_std '
        '{embedding_std:.2f}, effective rank {embedding_rank:.2f}, lift {lift:+.2f}).'}
    lines = [text.format(**ends[row]) for row, text in sentences.items() if row in ends]
    if 'full' in ends and 'no causal mask' in ends:
        cosines = [f'{ends[row]["next_cosine"]:.3f}' for row in ('no causal mask', 'full')]
        lines.append(
            'No causal mask: no monitor shows the failure. The monitors look better than with the '
            f'full method (next_cosine {" against ".join(cosines)}), because the patch to predict '
            'is among the inputs. Only the accuracy shows it.')
    return lines


def plot(results, path):
    """Plot the monitors over the pretraining, one panel each, one line per seed and row."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(12, 6.4), layout='constrained', sharex=True)
    for axis, (name, title) in zip(panels.flat, MONITORS.items()):
        for row, (_, _, colour) in ROWS.items():
            for seed, result in enumerate(results.get(row, ())):
                axis.plot(result['iterations'], result[name], color=colour, linewidth=1.3,
                          alpha=0.85, label='_' * (seed > 0) + row)
        axis.set_title(f'{title}\n({name})', fontsize=10)
        axis.grid(alpha=0.3)
        if name.endswith('_std'):
            axis.axhline(NEPAMonitorHook.MIN_STD, color='#64748b', linestyle=':')
            axis.annotate('collapse below', (1, NEPAMonitorHook.MIN_STD), (-3, 3), fontsize=8,
                          xycoords=axis.get_yaxis_transform(), textcoords='offset points',
                          ha='right', color='#64748b')
        elif name.endswith('_rank'):
            axis.axhline(1, color='#64748b', linestyle=':')
        if name == 'lift':
            axis.axhline(0, color='#64748b', linestyle=':')
            axis.annotate('copying below', (1, 0), (-3, -10), fontsize=8, ha='right',
                          xycoords=axis.get_yaxis_transform(), textcoords='offset points',
                          color='#64748b')
    for axis in panels[1]:
        axis.set_xlabel('update')
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), frameon=False)
    figure.suptitle('What the monitors show of the core ablations, on handwritten digits')
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tabulate(results):
    """Return header and rows of the table: our results on digits, the paper's on ImageNet."""
    def cell(values, digits):
        text = f'{np.mean(values):.{digits}f}'
        return text + (f' ± {np.std(values):.{digits}f}' if len(values) > 1 else '')

    columns = ('next_cosine', 'copy_cosine', 'lift', 'embedding_std', 'embedding_rank')
    header = ['row', 'loss', *columns, 'warning', f'digits, {LABELS} labels, %',
              'ImageNet-1K, % (published)']
    rows = []
    for row, runs in results.items():
        cells = ['–'] * (len(columns) + 2)
        if row in ROWS:
            cells = [cell([run['loss'] for run in runs], 3),
                     *(cell([run[name][-1] for run in runs], 2) for name in columns),
                     ', '.join(sorted({kind for run in runs for kind in run['warned']})) or '–']
        rows.append([row, *cells, cell(np.ravel([run['top1'] for run in runs]), 1),
                     ROWS[row][1] if row in ROWS else '–'])
    return header, rows


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line); return whether a check failed."""
    args = parse_args(argv)
    claim_work_dir(args, 'ablations')
    console, begin, out = Console(file=sys.stdout, soft_wrap=True), time.time(), args.work_dir

    names = list(dict.fromkeys(args.rows))
    console.print(f'Pretraining {len(set(names) - {SCRATCH})} ways on digits; then fine-tuning on '
                  f'{LABELS} labels, {DRAWS} times.')
    results = run_all(names, args.epochs, args.seeds, out, console.print)
    header, rows = tabulate(results)
    # a single table is too wide for a terminal
    for title, columns in (('At the end of pretraining', range(8)),
                           ('After fine-tuning', (0, 8, 9))):
        table = Table(*(header[i] for i in columns), title=title, title_justify='left')
        for row in rows:
            if row[1] != '–' or 8 in columns:
                table.add_row(*(row[i] for i in columns))
        Console(file=sys.stdout, width=max(console.width, 120)).print(table)
    problems, seconds = check(results), round(time.time() - begin)
    sentences = [*(explain(results) if not problems else []),
                 'Published figures are top-1 on ImageNet-1K after 50k steps, paper Table 1a. '
                 'Fine-tuning is causal in every row here.']
    for sentence in sentences:
        console.print(sentence)
    for problem in problems:
        console.print(problem, style='red')
    (out / 'results.md').write_text('\n'.join(
        f'| {" | ".join(cells)} |' for cells in (header, ['---'] * len(header), *rows))
        + '\n\n' + '\n\n'.join(sentences + problems) + '\n')
    (out / 'results.json').write_text(json.dumps(
        dict(rows=results, problems=problems, seconds=seconds), indent=2))
    plot(results, out / 'monitors.png')
    console.print(f'{seconds} s. Table, values and a figure of the monitors are in {out}.')
    return bool(problems)


if __name__ == '__main__':
    sys.exit(main())
