"""Checkpoints that are whole or not there, whatever happens while they are written."""
import os
import signal
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from mmengine import dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from ..checkpoint import find_whole_checkpoint, read_checkpoint, written_whole

SIGNAL_INTERVAL = 10


class WholeLocalBackend(LocalBackend):
    """Local files, written whole, and removed only when :meth:`remove_outdated` is called."""

    def __init__(self):
        self.outdated = []

    def put(self, obj, filepath):
        """Write ``obj`` beside the place, flush it to the disk, and rename it."""
        with written_whole(filepath, overwrite=True) as temporary:
            temporary.write_bytes(obj)

    def remove(self, filepath):
        """Note that a file is outdated; a newer one is not yet whole."""
        self.outdated.append(filepath)

    def remove_outdated(self):
        """Remove what was noted."""
        while self.outdated:
            Path(self.outdated.pop()).unlink(missing_ok=True)


register_backend('whole', WholeLocalBackend)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, which never leaves a run without a checkpoint to resume.

    - A file is written beside its place, flushed to the disk and renamed; the one that it
      makes superfluous, also the previous best, goes only then, and ``last_checkpoint``
      follows. A failed write leaves nothing behind, neither on the disk nor in the run.
    - A run that resumes takes the newest whole checkpoint of its ``work_dir`` and warns
      about newer ones that are not. What it resumes is read as tensors and plain values
      only, never as a pickle that could execute something.
    - SIGTERM (Slurm, spot instances) ends the run after the update at hand, among several
      processes at most 10 iterations later (they have to agree), with
      ``interrupted.pth`` to resume from, and the exit status 143.

    Args:
        on_write_error (str): 'warn' lets the run go on without that checkpoint, and try
            again at the next interval; 'raise' ends it. Defaults to 'warn'.
        **kwargs: Arguments of :class:`mmengine.hooks.CheckpointHook`; files must be local.

    Raises:
        ValueError: ``on_write_error`` is something else, or files would not be local.
    """

    def __init__(self, on_write_error='warn', **kwargs):
        if on_write_error not in ('warn', 'raise'):
            raise ValueError(f"on_write_error must be 'warn' or 'raise', got {on_write_error!r}.")
        remote = (kwargs.get('backend_args') or kwargs.get('file_client_args')
                  or '://' in str(kwargs.get('out_dir')))
        if remote:
            raise ValueError(f'{type(self).__name__} writes local files only, got {remote}; use '
                             'CheckpointHook for others.')
        super().__init__(**dict(kwargs, backend_args=dict(backend='whole')))
        self.on_write_error = on_write_error

    def before_run(self, runner):
        """Choose what to resume, before the Runner reads it."""
        if not runner._resume or runner._has_loaded or not isinstance(runner._train_loop, BaseLoop):
            return
        if runner._load_from is not None:
            if '://' not in str(runner._load_from):
                read_checkpoint(runner._load_from)
            return
        found = [find_whole_checkpoint(runner.work_dir) if dist.is_main_process() else None]
        dist.broadcast_object_list(found)
        file, problems = found[0]
        for problem in problems:
            runner.logger.warning(f'Not resumed: {problem}')
        if file is None:
            runner.logger.info('No whole checkpoint to resume: starting anew.')
            runner._resume = False
        else:
            runner.logger.info(f'The newest whole checkpoint is {file}.')
            runner._load_from = file

    def before_train(self, runner):
        """Listen to SIGTERM."""
        super().before_train(runner)
        self.terminated = self.stopping = False
        try:
            self.previous = signal.signal(signal.SIGTERM, self._terminate)
        except ValueError:      # only the main thread may listen
            self.previous = None

    def _terminate(self, signum, frame):
        self.terminated = True

    def after_train(self, runner):
        """Stop listening."""
        super().after_train(runner)
        self._stop_listening()

    def _stop_listening(self):
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Save if it is time to; if SIGTERM came, save and exit."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self.stopping = self.stopping or self._somebody_is_terminated(runner)
        if self.stopping and runner.optim_wrapper.should_update():
            runner.logger.warning('SIGTERM: saving interrupted.pth and exiting.')
            with self._all_or_nothing(runner):
                self._write(runner, 'interrupted.pth',
                            dict(epoch=runner.epoch, iter=runner.iter + 1))
            dist.barrier()
            self._stop_listening()
            raise SystemExit(128 + signal.SIGTERM)

    def _somebody_is_terminated(self, runner):
        if dist.get_world_size() == 1:
            return self.terminated
        if (runner.iter + 1) % SIGNAL_INTERVAL:
            return False
        device = dist.get_comm_device()
        terminated = torch.tensor(int(self.terminated), device=device)
        dist.all_reduce(terminated, 'max')
        return bool(terminated.item())

    def _save_checkpoint_with_step(self, runner, step, meta):
        with self._all_or_nothing(runner):
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
        if dist.is_main_process():
            pointer = os.path.join(runner.work_dir, 'last_checkpoint')
            self.file_backend.put(self.last_ckpt.encode(), pointer)

    def _save_best_checkpoint(self, runner, metrics):
        with self._all_or_nothing(runner):
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _all_or_nothing(self, runner):
        """Remove what is outdated if all was written; else forget that writing was tried."""
        own = {name: copy(value) for name, value in vars(self).items()
               if name not in ('file_backend', 'terminated')}
        info = dict(runner.message_hub.runtime_info)
        outer, self.writing = getattr(self, 'writing', False), True
        try:
            yield
            if not outer and dist.is_main_process():
                self.file_backend.remove_outdated()
        except OSError as error:
            if outer:
                raise
            vars(self).update(own)
            self.file_backend.outdated = []
            runner.message_hub.runtime_info.clear()
            runner.message_hub.runtime_info.update(info)
            if self.on_write_error == 'raise':
                raise
            runner.logger.warning(f'The checkpoint could not be written, the run goes on without '
                                  f'it: {error}')
        finally:
            self.writing = outer
