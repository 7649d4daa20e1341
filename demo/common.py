"""Small runs from within a program: what `make demo` and `make ablations` share."""
import contextlib
import io

from nepa_mm.apis import build_runner, load_config


def train(config, work_dir, options, hook=None):
    """What tools/train.py does, with the console's log kept for the log file alone.

    Args:
        config (str | Path): The config file.
        work_dir (str | Path): Where logs and checkpoints go; never resumed from.
        options (dict): Changes to the config, as ``--cfg-options`` makes them.
        hook (Hook, optional): One more hook. Defaults to None.

    Returns:
        Runner: After training.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        # a shorter trial is meant to be one
        options = {'default_hooks.run_check.odd': 'warn', **options}
        cfg = load_config(config, options, str(work_dir))
        cfg.resume = False
        runner = build_runner(cfg)
        if hook:
            runner.register_hook(hook)
        runner.train()
    return runner


def train_on_few_labels(config, work_dir, labels, epochs, seed, checkpoint=None):
    """Top-1 in percent of a classifier of digits after training on a few labelled ones.

    Args:
        config (str | Path): The config file.
        work_dir (str | Path): Where the log goes; there is no checkpoint.
        labels (int): How many labelled images.
        epochs (int): How often they are seen.
        seed (int): Of the run, and of which images are labelled.
        checkpoint (str | Path, optional): Where the backbone starts. Defaults to None:
            from scratch.

    Returns:
        float: Accuracy on the test digits.
    """
    options = {
        'train_dataloader.dataset.num_labels': labels, 'train_dataloader.dataset.seed': seed,
        'randomness.seed': seed, 'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs, 'param_scheduler.end': epochs,
        'default_hooks.checkpoint': None}
    if checkpoint is None:
        options['model.backbone.init_cfg'] = None
    else:
        options['model.backbone.init_cfg.checkpoint'] = str(checkpoint)
    runner = train(config, work_dir, options)
    return runner.message_hub.get_scalar('val/accuracy/top1').current()
