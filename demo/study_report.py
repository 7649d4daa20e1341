"""Tables and pictures of study.py, from its records.

    python demo/study_report.py [WORK_DIR] [--docs]

Writes results.md, results.json and pictures to WORK_DIR (default: work_dirs/study). With --docs
they also replace those of docs/results.md.
"""
from nepa_mm_cli import tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('work_dir', nargs='?', default='work_dirs/study', metavar='WORK_DIR',
                        help='folder of study.py (default: work_dirs/study)')
    parser.add_argument('--docs', action='store_true', help='update docs/results.md, too')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from nepa_mm.apis import user_errors

REPO = Path(__file__).resolve().parents[1]
COLOURS = dict(zip(('NEPA', 'random start', 'MAE', 'MAE, equal compute', 'MAE, random start'),
                   ('#1d4ed8', '#78716c', '#d97706', '#be123c', '#a8a29e')))
MAIN = list(COLOURS)
# claim of the paper, its table and difference in points, the row that should be better and where,
# the other row
CLAIMS = [
    ('The causal mask helps', '1a', '+3.2', 'full', 'no causal mask'),
    ('Without the shift it fails', '1a', 'fails', 'full', 'no shift'),
    ('Without the stop-gradient it fails', '1a', 'fails', 'full', 'no stop-gradient'),
    ('LayerScale alone hurts', '1b', '-0.8', 'LayerScale', 'plain'),
    ('RoPE helps', '1b', '+2.8', 'LayerScale, RoPE', 'LayerScale'),
    ('QK-norm helps', '1b', '+0.9', 'full', 'LayerScale, RoPE'),
    ('A gated MLP helps', '1b', '+0.2', 'gated MLP', 'full'),
    ('All but the gated MLP together help', '1b', '+2.9', 'full', 'plain'),
    ('Masking 40 % of the input hurts', '1c', '+1.8', 'plain', 'plain, 40 % masked'),
    ('Masking 60 % of the input hurts', '1c', '+2.5', 'plain', 'plain, 60 % masked'),
    ('A frozen patch embedding helps in fine-tuning', '1d', '+4.3', 'NEPA',
     ('NEPA', 'trainable')),
    ('Bidirectional fine-tuning helps', '1e', '+1.2', 'NEPA', ('NEPA', 'causal'))]
SCALING = [('full', 'a quarter of the epochs'), ('half the epochs', 'half the epochs'),
           ('NEPA', 'all epochs'), ('width 192', 'width 192, a quarter of the epochs')]


def collect(work_dir):
    """Read all records.

    Returns:
        dict: ``rows``: name -> step -> list over the seeds that ran it; ``chosen``: learning rates;
        ``size``: how much was run; ``hours`` of all steps, without what was interrupted.
    """
    rows, chosen, hours = {}, Path(work_dir, 'chosen.json'), 0
    size = json.loads(Path(work_dir, 'size.json').read_text())
    for path in sorted(Path(work_dir, 'runs').glob('*/*.json')):
        name = path.parent.name.rpartition('_')[0].replace('-', ' ')
        record = json.loads(path.read_text())
        if 'top1' in record or 'miou' in record:
            record = record.get('top1', record.get('miou'))
        elif path.stem == 'pretrain':
            record['monitors'] = {name: values[-1] for name, values in
                                  record.get('monitors', {}).items()}
        rows.setdefault(name, {}).setdefault(path.stem, []).append(record)
    for path in Path(work_dir).glob('*/*/*.json'):
        hours += json.loads(path.read_text())['seconds'] / 3600
    return dict(size=size, rows=rows, hours=round(hours, 1),
                chosen=json.loads(chosen.read_text()) if chosen.exists() else {})


class Summary:
    """What the tables and pictures show of the records.

    Args:
        records (dict): See :func:`collect`.
    """

    def __init__(self, records):
        # folders have no commas and a hyphen for each blank
        self.rows, self.chosen = records['rows'], records['chosen']
        self.few = records['size']['few']
        self.labels = sorted(map(int, records['size']['labels']))
        self.linear = [f'linear_{n}' for n in self.labels if n < records['size']['bank']]
        self.probe = f'linear_{self.few}'
        self.most = max(n for n in self.labels if n < records['size']['bank'])

    def steps(self, row):
        return self.rows.get(row.replace(',', '').replace('-', ' '), {})

    def tuned(self, row, labels=None, kind='bidirectional'):
        """Accuracies after fine-tuning, one per seed; with few labels by default."""
        return np.array(self.steps(row).get(f'finetune_{kind}_{labels or self.few}', []))

    def blocks(self, row, score):
        """Accuracies of frozen features (seeds, blocks)."""
        found = self.steps(row).get('blocks', [])
        return np.array([run[score] for run in found if score in run])

    def best(self, row):
        """The block chosen on held-out training images, by the mean over the seeds."""
        return int(self.blocks(row, 'held_out').mean(0).argmax())

    def probed(self, row):
        """Accuracies of a linear probe with few labels on the best block, one per seed."""
        found = self.blocks(row, self.probe)
        return found[:, self.best(row)] if len(found) else found


