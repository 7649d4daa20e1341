"""Build the Runner of tools/train.py and tools/test.py from a config.

Parts are built and checked one by one, so that errors name the part of the config. Without a GPU,
several processes communicate through gloo, which mmengine does not support.
"""
import atexit
import ctypes
import gc
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import distributed
from torch.utils.data import Dataset

from nepa_mm.apis.channel_checks import type_name
from nepa_mm.apis.config import LOADERS, check_complete, is_segmentation, keep_config_file
from nepa_mm.apis.data_checks import FOLDERS
from nepa_mm.apis.run_check import RunCheckHook
from nepa_mm.apis.run_summary import TimeEstimateHook, log_summary
from nepa_mm.apis.schedule_checks import check_batches, check_length
from nepa_mm.apis.user_errors import RunStart, naming_config_part
from nepa_mm.compat.screen import filtered_runner_logs
from nepa_mm.datasets.images import IMAGE_SUFFIXES
from nepa_mm.datasets.pipelines import use_one_reader
from nepa_mm.utils.errors import UnreadableImageError
from nepa_mm.utils.nested import iter_dicts
from nepa_mm.utils.random_state import preserve_rng_state

# Environment variables of each launcher; mmengine reads the same ones.
LAUNCHER_VARIABLES = dict(
    pytorch=dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK'),
    slurm=dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID'),
    mpi=dict(RANK='OMPI_COMM_WORLD_RANK', WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
             LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK'))


def build_runner(cfg: Config) -> Runner:
    """Build the Runner of a config, on GPUs or on the CPU, in one or several processes.

    Args:
        cfg (Config): With ``work_dir`` and ``launcher``. Changed in place: the config saved beside
            the checkpoints shows what was run.

    Returns:
        Runner: Ready for ``train()`` or ``test()``. Its log lists the changes made here.

    Raises:
        ValueError: The launcher's variables are missing, there are more processes than GPUs, or
            ``auto_scale_lr`` is enabled without a ``base_batch_size``.
    """
    reuse_freed_memory()
    world_size = _read_launcher(cfg.launcher)
    notes = scale_lr(cfg, world_size)
    fill_dataloaders(cfg)
    if cfg.get('visualizer'):       # vis_backends alone are enough
        cfg.visualizer.setdefault('type', 'Visualizer')
    if cfg.launcher != 'none' and cfg.get('runner_type') != 'FSDPRunner':   # it needs no wrapper
        _set_wrapper(cfg)
    if cfg.launcher != 'none' and get_device() == 'cpu':
        notes += _prepare_cpu_group(cfg)
    with filtered_runner_logs():
        runner: Runner = RUNNERS.build(cfg)
    for note in notes:
        runner.logger.info(note)
    if not any(isinstance(hook, RunCheckHook) for hook in runner.hooks):
        runner.register_hook(RunCheckHook())
    return runner


def start_runner(cfg: Config, start: RunStart, stage: str) -> Runner:
    """Build the Runner of a tool, and everything that the Runner would build later.

    Args:
        cfg (Config): See :func:`build_runner`.
        start (RunStart): Yielded by :func:`user_errors`.
        stage (str): 'train' or 'test'.

    Returns:
        Runner: Its ``train()`` or ``test()`` builds nothing more.

    Raises:
        ValueError: Building failed; the message begins with the part of the config.
    """
    check_complete(cfg, stage)
    keep_config_file(cfg)
    start.record_files(cfg)
    if is_segmentation(cfg):
        from nepa_mm.apis.segmentation_folders import check_not_empty
        init_default_scope('mmseg')     # nepa_mm:: types are looked up in it
        check_not_empty(cfg, *(['test_dataloader'] if stage == 'test' else LOADERS[:2]))
    with naming_config_part('config'):
        runner = build_runner(cfg)
    runner.register_hook(start)
    run_check, = [hook for hook in runner.hooks if isinstance(hook, RunCheckHook)]
    if stage == 'test':
        with naming_config_part('test_dataloader'):
            check_first_sample(runner, 'test_dataloader', runner.test_loop.dataloader.dataset,
                               runner.test_loop.evaluator.metrics)
        log_summary(runner, stage)
        return runner
    # before the loop: an iteration-based loop starts the workers when it is built
    with naming_config_part('train_dataloader'):
        loader = runner._train_dataloader = runner.build_dataloader(
            runner._train_dataloader, seed=runner.seed,
            diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False))
        check_first_sample(runner, 'train_dataloader', loader.dataset)
    check_batches(runner, loader)
    run_check.check_training_data(runner, loader.dataset)
    with naming_config_part('train_cfg'):
        check_length(runner.train_loop)     # the property builds the loop
    with naming_config_part('optim_wrapper'):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    with naming_config_part('param_scheduler'):
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    with naming_config_part('val_dataloader'):
        if runner.val_loop is not None:
            check_first_sample(runner, 'val_dataloader', runner.val_dataloader.dataset,
                               runner.val_loop.evaluator.metrics)
    log_summary(runner, stage)
    runner.register_hook(TimeEstimateHook())
    return runner


def check_first_sample(runner: Runner, name: str, dataset: Dataset,
                       metrics: Sequence[BaseMetric] = ()) -> None:
    """Set the image reader of a data set, check its masks, and run its pipeline on one sample.

    Args:
        runner (Runner): Built, not started.
        name (str): Name of the dataloader.
        dataset (Dataset): Its data set; no worker has a copy yet.
        metrics (list[BaseMetric]): Metrics of its evaluator. Defaults to none.
    """
    use_one_reader(dataset, runner.model)
    if is_segmentation(runner.cfg):
        from nepa_mm.apis.segmentation_checks import check_masks
        check_masks(runner, dataset, name, metrics)
    with preserve_rng_state(), suppress(UnreadableImageError, IndexError):
        dataset[0]


def reuse_freed_memory() -> bool:
    """Without a GPU, make glibc reuse the memory of large tensors; return whether it does.

    By default every tensor of more than 32 MB gets new pages, which the system clears first. With
    that a step of ViT-Ti on 256 images took 1.5 times as long.
    """
    libc = ctypes.CDLL(None)
    if get_device() != 'cpu' or not hasattr(libc, 'mallopt'):
        return False
    trim_threshold, mmap_max = -1, -4       # of malloc.h
    return bool(libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0))


