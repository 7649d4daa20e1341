"""Plot the logs of one or more pretraining runs in one figure.

    python tools/analysis_tools/plot_log.py work_dirs/RUN [work_dirs/RUN ...] --out page.png

Plots loss, lift, k-NN and linear probe, effective ranks and standard deviation over epochs, one
colour per run. Values that a run did not log are skipped. A resumed run is one curve. See
NEPAMonitorHook and OnlineProbeHook for the values.
"""
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

from nepa_mm.apis import tool_parser, user_errors
from nepa_mm.utils.outputs import free_path

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
}


def read_run(path):
    """Read the scalars of a run.

    Args:
        path (str | Path): The work directory. The logs of resumed parts are joined; where they
            overlap, the later one is used.

    Returns:
        list[dict]: One dict of scalars per logged iteration, in order; each has ``iter``.

    Raises:
        FileNotFoundError: The directory has no ``*/vis_data/scalars.json``.
        ValueError: The files hold no training log.
    """
    files = sorted(Path(path).glob('*/vis_data/scalars.json'))   # folders are named by time
    if not files:
        raise FileNotFoundError(f'no */vis_data/scalars.json in {str(path)!r}; give the work '
                                'directory of a run.')
    rows = []
    for file in files:
        part = [row for row in read_lines(file) if 'iter' in row]   # validation rows have none
        if part:
            rows = [row for row in rows if row['iter'] < part[0]['iter']] + part
    if not rows:
        raise ValueError(f'no training log in {str(path)!r}: its scalars.json files are empty.')
    return rows


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


def draw(runs, out):
    """Draw the figure.

    Args:
        runs (dict[str, list[dict]]): Rows from :func:`read_run` by displayed name.
        out (str | Path): The image file; its suffix sets the format.
    """
    epochs = {name: iters_per_epoch(rows) for name, rows in runs.items()}
    by_epoch = all(epochs.values())
    figure, axes = plt.subplots(2, 3, figsize=(16, 9), sharex=True, layout='constrained')
    for axis, (title, curves) in zip(axes.flat, PANELS.items()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel('epoch' if by_epoch else 'iteration')
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        for index, (name, rows) in enumerate(runs.items()):
            for key, (style, _) in curves.items():
                points = [(row['iter'] / (epochs[name] if by_epoch else 1), row[key])
                          for row in rows if math.isfinite(row.get(key, math.nan))]
                if points:
                    axis.plot(*zip(*points), style, color=f'C{index}', lw=1.5,
                              marker='.' if len(points) < 20 else None)
        if not axis.lines:
            axis.text(0.5, 0.5, 'not logged', ha='center', transform=axis.transAxes, color='gray')
        elif len(curves) > 1:
            axis.legend(handles=[
                plt.Line2D([], [], color='gray', ls=style, label=label)
                for style, label in curves.values()],
                loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8)
    axes[0, 1].axhline(0, color='gray', lw=0.8)
    figure.legend(handles=[plt.Line2D([], [], color=f'C{index}', label=name)
                           for index, name in enumerate(runs)],
                  loc='outside upper center', ncols=4)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv=None):
    """Run the tool with ``argv`` (default: the command line)."""
    parser = tool_parser(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='work directory of a run')
    parser.add_argument('--out', default='log.png', help='image to write; a number is appended if '
                        'it exists (default: log.png)')
    args = parser.parse_args(argv)
    with user_errors():
        runs = {run.rstrip('/'): read_run(run) for run in args.runs}
    short = {name: Path(name).name for name in runs}
    if len(set(short.values())) == len(runs):
        runs = {short[name]: rows for name, rows in runs.items()}
    out = free_path(args.out)
    draw(runs, out)
    print(f'Wrote {out}.')


if __name__ == '__main__':
    main()
