"""Checkpoints that are complete or absent, however writing them ends."""
import os
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path

import torch
from mmengine import dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop

from nepa_mm.checkpoints.background import WriterThread, deferred_saves, join_writers
from nepa_mm.checkpoints.resumable import find_resumable_checkpoint, keep_file_names
from nepa_mm.engine.hooks.non_finite_guard import NonFiniteGuardHook
from nepa_mm.utils.files import atomic_write, lock_folder, remove_leftovers, survive_full_disk
from nepa_mm.utils.host_copy import HostCopy
from nepa_mm.utils.signals import STATUS, record_sigterm, request, restore, shield_workers

FILES = ('last_ckpt', 'keep_ckpt_ids', 'best_')     # prefixes of what names the files of a run


class AtomicLocalBackend(LocalBackend):
    """Local files, written atomically and removed only by :meth:`remove_outdated`."""

    def __init__(self):
        self.outdated = []

    def put(self, obj, filepath):
        """Write to a temporary file, flush it to the disk, and rename it."""
        with atomic_write(filepath, overwrite=True) as temporary:
            temporary.write_bytes(obj)

    def remove(self, filepath):
        """Mark a file as outdated; keep it until the newer one is complete."""
        self.outdated.append(filepath)

    def remove_outdated(self):
        """Remove the outdated files."""
        while self.outdated:
            path = Path(self.outdated.pop())
            if path.is_file():
                path.unlink(missing_ok=True)

    def rmtree(self, dir_path):
        """Never remove a folder: no checkpoint is one."""


