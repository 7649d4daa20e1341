"""Load a config, and choose between resuming and starting from weights."""
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmengine.config import Config

from nepa_mm.apis.cfg_options import merge_options
from nepa_mm.apis.config_keys import runner_keys
from nepa_mm.apis.settings import (
    check_inheritance,
    evaluate_with,
    find_settings,
    nearest_setting,
)
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint
from nepa_mm.compat.quiet import import_mmseg, quiet_imports
from nepa_mm.utils.nested import iter_dicts
from nepa_mm.utils.outputs import free_path

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def read_config(path: str | os.PathLike) -> Config:
    """Read a config file, and import mmseg for one that needs it, without messages of imports."""
    with quiet_imports():
        cfg = Config.fromfile(path)
    check_inheritance(cfg)
    if is_segmentation(cfg):
        import_mmseg()
    return cfg


def load_config(path: str | os.PathLike, cfg_options: Mapping | None = None,
                work_dir: str | None = None, launcher: str = 'none',
                reads: Iterable[str] | None = None, unread: Mapping[str, str] | None = None
                ) -> Config:
    """Read a config file and merge the command-line settings that all tools share.

    Args:
        path (str | Path): The config file.
        cfg_options (dict, optional): ``--cfg-options``; overrides the file. An option that names
            a setting, a literal at the top of the file or of one of its bases, changes all that
            is derived from it.
        work_dir (str, optional): ``--work-dir``; overrides the file. Without both, ``work_dir`` is
            ``work_dirs/<name of the config>``.
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'. Defaults to 'none'.
        reads, unread: See :func:`nepa_mm.apis.cfg_options.merge_options`.

    Returns:
        Config: The merged config.

    Raises:
        FileNotFoundError: The file, or one of its bases, does not exist.
        ValueError: An option has no effect, or the file sets a name that its bases have read.
    """
    cfg = read_config(path)
    flags = dict(launcher='use the flag --launcher')
    if work_dir:
        flags['work_dir'] = f'--work-dir {work_dir} is given as well'
    cfg, options = apply_settings(cfg, cfg_options or {}, reads)
    merge_options(cfg, options, reads, {**flags, **(unread or {})})
    name = os.path.splitext(os.path.basename(path))[0]
    cfg.work_dir = work_dir or cfg.get('work_dir') or os.path.join('work_dirs', name)
    cfg.launcher = launcher
    return cfg


def apply_settings(cfg: Config, options: Mapping, reads: Iterable[str] | None = None
                   ) -> tuple[Config, dict]:
    """Evaluate the file of a config with the options that are its settings.

    Literals that the Runner reads itself, such as ``resume``, are no settings.

    Args:
        cfg (Config): The config, as read from its file.
        options (dict): ``--cfg-options``.
        reads (Iterable[str], optional): Top-level keys that the tool reads. Defaults to None: all.

    Returns:
        tuple[Config, dict]: The new config, and the other options.

    Raises:
        ValueError: A name resembles a setting, nothing that the tool reads follows a setting, or
            :func:`evaluate_with` rejects a value.
    """
    if all('.' in name for name in options):
        return cfg, dict(options)
    read = runner_keys(cfg)
    settings = {name: value for name, value in find_settings(cfg.filename).items()
                if name not in read}
    chosen = {name: options[name] for name in settings if name in options}
    for name in options:
        meant = nearest_setting(name, settings)
        if name not in cfg and name not in read and meant:
            raise ValueError(f'nothing reads {name}; the nearest setting of {cfg.filename} is '
                             f'{meant}.')
    if not chosen:
        return cfg, dict(options)
    for name, value in chosen.items() if reads else ():
        one = evaluate_with(cfg, {name: value})
        if value != settings[name] and all(one.get(key) == cfg.get(key) for key in reads):
            raise ValueError(f'{name} has no effect here: this tool reads '
                             f'{", ".join(sorted(reads))}, and none of them follows it.')
    return evaluate_with(cfg, chosen), {
        name: value for name, value in options.items() if name not in chosen}


def is_segmentation(cfg: Config) -> bool:
    """Return whether a config belongs to mmseg."""
    return cfg.get('default_scope') == 'mmseg'


def resolve_resume(cfg: Config, resume: str | bool | None = None) -> None:
    """Decide what training starts from, and check that those files exist.

    Our configs resume by default. mmengine resumes from ``load_from`` if ``resume`` is set, so a
    run that only starts from those weights would inherit their epoch and optimizer. Here
    ``load_from`` means weights, used until ``work_dir`` holds a checkpoint of the run itself.

    Args:
        cfg (Config): Changed in place (``resume`` and ``load_from``).
        resume (str | bool, optional): 'auto' resumes from the checkpoint with the most progress in
            ``work_dir``, or
            starts anew if there is none; a path resumes from that checkpoint; False never resumes;
            None follows the config. Defaults to None.

    Raises:
        FileNotFoundError: A checkpoint to resume or to load (``load_from``, or an ``init_cfg`` of
            type 'Pretrained') does not exist.
    """
    for node in iter_dicts(cfg.get('model')):
        if node.get('type') == 'Pretrained':
            check_checkpoint(node['checkpoint'], "init_cfg of type 'Pretrained'")
    if resume:      # an explicit --resume may cross experiments
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


def check_checkpoint(path: str, given_as: str) -> None:
    """Reject a checkpoint that does not exist; URLs (``https://``) are not checked.

    Raises:
        FileNotFoundError: ``path`` is neither a file nor a folder; the message names ``given_as``,
            the option that holds the path.
    """
    if '://' not in path and not os.path.exists(path):
        raise FileNotFoundError(f'The checkpoint {path!r}, given as {given_as}, does not exist.')


def keep_config_file(cfg: Config) -> None:
    """Rename the copy of the config that a Runner writes if it would overwrite the original."""
    file, copy = Path(cfg.filename or ''), Path(cfg.work_dir) / Path(cfg.filename or '').name
    if copy.is_file() and copy.samefile(file) and cfg.pretty_text != file.read_text():
        object.__setattr__(cfg, '_filename', str(free_path(copy)))


def check_complete(cfg: Config, stage: str) -> None:
    """Reject an incomplete stage; mmengine's message would print the keys that are present.

    Args:
        cfg (Config): The config.
        stage (str): 'train' or 'test'.

    Raises:
        ValueError: The message names the missing keys.
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
                             f'{dict(val="validate").get(name, name)}s needs {", ".join(keys)}.')
    for name in LOADERS:
        if cfg.get(name) and not isinstance(cfg[name].get('dataset'), dict):
            raise ValueError(f'{name}.dataset must be a dict, got {cfg[name].get("dataset")!r}.')