def cell(values, digits=1):
    """Mean ± standard error, or a dash."""
    if not len(values):
        return '–'
    text = f'{np.mean(values):.{digits}f}'
    return text + (f' ± {error(values):.{digits}f}' if len(values) > 1 else '')


def error(values):
    return np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan


def verdict(better, other, expected=1):
    """Cells of a difference: points ± standard error, and whether its sign is as expected."""
    if not len(better) or not len(other):
        return '–', '–'
    gain, spread = np.mean(better) - np.mean(other), np.hypot(error(better), error(other))
    if np.isnan(spread):
        return f'{gain:+.1f}', 'one seed'
    answer = 'not resolved' if abs(gain) <= 2 * spread else 'yes' if gain * expected > 0 else 'no'
    return f'{gain:+.1f} ± {spread:.1f}', answer


def table(header, rows):
    """A Markdown table, or nothing without rows."""
    if not rows:
        return ''
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def chosen(summary):
    rows = [[recipe, *(f'{number:g}' for number in np.atleast_1d(value)),
             *['–'] * (2 - np.size(value))] for recipe, value in summary.chosen.items()]
    return table(['chosen on held-out training images', 'learning rate', 'layer decay'], rows)


def fine_tuning(summary):
    labels = summary.labels
    rows = [[row, attention, *(cell(summary.tuned(row, n, attention)) for n in labels)]
            for row in MAIN for attention in ('bidirectional', 'causal')
            if any(len(summary.tuned(row, n, attention)) for n in labels)]
    for row, other in (('NEPA', 'random start'), ('NEPA', 'MAE'), ('NEPA', 'MAE, equal compute')):
        found = [verdict(summary.tuned(row, n), summary.tuned(other, n)) for n in labels]
        if any(points != '–' for points, _ in found):
            rows.append([f'gain of {row} over {other}', 'bidirectional',
                         *(f'{points}{" (not resolved)" * (answer == "not resolved")}'
                           for points, answer in found)])
    return table(['weights', 'attention', *(f'{n:,} labels' for n in labels)], rows)


def frozen(summary):
    scores = [*summary.linear, 'knn']
    titles = ['k-NN' if name == 'knn' else f'linear, {int(name.removeprefix("linear_")):,} labels'
              for name in scores]
    rows = []
    for row in (*MAIN, 'raw pixels'):
        found = summary.blocks(row, 'held_out')
        if not len(found):
            continue
        choices = {'–': 0} if row == 'raw pixels' else {
            f'best, {summary.best(row)}': summary.best(row), 'last': found.shape[1] - 1}
        for title, block in choices.items():
            rows.append([row, title, *(cell(summary.blocks(row, name)[:, block])
                                       for name in scores)])
    return table(['weights', 'block', *titles], rows)


def attentive(summary):
    rows = [[row, f'best, {summary.best(row)}', cell(summary.steps(row)['attentive'])]
            for row in ('NEPA', 'random start') if 'attentive' in summary.steps(row)]
    return table(['weights', 'block', f'attentive probe, {summary.most:,} labels'], rows)


def segmentation(summary):
    """Rows of segmentation with a linear head or UPerNet."""
    steps = sorted({step for step in summary.steps('NEPA') if step.startswith('segment')},
                   key=lambda step: (step.split('_')[1], int(step.split('_')[2])))
    titles = dict(frozen='linear head, frozen network', tuned='linear head, fine-tuned',
                  upernet='UPerNet, fine-tuned')
    rows = []
    for step in steps:
        _, kind, count = step.split('_')
        values = [np.array(summary.steps(row).get(step, [])) for row in ('random start', 'NEPA')]
        points, answer = verdict(values[1], values[0])
        rows.append([titles[kind], count, *map(cell, values), points, answer])
    return table(['protocol', 'labelled scenes', 'random start', 'NEPA', 'gain', 'helps'], rows)


