"""Reading a config, and what a run starts from."""
import os
from pathlib import Path

from mmengine.config import Config

from nepa_mm.apis.cfg_options import merge_options
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint
from nepa_mm.utils.nested import dicts
from nepa_mm.utils.outputs import free_path

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def load_config(path, cfg_options=None, work_dir=None, launcher='none', reads=None, unread=()):
    """Read a config file and merge what every tool's command line can change.

    Args:
        path (str): The config file.
        cfg_options (dict, optional): ``--cfg-options``; wins over the file.
        work_dir (str, optional): ``--work-dir``; wins over the file, which wins over the default
            ``work_dirs/<name of the config>``.
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'. Defaults to 'none'.
        reads, unread: Which options the tool reads, see
            :func:`nepa_mm.apis.cfg_options.merge_options`. Default to what a Runner reads.

    Returns:
        Config: The merged config.

    Raises:
        FileNotFoundError: If the file, or a base of it, does not exist.
        ValueError: If an option has no effect.
    """
    cfg = Config.fromfile(path)
    flags = dict(launcher='use the flag --launcher')
    if work_dir:
        flags['work_dir'] = f'--work-dir {work_dir} is given as well'
    merge_options(cfg, cfg_options or {}, reads, {**flags, **dict(unread)})
    name = os.path.splitext(os.path.basename(path))[0]
    cfg.work_dir = work_dir or cfg.get('work_dir') or os.path.join('work_dirs', name)
    cfg.launcher = launcher
    return cfg


def resolve_resume(cfg, resume=None):
    """Decide what training starts from, and check that those files are there.

    Our configs resume by default. mmengine takes ``load_from`` of a resuming run for the
    checkpoint to resume, so a run that only starts from those weights would inherit their epoch
    and optimizer. Here ``load_from`` means weights, used as long as ``work_dir`` holds no
    checkpoint of the run itself.

    Args:
        cfg (Config): Changed in place (``resume`` and ``load_from``).
        resume (str | bool, optional): 'auto': from the newest checkpoint in ``work_dir``, or from
            the start if there is none; a path: from that checkpoint; False: never; None: as the
            config says. Defaults to None.

    Raises:
        FileNotFoundError: If a checkpoint to resume or to load (``load_from``, or an ``init_cfg``
            of type 'Pretrained') does not exist.
    """
    for node in dicts(cfg.get('model')):
        if node.get('type') == 'Pretrained':
            check_checkpoint(node['checkpoint'], "init_cfg of type 'Pretrained'")
    if resume:      # asked for, so another experiment is meant
        hooks = cfg.setdefault('default_hooks', {})
        hooks.run_check = dict(hooks.get('run_check') or dict(type='RunCheckHook'),
                               other_experiment='warn')
    if resume not in (None, False, 'auto'):
        check_checkpoint(resume, '--resume')
        cfg.resume, cfg.load_from = True, resume
        return
    if resume is not None:
        cfg.resume = resume == 'auto'
    if cfg.get('load_from'):
        if cfg.get('resume') and find_resumable_checkpoint(cfg.work_dir)[0]:
            cfg.load_from = None
        else:
            check_checkpoint(cfg.load_from, 'load_from')
            cfg.resume = False


def check_checkpoint(path, what):
    """Refuse a checkpoint that does not exist; addresses (``https://``) are left alone.

    Raises:
        FileNotFoundError: If ``path`` is no file and no folder; the message names ``what`` asked
            for it.
    """
    if '://' not in path and not os.path.exists(path):
        raise FileNotFoundError(f'no checkpoint file {path!r}, which was given as {what}.')


def spare_config(cfg):
    """Let the copy of a config that a Runner writes not take the place of the config itself."""
    file, copy = Path(cfg.filename or ''), Path(cfg.work_dir) / Path(cfg.filename or '').name
    if copy.is_file() and copy.samefile(file) and cfg.pretty_text != file.read_text():
        object.__setattr__(cfg, '_filename', str(free_path(copy)))


def check_complete(cfg, stage):
    """Refuse half of what a stage needs; mmengine would print the other half.

    Raises:
        ValueError: The sentence says what is missing.
    """
    if not isinstance(cfg.get('model'), dict):
        raise ValueError('The config has no model.')
    needed = dict(train=('train_dataloader', 'train_cfg', 'optim_wrapper'),
                  **{name: (f'{name}_dataloader', f'{name}_cfg', f'{name}_evaluator')
                     for name in ('val', 'test')})
    for name, keys in needed.items():
        missing = [key for key in keys if cfg.get(key) is None]
        if missing and (name == stage or len(missing) < 3):
            raise ValueError(f'The config has no {" and no ".join(missing)}; a run that '
                             f'{dict(val="validate", test="test").get(name, name)}s needs '
                             f'{", ".join(keys)}.')
    for name in LOADERS:
        if cfg.get(name) and not isinstance(cfg[name].get('dataset'), dict):
            raise ValueError(f'{name}.dataset must be a dict, got {cfg[name].get("dataset")!r}.')