def scale_lr(cfg: Config, world_size: int) -> list[str]:
    """Scale the learning rate to the actual batch size if ``auto_scale_lr.enable`` is set.

    lr becomes lr x (processes x batch_size x accumulative_counts) / base_batch_size. mmengine's
    rule ignores accumulation and scales every parameter group. Here only ``optimizer.lr`` changes:
    an absolute ``paramwise_cfg.head_lr`` is kept (in the reference code, ``--head_lr`` does not
    depend on the batch size). With ExactResumeHook a resumed run uses the scaled rate, too.

    Args:
        cfg (Config): Changed in place; ``auto_scale_lr.enable`` is off afterwards.
        world_size (int): Number of processes.

    Returns:
        list[str]: Log messages.

    Raises:
        ValueError: The config has no ``auto_scale_lr.base_batch_size``.
    """
    auto = cfg.get('auto_scale_lr') or {}
    if not auto.get('enable') or not cfg.get('optim_wrapper'):
        return []
    base = auto.get('base_batch_size')
    if not base:
        raise ValueError('auto_scale_lr needs the batch size that the learning rate was chosen '
                         f'for, in auto_scale_lr.base_batch_size, got {base}.')
    optimizer = cfg.optim_wrapper.optimizer
    accumulation = cfg.optim_wrapper.get('accumulative_counts', 1)
    real = world_size * cfg.train_dataloader.batch_size * accumulation
    old, optimizer.lr = optimizer.lr, optimizer.lr * real / base
    cfg.auto_scale_lr.enable = False
    return [f'auto_scale_lr: batch size {real} = {world_size} processes x '
            f'{cfg.train_dataloader.batch_size} images x {accumulation} accumulated, base {base}: '
            f'lr {old:g} -> {optimizer.lr:g}.']