def ablations(summary):
    rows = []
    for row in (
            'full', 'no causal mask', 'no shift', 'no stop-gradient', 'plain', 'LayerScale',
            'LayerScale, RoPE', 'gated MLP', 'plain, 40 % masked', 'plain, 60 % masked',
            'random start'):
        runs = summary.steps(row).get('pretrain', [])
        if not runs and not (rows and summary.steps(row)):      # the last one is not pretrained
            continue
        warned = {name for run in runs for name in run.get('warned', ())}
        rows.append([
            row, cell([run['loss'][-1] for run in runs], 3),
            *(cell([run['monitors'][name] for run in runs], 2)
              for name in ('lift', 'embedding_std')), ', '.join(sorted(warned)) or '–',
            cell(summary.probed(row)), cell(summary.tuned(row))])
    return table(['row', 'loss', 'lift', 'spread', 'warning', 'linear, best block',
                  'fine-tuned'], rows)


def claims(summary):
    """Compare the rows of CLAIMS by fine-tuning, like the paper, and by the linear probe."""
    rows = []
    for text, where, published, better, other in CLAIMS:
        expected = -1 if published[0] == '-' else 1
        if isinstance(other, str):
            tuned, probed = summary.tuned(other), summary.probed(other)
        else:       # the same weights, fine-tuned in another way
            tuned, probed = summary.tuned(other[0], kind=other[1]), []
        rows.append([text, where, published,
                     *verdict(summary.tuned(better), tuned, expected),
                     *verdict(summary.probed(better), probed, expected)])
    found = summary.blocks('NEPA', summary.probe)
    if len(found):
        rows.append(['An inner block beats the last one', '6', '–', '–', '–',
                     *verdict(summary.probed('NEPA'), found[:, -1])])
    return table(['claim', 'table', 'published', 'fine-tuned', 'reproduced',
                  'linear, best block', 'reproduced'], rows)


def scaling(summary):
    rows = [[title, cell([run['loss'][-1] for run in summary.steps(row)['pretrain']], 3),
             cell(summary.probed(row)), cell(summary.tuned(row))]
            for row, title in SCALING if 'pretrain' in summary.steps(row)]
    return table(['pretraining', 'loss', 'linear, best block', 'fine-tuned'], rows[1:] and rows)


def seeds(summary):
    """Say over how many seeds the standard errors are."""
    counts = {row: len(steps.get('blocks', [])) for row, steps in summary.rows.items()}
    most = max(counts.values())
    if most < 2:
        return 'There is one seed so far, so there are no standard errors.'
    rows = [row for row in counts if counts[row] == most]
    others = ' or '.join(map(str, sorted(set(counts.values()) - {0, most})))
    return f'± is the standard error, over {most} seeds' + (
        f' of {" and ".join(rows)}, and {others} of the other rows' if others else '') + '.'


def render(records):
    """The Markdown of a study; parts of which nothing has run are left out."""
    summary = Summary(records)
    runs = [run for row in summary.rows.values() for run in row.get('pretrain', [])]
    devices = ', '.join(sorted({run['device'] for run in runs}))
    versions = ', '.join(sorted({run['torch'] for run in runs}))
    first = summary.steps('NEPA')['pretrain'][0]
    labels = f'{summary.few:,} labels'
    parts = [
        f'Pretraining reads {first["images"]:,} images {first["epochs"]} times. Measured on '
        f'{devices} with torch {versions}. The steps took at least {records["hours"]:g} hours in '
        f'sum, in one process each. {seeds(summary)}',
        chosen(summary)]
    for title, text, found, (alt, picture) in (
            ('Fine-tuning', 'Top-1 in percent on the test images:', [fine_tuning(summary)],
             ('Accuracy by number of labels', 'labels')),
            ('Frozen features', 'Top-1 in percent on the test images. Blocks count from 0; the '
             'best one was chosen on held-out training images.',
             [frozen(summary), attentive(summary)],
             ('Accuracy of each block', 'blocks')),
            ('Segmentation', 'mIoU in percent on validation scenes of clothes:',
             [segmentation(summary)], ('Segmented scenes', 'scenes')),
            ('The ablations of the paper', 'Every row pretrains for a quarter of the epochs; '
             f'accuracies have {labels}. A negative lift is copying, which the monitor judges '
             'after 1,000 iterations:', [
                 ablations(summary), 'Does the direction of the paper reproduce? A difference '
                 'below two standard errors is not resolved:', claims(summary)], (None, None)),
            ('Scaling', f'Accuracies have {labels}:', [scaling(summary)],
             ('Loss and accuracy against compute', 'curves'))):
        if found[0]:
            parts += [f'### {title}', text, *found]
            parts += [f'![{alt}](study_{picture}.png)'] * bool(alt)
    parts += ['### What it expects', '![Predicted clothes](study_prediction.png)']
    return '\n\n'.join(part for part in parts if part) + '\n'


