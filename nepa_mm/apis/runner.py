"""What tools/train.py and tools/test.py share: from a config to a Runner.

Bad input (a missing data set, a missing checkpoint, more processes than GPUs ...) is found here,
before anything is built, and reported in one sentence. Where there is no GPU, several processes
talk through gloo, which mmengine by itself does not offer.
"""
import atexit
import ctypes
import gc
import os
import subprocess
from contextlib import suppress

import torch
from mmengine.device import get_device
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import distributed

from nepa_mm.apis.config import LOADERS, check_complete, spare_config
from nepa_mm.apis.run_check import RunCheckHook
from nepa_mm.apis.schedule_checks import check_batches, check_length
from nepa_mm.apis.user_errors import part
from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.datasets.pipelines import use_one_reader
from nepa_mm.utils.errors import UnreadableImageError
from nepa_mm.utils.nested import dicts
from nepa_mm.utils.random_state import preserve_rng_state

# How each launcher tells a process its place; mmengine reads the same variables.
LAUNCHER_VARIABLES = dict(
    pytorch=dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK'),
    slurm=dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID'),
    mpi=dict(RANK='OMPI_COMM_WORLD_RANK', WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
             LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK'))


def build_runner(cfg):
    """Build the Runner of a config, on GPUs or on the CPU, alone or among several processes.

    Args:
        cfg (Config): With ``work_dir`` and ``launcher``; changed in place, so that the config
            saved beside the checkpoints shows what was run.

    Returns:
        Runner: Ready for ``train()`` or ``test()``. What was changed here stands in its log.

    Raises:
        ValueError: If the launcher's variables are missing, if there are more processes than
            GPUs, or if ``auto_scale_lr`` is on without a ``base_batch_size``.
    """
    keep_freed_memory()
    world_size = _read_launcher(cfg.launcher)
    notes = scale_lr(cfg, world_size)
    fill_dataloaders(cfg)
    if cfg.launcher != 'none' and get_device() == 'cpu':
        notes += _prepare_cpu_group(cfg)
    runner: Runner = RUNNERS.build(cfg)
    for note in notes:
        runner.logger.info(note)
    if not any(isinstance(hook, RunCheckHook) for hook in runner.hooks):
        runner.register_hook(RunCheckHook())
    return runner


def start_runner(cfg, start, stage):
    """Build the Runner of a tool, and all that it would build later.

    Args:
        cfg (Config): See :func:`build_runner`.
        start (Start): What :func:`user_errors` yields.
        stage (str): 'train' or 'test'.

    Returns:
        Runner: Its ``train()`` or ``test()`` builds nothing more.

    Raises:
        ValueError: Something cannot be built; the sentence begins with the part of the config.
    """
    check_complete(cfg, stage)
    spare_config(cfg)
    start.before_writing(cfg)
    if cfg.get('default_scope') == 'mmseg':
        from nepa_mm.apis.segmentation_checks import check_not_empty
        init_default_scope('mmseg')     # in which nepa_mm:: looks for names
        check_not_empty(cfg, *(['test_dataloader'] if stage == 'test' else LOADERS[:2]))
    with part('config'):
        runner = build_runner(cfg)
    runner.register_hook(start)
    run_check, = [hook for hook in runner.hooks if isinstance(hook, RunCheckHook)]
    if stage == 'test':
        with part('test_dataloader'):
            look_at(runner, 'test_dataloader', runner.test_loop.dataloader.dataset,
                    runner.test_loop.evaluator.metrics)
        return runner
    # the loader first, for workers of an iteration-based loop begin with the loop
    with part('train_dataloader'):
        loader = runner._train_dataloader = runner.build_dataloader(
            runner._train_dataloader, seed=runner.seed,
            diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False))
        look_at(runner, 'train_dataloader', loader.dataset)
    check_batches(runner, loader)
    run_check.check_training_data(runner, loader.dataset)
    with part('train_cfg'):
        check_length(runner.train_loop)     # a property that builds
    with part('optim_wrapper'):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    with part('param_scheduler'):
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    with part('val_dataloader'):
        if runner.val_loop is not None:
            look_at(runner, 'val_dataloader', runner.val_dataloader.dataset,
                    runner.val_loop.evaluator.metrics)
    return runner


def look_at(runner, name, dataset, metrics=()):
    """Let our reader read a data set, look at masks, and make a sample, which tries its steps.

    Args:
        runner (Runner): Built, not started.
        name (str): Name of the dataloader.
        dataset (Dataset): Its data set; no worker has it yet.
        metrics (list[BaseMetric]): Of its evaluator. Defaults to none.
    """
    use_one_reader(dataset, runner.model)
    if runner.cfg.get('default_scope') == 'mmseg':
        from nepa_mm.apis.segmentation_checks import check_masks
        check_masks(runner, dataset, name, metrics)
    with preserve_rng_state(), suppress(UnreadableImageError, IndexError):
        dataset[0]


def keep_freed_memory():
    """Without a GPU, let glibc use the memory of large tensors again; return whether it does.

    By default every tensor of more than 32 MB is made of new pages, which the system clears
    first: a step of ViT-Ti on 256 images then took half as long again.
    """
    libc = ctypes.CDLL(None)
    if get_device() != 'cpu' or not hasattr(libc, 'mallopt'):
        return False
    trim_threshold, mmap_max = -1, -4       # of malloc.h
    return bool(libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0))


