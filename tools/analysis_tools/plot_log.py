"""Plot the logs of one or more runs in one figure.

    python tools/analysis_tools/plot_log.py work_dirs/RUN [work_dirs/RUN ...] --out page.png

Pretraining: loss, lift, k-NN and linear probe, effective ranks and standard deviation, see
NEPAMonitorHook and OnlineProbeHook. Fine-tuning and segmentation: loss, accuracy or mIoU of the
validation. All: learning rate. A panel that no run has values for is left out. There is one colour
per run, over epochs if all runs count them. A resumed run is one curve.
"""
from nepa_mm_cli import tool_parser


def parse_args(argv=None):
    parser = tool_parser(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='work directory of a run')
    parser.add_argument('--out', default='log.png', help='image to write; a number is appended if '
                        'it exists (default: log.png)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()    # before the slow imports

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

from nepa_mm.apis import user_errors
from nepa_mm.utils.outputs import free_path

COLUMNS = 3
PANELS = {  # title: {scalar: (line style, label)}
    'loss': dict(loss=('-', None)),
    'lift: cosine with the next patch minus with the last one read': dict(lift=('-', None)),
    'top-1 accuracy on frozen features, %': dict(
        knn_top1_ema=('-', 'k-NN, EMA'), knn_top1=('--', 'k-NN, raw'),
        linear_top1_ema=('-.', 'linear, EMA'), linear_top1=(':', 'linear, raw')),
    'effective rank of the embeddings': dict(embedding_rank=('-', None)),
    'effective rank of the outputs': dict(output_rank=('-', None)),
    'standard deviation, normalised vectors x sqrt(D)': dict(
        embedding_std=('-', 'embeddings'), output_std=('--', 'outputs')),
    'accuracy of the validation, %': {
        'accuracy/top1': ('-', 'top-1'), 'accuracy/top5': ('--', 'top-5')},
    'segmentation of the validation, %': dict(
        mIoU=('-', 'mIoU'), mAcc=('--', 'mean class accuracy'), aAcc=(':', 'pixel accuracy')),
    'learning rate': dict(lr=('-', None)),
}


def read_run(path):
    """Read the scalars of a run.

    Args:
        path (str | Path): The work directory. The logs of resumed parts are joined; where they
            overlap, the later one is used.

    Returns:
        list[dict]: One dict of scalars per logged iteration or validation, in order; each has
        ``iter``, of a validation the iteration before it.

    Raises:
        FileNotFoundError: The directory has no ``*/vis_data/scalars.json``.
        ValueError: The files hold no training log.
    """
    files = sorted(Path(path).glob('*/vis_data/scalars.json'))   # folders are named by time
    if not files:
        raise FileNotFoundError(f'no */vis_data/scalars.json in {str(path)!r}; give the work '
                                'directory of a run.')
    parts = [read_lines(file) for file in files]
    per_epoch = iters_per_epoch([row for part in parts for row in part if 'iter' in row])
    rows = []
    for part in parts:
        part = list(place_validations(part, per_epoch))
        if part:
            rows = [row for row in rows if row['iter'] < part[0]['iter']] + part
    if not rows:
        raise ValueError(f'no training log in {str(path)!r}: its scalars.json files are empty.')
    return rows


def place_validations(rows, per_epoch):
    """Give ``iter`` to the rows of validations, which have ``step``, an iteration or an epoch."""
    last = None
    for row in rows:
        if 'iter' in row:
            last = row['iter']
            yield row
        elif last is not None and isinstance(row.get('step'), (int, float)):
            meanings = (row['step'], row['step'] * (per_epoch or 1))
            yield dict(row, iter=min(meanings, key=lambda value: abs(value - last)))


def read_lines(file):
    """Read the dicts of a file of JSON lines; print the number of truncated lines.

    A kill or a full disk truncates lines.
    """
    rows, cut = [], 0
    for line in file.read_text(errors='replace').splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            cut += 1
    if cut:
        print(f'Skipped {cut} of {len(rows) + cut} lines of {file}: they are truncated.')
    return rows


def iters_per_epoch(rows):
    """Estimate the iterations per epoch from the log; return None if it counts no epochs."""
    # at iteration i of epoch e, i / e is at most the length of an epoch, reached at its end
    return max((row['iter'] / row['epoch'] for row in rows if row.get('epoch')), default=None)


def points(rows, key):
    """Return the pairs (iteration, value) of a scalar; other values than finite ones are skipped.
    """
    return [(row['iter'], row[key]) for row in rows
            if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]


def draw(runs, out):
    """Draw the figure.

    Args:
        runs (dict[str, list[dict]]): Rows from :func:`read_run` by displayed name.
        out (str | Path): The image file; its suffix sets the format.
    """
    epochs = {name: iters_per_epoch(rows) for name, rows in runs.items()}
    by_epoch = all(epochs.values())
    panels = {title: curves for title, curves in PANELS.items()
              if any(points(rows, key) for rows in runs.values() for key in curves)}
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(16 / 3 * columns, 4.5 * lines),
                                sharex=True, squeeze=False, layout='constrained')
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel('epoch' if by_epoch else 'iteration')
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        for index, (name, rows) in enumerate(runs.items()):
            for key, (style, _) in curves.items():
                line = points(rows, key)
                if line:
                    x, y = zip(*line)
                    axis.plot([value / (epochs[name] if by_epoch else 1) for value in x], y, style,
                              color=f'C{index}', lw=1.5, marker='.' if len(x) < 20 else None)
        if len(curves) > 1:
            axis.legend(handles=[
                plt.Line2D([], [], color='gray', ls=style, label=label)
                for key, (style, label) in curves.items()
                if any(points(rows, key) for rows in runs.values())],
                loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8)
        if 'lift' in curves:
            axis.axhline(0, color='gray', lw=0.8)
    figure.legend(handles=[plt.Line2D([], [], color=f'C{index}', label=name)
                           for index, name in enumerate(runs)],
                  loc='outside upper center', ncols=4)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    args = parse_args(argv)
    with user_errors():
        runs = {run.rstrip('/'): read_run(run) for run in args.runs}
        if Path(args.out).suffix[1:] not in plt.gcf().canvas.get_supported_filetypes():
            raise ValueError(f'--out must be an image file such as log.png, got {args.out}.')
        known = {key for curves in PANELS.values() for key in curves}
        if not any(points(rows, key) for rows in runs.values() for key in known):
            raise ValueError(f'The logs of {", ".join(runs)} have nothing to plot: no '
                             f'{", ".join(sorted(known))}.')
    short = {name: Path(name).name for name in runs}
    if len(set(short.values())) == len(runs):
        runs = {short[name]: rows for name, rows in runs.items()}
    out = free_path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, out)
    print(f'Wrote {out}.')


if __name__ == '__main__':
    main()