def fill_dataloaders(cfg: Config) -> None:
    """Add the dataloader settings that configs leave to the tools.

    Folders yield images of every suffix, and need no class folders if no label is read.
    """
    defaults = dict(pin_memory=torch.cuda.is_available())
    if not is_segmentation(cfg):    # mmseg's images differ in size and stay a list
        defaults['collate_fn'] = dict(type='default_collate')
    for name in LOADERS:
        loader = cfg.get(name)
        if not loader:
            continue
        for key, value in defaults.items():
            loader.setdefault(key, value)
        if isinstance(loader.get('collate_fn'), dict):
            # added by an inherited `package::` config; mmengine would pass it to the function
            loader.collate_fn.pop('_scope_', None)
        # restarted workers would repeat seeds, hence augmentations, in every epoch
        has_workers = loader.get('num_workers', 0) > 0
        loader.persistent_workers = has_workers and loader.get('persistent_workers', True)
        for dataset in iter_dicts(loader):
            if type_name(dataset) in FOLDERS:
                if type_name(dataset) == 'CustomDataset':
                    dataset.setdefault('extensions', IMAGE_SUFFIXES)
                if (cfg.model.get('type') == 'NEPA' and name == 'train_dataloader'
                        and not dataset.get('ann_file')):
                    dataset.with_label = False


def _read_launcher(launcher):
    """Copy the launcher's variables to torch's names; return the number of processes."""
    if launcher == 'none':
        return 1
    for name, source in LAUNCHER_VARIABLES[launcher].items():
        if source not in os.environ:
            raise ValueError(f'--launcher {launcher} needs the environment variable {source}: '
                             'start it with tools/dist_*.sh, tools/slurm_*.sh or mpirun.')
        os.environ[name] = os.environ[source]
    if launcher == 'slurm' and _has_own_gpus():
        # mmengine takes the number of the task for that of its GPU
        os.environ['SLURM_LOCALID'] = os.environ['LOCAL_RANK'] = '0'
    local_rank, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if get_device() == 'cuda' and local_rank >= gpus:
        raise ValueError(f'more processes on this machine than its {gpus} visible GPUs: process '
                         f'{local_rank} has none; ask for at most {gpus}.')
    return int(os.environ['WORLD_SIZE'])


def _has_own_gpus():
    """Whether Slurm hides the GPUs of the other tasks on this machine from this one."""
    gpus = torch.cuda.device_count()
    of_node, of_task = (int(os.environ.get(name, '').rpartition(':')[2] or 0) for name in (
        'SLURM_GPUS_ON_NODE', 'SLURM_GPUS_PER_TASK'))       # 8, h100:1
    return 0 < gpus <= max(of_node - 1, of_task)


def _set_wrapper(cfg):
    """Give mmengine its default wrapper, with gradients that are views of the buckets.

    DistributedDataParallel otherwise keeps a second copy of all gradients. A device id, which
    mmengine passes by default, is an error on the CPU.
    """
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel', broadcast_buffers=False, gradient_as_bucket_view=True,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None) if get_device() == 'cpu' else wrapper


def _prepare_cpu_group(cfg):
    """Create the gloo group and replace settings that need a GPU; return log messages.

    mmengine's ``init_dist`` selects a CUDA device for every backend; mmengine skips it if a group
    exists. SyncBN works on GPUs only.
    """
    if not distributed.is_initialized():
        if cfg.launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
            hosts = subprocess.check_output(
                ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']], text=True)
            os.environ['MASTER_ADDR'] = hosts.split()[0]
        os.environ.setdefault('MASTER_PORT', '29500')
        distributed.init_process_group('gloo')
        atexit.register(_leave_cpu_group)
    notes = [f'No GPU: {distributed.get_world_size()} processes on the CPU, through gloo.']
    layers = [node for node in iter_dicts(cfg.model) if node.get('type') == 'SyncBN']
    for node in layers:
        node['type'] = 'BN'
    if layers:
        notes.append(f'SyncBN needs GPUs: {len(layers)} norm_cfg use BN instead, with the '
                     'statistics of each process.')
    return notes


def _leave_cpu_group():
    """Stop gloo's threads before the interpreter exits; they would abort when freeing tensors."""
    gc.collect()        # reference cycles keep the wrapped model, and it keeps the group
    if distributed.is_initialized():
        distributed.destroy_process_group()