register_backend('atomic', AtomicLocalBackend)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook with atomic writes, safe resume and SIGTERM handling.

    - The state is copied, and a thread writes it while training continues. The next save,
      SIGTERM and the end of training wait for it. The host needs memory for two copies.
    - Writes are atomic: temporary file, flush, rename. Then ``last_checkpoint`` is updated and
      the outdated checkpoint, or the previous best, is removed. A failed write changes
      nothing on the disk, and in the run nothing after the next save.
    - A resumed run takes the latest intact checkpoint of its ``work_dir`` and warns about
      later ones that are damaged. Reading never executes a pickle.
    - SIGTERM (Slurm, Kubernetes, spot instances) ends the run after the current update, or
      one or two updates later with several processes, which have to agree. The run writes
      ``interrupted.pth`` and exits with status 143. Data-loader workers ignore SIGTERM. The
      resumed run repeats a validation that was interrupted.

    Args:
        on_write_error (str): 'warn' continues without that checkpoint and tries again at
            the next interval; 'raise' ends the run at the next save. Defaults to 'warn'.
        **kwargs: Arguments of :class:`mmengine.hooks.CheckpointHook`; files must be local.

    Raises:
        ValueError: ``on_write_error`` is unknown, or files would not be local.
    """

    def __init__(self, on_write_error: str = 'warn', **kwargs):
        if on_write_error not in ('warn', 'raise'):
            raise ValueError(f"on_write_error must be 'warn' or 'raise', got {on_write_error!r}.")
        remote = (kwargs.get('backend_args') or kwargs.get('file_client_args')
                  or '://' in str(kwargs.get('out_dir')))
        if remote:
            raise ValueError(f'{type(self).__name__} writes local files only, got {remote}; use '
                             'CheckpointHook for others.')
        super().__init__(**dict(kwargs, backend_args=dict(backend='atomic')))
        self.on_write_error = on_write_error
        self.listening = self.validating = False
        self.thread = self.jobs = None

    def before_run(self, runner):
        """Lock the folder, and choose the checkpoint to resume before the Runner reads it."""
        if not isinstance(runner._train_loop, BaseLoop):
            return
        survive_full_disk(runner.visualizer, runner.logger)
        join_writers()      # of a run in this process that an error ended
        folder = runner.work_dir
        if self.out_dir not in (None, folder):      # mmengine's rule
            folder = os.path.join(self.out_dir, os.path.basename(folder.rstrip(os.sep)))
        auto = runner._resume and not runner._has_loaded and runner._load_from is None
        needed = ['message_hub'] + ['optimizer'] * self.save_optimizer
        needed += ['param_schedulers'] * bool(
            self.save_param_scheduler and runner.param_schedulers)
        found = [self._take(folder, auto, needed) if dist.is_main_process() else None]
        dist.broadcast_object_list(found)
        refusal, file, problems = found[0]
        if refusal:
            raise ValueError(refusal)
        if not auto:
            return
        for problem in problems:
            runner.logger.warning(f'Not resumed: {problem}')
        if file is None:
            runner.logger.info('No checkpoint to resume: starting anew.')
            runner._resume = False
        else:
            runner.logger.info(f'Resuming from {file}, the latest intact checkpoint.')
            runner._load_from = file

    def _take(self, folder, auto, needed):
        """Lock a folder and clean it up: (refusal or None, file to resume, problems)."""
        self.lock = lock_folder(folder)
        if self.lock is None:
            return (f'Another run writes into {folder}; wait for its end, or give another '
                    '--work-dir.', None, [])
        for name in ('epoch_*.pth', 'iter_*.pth', 'best_*.pth', 'interrupted.pth',
                     'last_checkpoint'):
            remove_leftovers(Path(folder, name))
        return (None, *(find_resumable_checkpoint(folder, needed) if auto else (None, [])))

    def after_load_checkpoint(self, runner, checkpoint):
        """Read whether a validation was interrupted."""
        self.validating = runner._resume and checkpoint['meta'].get('validating', False)

    def before_train(self, runner):
        """Listen to SIGTERM; repeat a validation that it interrupted."""
        keep_file_names(runner.message_hub.runtime_info)
        super().before_train(runner)
        if self.save_best is not None and len(self.key_indicators) == 1:
            self.best_ckpt_path = self._own(self.best_ckpt_path)
        elif self.save_best is not None:
            self.best_ckpt_path_dict = {
                key: self._own(name) for key, name in self.best_ckpt_path_dict.items()}
        loops = [loop for loop in (runner.train_loop, runner.val_loop) if loop is not None]
        for loop in loops:
            shield_workers(loop.dataloader)
        self.guarded = any(isinstance(hook, NonFiniteGuardHook) and hook.watching
                           for hook in runner.hooks)
        self.previous, self.listening = record_sigterm(), True
        self.asked = None       # the answer of all processes to the last update's question
        if self.validating and runner.val_loop is not None:
            runner.logger.info('Repeating the validation that SIGTERM interrupted.')
            runner.val_loop.run()
            if os.path.isfile(os.path.join(self.out_dir, self._name(self._step(runner)))):
                self.file_backend.remove(os.path.join(self.out_dir, 'interrupted.pth'))
                self.file_backend.remove_outdated()

    def _own(self, name):
        return name and os.path.join(self.out_dir, name)

    def before_save_checkpoint(self, runner, checkpoint):
        """Save file names without folders: a work directory may be moved or copied."""
        keep_file_names(checkpoint['message_hub']['runtime_info'])

    def _step(self, runner):
        return runner.epoch if self.by_epoch else runner.iter

    def after_train(self, runner):
        """Wait for the last checkpoint, publish, and stop listening."""
        with self._in_thread(runner):
            self.jobs.append(partial(super().after_train, runner))
        self._wait(runner)
        restore(self.previous)
        self.listening = False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Save at the interval; save and exit after SIGTERM."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if runner.optim_wrapper.should_update() and self._agreed_to_stop():
            self._save_and_exit(runner, epoch=runner.epoch, iter=runner.iter + 1,
                                validating=_validation_follows(runner))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Save and exit after SIGTERM in a validation of a training run."""
        if not self.listening:
            return
        loader = runner.val_loop.dataloader
        common = len(loader.dataset) // dist.get_world_size() // (loader.batch_size or 1)
        # only batches that all processes have
        if batch_idx < common and any(self._ask_all().tolist()):
            self._save_and_exit(runner, epoch=runner.epoch, iter=runner.iter, validating=True)

    def _agreed_to_stop(self):
        """Whether any process received SIGTERM; with several, whether all of them know."""
        if dist.get_world_size() == 1:
            return request.received
        if self.guarded:
            return request.agreed
        asked, self.asked = self.asked, self._ask_all()
        return asked is not None and any(asked.tolist())    # asked one update ago: no host sync

    @staticmethod
    def _ask_all():
        device = 'cpu' if dist.get_world_size() == 1 else dist.get_comm_device()
        terminated = torch.full((1,), float(request.received), device=device)
        dist.all_reduce(terminated, 'max')
        return HostCopy(terminated)

    def _save_and_exit(self, runner, **meta):
        runner.logger.warning('SIGTERM: saving interrupted.pth and exiting.')
        with self._in_thread(runner):
            self._write(runner, 'interrupted.pth', meta)
        self._wait(runner)
        dist.barrier()
        raise SystemExit(STATUS)

    def _save_checkpoint_with_step(self, runner, step, meta):
        with self._in_thread(runner):
            if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
                if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                    self.file_backend.remove(
                        os.path.join(self.out_dir, self._name(self.keep_ckpt_ids.popleft())))
                self.keep_ckpt_ids.append(step)
                runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            self._write(runner, self._name(step), meta)
            self.file_backend.remove(os.path.join(self.out_dir, 'interrupted.pth'))

    def _name(self, step):
        return self.filename_tmpl.format(step)

    def _write(self, runner, name, meta):
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir, name, save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
            backend_args=self.backend_args, **self.args)
        pointer = os.path.join(runner.work_dir, 'last_checkpoint')
        self.jobs.append(partial(self.file_backend.put, self.last_ckpt.encode(), pointer))

    def _save_best_checkpoint(self, runner, metrics):
        with self._in_thread(runner):
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _in_thread(self, runner):
        """Write what is saved within, then remove outdated files, in a thread."""
        if self.jobs is not None:       # within another
            yield
            return
        self._wait(runner)
        self.before = [_files(values) for values in (vars(self), runner.message_hub.runtime_info)]
        try:
            with deferred_saves() as self.jobs:
                yield
            if dist.is_main_process():
                self.thread = WriterThread(
                    [*self.jobs, self.file_backend.remove_outdated],
                    partial(self._report, runner.logger, runner.iter))
        finally:
            self.jobs = None

    def _report(self, logger, iteration, error):
        end = ', the run continues without it' * self._goes_on_after(error)
        # with the iteration, for mmengine logs equal warnings once
        logger.warning(
            f'The checkpoint of iteration {iteration} could not be written{end}: {error}')

    def _goes_on_after(self, error):
        return isinstance(error, OSError) and self.on_write_error == 'warn'

    def _wait(self, runner):
        """Wait for the thread. If it failed, forget the files that it should have written."""
        if self.thread is None:
            return
        self.thread.join()
        error, self.thread = self.thread.error, None
        if error is None:
            return
        self.file_backend.outdated = []
        for values, before in zip((vars(self), runner.message_hub.runtime_info), self.before):
            for key in _files(values):
                del values[key]
            values.update(before)
        if not self._goes_on_after(error):
            raise error


def _files(values):
    return {key: copy(value) for key, value in values.items() if key.startswith(FILES)}


def _validation_follows(runner):
    """Whether an iteration-based loop validates after this iteration; a resume would skip it."""
    loop, done = runner.train_loop, runner.iter + 1
    return (isinstance(loop, IterBasedTrainLoop) and runner.val_loop is not None
            and done >= loop.val_begin
            and (done % loop.val_interval == 0 or done == loop.max_iters))