def scale_lr(cfg, world_size):
    """Scale the learning rate to the real batch size, if ``auto_scale_lr.enable``.

    lr becomes lr x (processes x batch_size x accumulative_counts) / base_batch_size. mmengine's
    own rule leaves out accumulation, and scales every parameter group; here only ``optimizer.lr``
    changes, so an absolute ``paramwise_cfg.head_lr`` stays as written (reference code: its
    ``--head_lr`` does not depend on the batch size). With ExactResumeHook a resumed run takes that
    rate, too.

    Args:
        cfg (Config): Changed in place; ``auto_scale_lr.enable`` is off afterwards.
        world_size (int): Number of processes.

    Returns:
        list[str]: What was done, for the log.

    Raises:
        ValueError: If the config has no ``auto_scale_lr.base_batch_size``.
    """
    auto = cfg.get('auto_scale_lr') or {}
    if not auto.get('enable') or not cfg.get('optim_wrapper'):
        return []
    base = auto.get('base_batch_size')
    if not base:
        raise ValueError('auto_scale_lr needs the batch size that the learning rate was chosen '
                         f'for, in auto_scale_lr.base_batch_size, but the config gives {base}.')
    optimizer = cfg.optim_wrapper.optimizer
    accumulation = cfg.optim_wrapper.get('accumulative_counts', 1)
    real = world_size * cfg.train_dataloader.batch_size * accumulation
    old, optimizer.lr = optimizer.lr, optimizer.lr * real / base
    cfg.auto_scale_lr.enable = False
    return [f'auto_scale_lr: batch size {real} = {world_size} processes x '
            f'{cfg.train_dataloader.batch_size} images x {accumulation} accumulated, base {base}: '
            f'lr {old:g} -> {optimizer.lr:g}.']


def fill_dataloaders(cfg):
    """Add what configs leave to the tools: settings of the loaders, and of folders of images.

    Folders give images of every suffix, and need no classes where no label is read.
    """
    _fill_loaders(cfg)
    for name in LOADERS:
        for dataset in dicts(cfg.get(name) or {}):
            if str(dataset.get('type')).rpartition('.')[2] == 'CustomDataset':
                dataset.setdefault('extensions', IMAGE_SUFFIXES)
                if (cfg.model.get('type') == 'NEPA' and name == 'train_dataloader'
                        and not dataset.get('ann_file')):
                    dataset.with_label = False


def _fill_loaders(cfg):
    """Add the dataloader settings that mmpretrain's base configs leave to its tools."""
    defaults = dict(pin_memory=torch.cuda.is_available())
    if cfg.get('default_scope') != 'mmseg':  # whose images differ in size and stay a list
        defaults['collate_fn'] = dict(type='default_collate')
    for name in LOADERS:
        loader = cfg.get(name)
        if loader:
            for key, value in defaults.items():
                loader.setdefault(key, value)
            if isinstance(loader.get('collate_fn'), dict):
                # mmengine passes what an inherited `package::` config adds on to the function
                loader.collate_fn.pop('_scope_', None)
            # Workers that restart get the same seeds, hence the same augmentations, every epoch.
            has_workers = loader.get('num_workers', 0) > 0
            loader.persistent_workers = has_workers and loader.get('persistent_workers', True)


def _read_launcher(launcher):
    """Copy the launcher's variables to torch's names; return the number of processes."""
    if launcher == 'none':
        return 1
    for name, source in LAUNCHER_VARIABLES[launcher].items():
        if source not in os.environ:
            raise ValueError(f'--launcher {launcher} needs the environment variable {source}: '
                             'start through tools/dist_*.sh, tools/slurm_*.sh or mpirun.')
        os.environ[name] = os.environ[source]
    local_rank, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if get_device() == 'cuda' and local_rank >= gpus:
        raise ValueError(f'more processes on this machine than its {gpus} visible GPUs: process '
                         f'{local_rank} has none; ask for at most {gpus}.')
    return int(os.environ['WORLD_SIZE'])


def _prepare_cpu_group(cfg):
    """Create the gloo group and drop what needs a GPU; return what was done, for the log.

    mmengine's ``init_dist`` selects a CUDA device whatever the backend; it is skipped when a
    group exists. Its default wrapper passes a device id, which DistributedDataParallel refuses
    on the CPU, and SyncBN works on GPUs only.
    """
    if not distributed.is_initialized():
        if cfg.launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
            hosts = subprocess.check_output(
                ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']], text=True)
            os.environ['MASTER_ADDR'] = hosts.split()[0]
        os.environ.setdefault('MASTER_PORT', '29500')
        distributed.init_process_group('gloo')
        atexit.register(_leave_cpu_group)
    if cfg.get('runner_type') != 'FSDPRunner':      # which wraps nothing
        wrapper = cfg.get('model_wrapper_cfg') or dict(
            type='MMDistributedDataParallel', broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)
    notes = [f'No GPU: {distributed.get_world_size()} processes on the CPU, through gloo.']
    layers = [node for node in dicts(cfg.model) if node.get('type') == 'SyncBN']
    for node in layers:
        node['type'] = 'BN'
    if layers:
        notes.append(f'SyncBN needs GPUs: {len(layers)} norm_cfg use BN instead, whose statistics '
                     'are those of each process.')
    return notes


def _leave_cpu_group():
    """End gloo's threads, which need the interpreter to free tensors; later they would abort."""
    gc.collect()        # a model of several processes holds the group, and cycles hold the model
    if distributed.is_initialized():
        distributed.destroy_process_group()