def plot_labels(summary, path):
    """Plot accuracy after fine-tuning against the number of labels."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout='constrained')
    for row, colour in COLOURS.items():
        found = [(n, summary.tuned(row, n)) for n in summary.labels]
        found = [(n, np.mean(v), error(v)) for n, v in found if len(v)]
        if found:
            labels, means, errors = zip(*found)
            axes.errorbar(labels, means, [2 * e for e in errors], color=colour, marker='o',
                          markersize=4, capsize=3, label=row)
    axes.set(xscale='log', xlabel='labelled images', ylabel='top-1 on test images, %',
             title='Fine-tuning on Fashion-MNIST (bars: two standard errors)')
    axes.set_xticks(summary.labels, [f'{n:,}' for n in summary.labels])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_blocks(summary, path):
    """Plot the accuracy of a linear probe on each block."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout='constrained')
    for row, colour in COLOURS.items():
        found = summary.blocks(row, summary.probe)
        if len(found):
            axes.errorbar(range(found.shape[1]), found.mean(0), [2 * error(v) for v in found.T],
                          color=colour, marker='o', markersize=4, capsize=3, label=row)
    pixels = summary.blocks('raw pixels', summary.probe)
    if len(pixels):
        axes.axhline(pixels.mean(), color='#0f172a', linestyle=':', label='raw pixels')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel='block', ylabel='top-1 on test images, %',
             title=f'Linear probe with {summary.few:,} labels (bars: two standard errors)')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right center', frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curves(summary, path):
    """Plot loss and accuracy against the length of pretraining."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout='constrained')
    for row, colour in (('full', '#93c5fd'), ('half the epochs', '#3b82f6'), ('NEPA', '#1d4ed8'),
                        ('width 192', '#15803d')):
        runs = summary.steps(row).get('pretrain', [])
        if runs:
            curves = np.array([run['loss'] for run in runs])
            x = (np.arange(curves.shape[1]) + 0.5) / curves.shape[1] * runs[0]['epochs']
            low, high = curves.min(0), curves.max(0)
            left.plot(x, curves.mean(0), color=colour, label=dict(SCALING)[row])
            left.fill_between(x, low, high, color=colour, alpha=0.3, linewidth=0)
    left.set(xlabel='epochs', ylabel='loss', title='Loss (bands: all seeds)')
    for rows, cost, colour in ((('full', 'half the epochs', 'NEPA'), 1, COLOURS['NEPA']),
                               (('MAE', 'MAE, equal compute'), None, COLOURS['MAE'])):
        points = [(summary.steps(row)['pretrain'][0]['epochs'], summary.tuned(row))
                  for row in rows if len(summary.tuned(row))]
        if points:
            base = points[-1][0] if cost is None else 1
            scale = summary.steps('NEPA')['pretrain'][0]['epochs'] / base if cost is None else 1
            right.errorbar([epochs * scale for epochs, _ in points],
                           [np.mean(values) for _, values in points],
                           [2 * error(values) for _, values in points], color=colour, marker='o',
                           capsize=3, label=rows[-1].partition(',')[0])
    right.set(xlabel='compute, in epochs of NEPA', ylabel='top-1 on test images, %',
              title=f'Fine-tuned, {summary.few:,} labels (bars: two standard errors)')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(work_dir, docs=False):
    """Write tables and pictures of a study; with ``docs``, those of docs/results.md, too."""
    work_dir = Path(work_dir)
    if not any(work_dir.glob('runs/NEPA_*/pretrain.json')):
        raise FileNotFoundError(f'{work_dir} holds no study with a finished pretraining of NEPA; '
                                'run study.py first.')
    records = collect(work_dir)
    text, summary = render(records), Summary(records)
    (work_dir / 'results.md').write_text(text)
    (work_dir / 'results.json').write_text(json.dumps(records))
    for plot in (plot_labels, plot_blocks, plot_curves):
        picture = work_dir / f'study_{plot.__name__.removeprefix("plot_")}.png'
        plot(summary, picture)
    if docs:
        for picture in work_dir.glob('study_*.png'):
            shutil.copy(picture, REPO / 'resources')
        shutil.copy(work_dir / 'results.json', REPO / 'resources' / 'study.json')
        page = REPO / 'docs' / 'results.md'
        page.write_text(insert(page.read_text(), text))


def insert(page, text):
    """Put the Markdown of a study between the marks of a page, with links to its pictures."""
    text = text.replace('](study_', '](../resources/study_')
    return re.sub('(?<=<!-- study -->\n).*(?=<!-- end of study -->)', lambda _: f'\n{text}\n', page,
                  flags=re.DOTALL)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    with user_errors():
        write(args.work_dir, args.docs)


if __name__ == '__main__':
    sys.exit(main())
