"""Command lines, processes and small runs of the demos."""
import contextlib
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nepa_mm_cli import tool_parser


def parse_args(description, argv, name, seeds, seeds_help, rows=(), default_rows=()):
    """Parse a demo's command line.

    Args:
        description (str): Docstring of the demo.
        argv (list[str] | None): The command line; None for the process's own.
        name (str): The folder below ``work_dirs``.
        seeds (int): Default of ``--seeds``.
        seeds_help (str): What ``--seeds`` counts.
        rows (Sequence[str]): Choices of ``--rows``; the option exists if there are any.
            Defaults to ().
        default_rows (Sequence[str]): Default of ``--rows``. Defaults to ().

    Returns:
        Namespace: ``work_dir`` (Path), ``epochs``, ``seeds`` and, with ``rows``, ``rows``.
    """
    parser = tool_parser(description)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs', name),
                        help=f'output folder (default: work_dirs/{name})')
    parser.add_argument('--epochs', type=int, default=60,
                        help='epochs of pretraining (default: 60)')
    parser.add_argument('--seeds', type=int, default=seeds,
                        help=f'{seeds_help} (default: {seeds})')
    if rows:
        parser.add_argument('--rows', nargs='+', metavar='ROW', choices=rows, default=default_rows,
                            help=f'rows of the table, of: {", ".join(rows)} (default: '
                                 f'{", ".join(default_rows)})')
    return parser.parse_args(argv)


def scene_parser(description, out):
    """Return the parser of a tool that writes scenes to ``out`` by default."""
    parser = tool_parser(description)
    parser.add_argument('--out', default=out, help=f'where scenes go (default: {out})')
    parser.add_argument('--train', type=int, default=100, help='training scenes (default: 100)')
    parser.add_argument('--val', type=int, default=100, help='validation scenes (default: 100)')
    parser.add_argument('--seed', type=int, default=0, help='(default: 0)')
    return parser


def claim_work_dir(args, name):
    """Claim the folder of a demo, or exit with one sentence."""
    from nepa_mm.apis import user_errors
    from nepa_mm.utils.outputs import claim_folder
    with user_errors():
        claim_folder(args.work_dir, f'.nepa_mm_{name}')


def process_pool(jobs=None):
    """Return a pool of ``jobs`` single-threaded processes (default: one per core)."""
    return ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context('spawn'),
                               prepare_process)


def prepare_process():
    """Use one thread, and compile nothing: the networks of the demos are small and many."""
    import torch
    torch.set_num_threads(1)
    torch.compiler.set_stance('force_eager')


def train(config, work_dir, options, hook=None, resume=False):
    """Train like tools/train.py, but log to the log file only.

    Args:
        config (str | Path): The config file.
        work_dir (str | Path): Where logs and checkpoints go.
        options (dict): Changes to the config, like ``--cfg-options``.
        hook (Hook, optional): An additional hook. Defaults to None.
        resume (bool): Whether to continue an interrupted run. Defaults to False.

    Returns:
        Runner: The Runner after training.
    """
    from nepa_mm.apis import build_runner, load_config
    with contextlib.redirect_stdout(io.StringIO()):
        # short trials are intended
        options = {'default_hooks.run_check.odd': 'warn', **options}
        cfg = load_config(config, options, str(work_dir))
        cfg.resume = resume
        runner = build_runner(cfg)
        if hook:
            runner.register_hook(hook)
        runner.train()
    return runner


def train_on_few_labels(config, work_dir, labels, epochs, seed, checkpoint=None, options=None):
    """Train a classifier on a few labelled images.

    Args:
        config (str | Path): The config file.
        work_dir (str | Path): Where the log goes; no checkpoint is saved.
        labels (int): Number of labelled images.
        epochs (int): Number of epochs.
        seed (int): Seed of the run and of the choice of labelled images.
        checkpoint (str | Path, optional): Initial weights of the backbone. Defaults to None:
            random.
        options (dict, optional): More changes to the config. Defaults to None.

    Returns:
        float: Top-1 accuracy on the test images in percent.
    """
    changes = {
        'train_dataloader.dataset.num_labels': labels, 'train_dataloader.dataset.seed': seed,
        'randomness.seed': seed, 'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs, 'param_scheduler.end': epochs,
        'default_hooks.checkpoint': None}
    if checkpoint is None:
        changes['model.backbone.init_cfg'] = None
    else:
        changes['model.backbone.init_cfg.checkpoint'] = str(checkpoint)
    runner = train(config, work_dir, {**changes, **(options or {})})
    return runner.message_hub.get_scalar('val/accuracy/top1').current()
