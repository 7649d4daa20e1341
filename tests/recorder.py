"""A hook for runs in processes of their own: what every update saw, and a SIGTERM on the way.

Configs import it as ``tests.recorder``.
"""
import json
import os
import signal
from pathlib import Path

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RecorderHook(Hook):
    """Write a line per iteration to ``record_RANK.jsonl`` in the work directory.

    Args:
        stop_at (int, optional): SIGTERM for every process after this iteration.
    """

    priority = 'HIGHEST'    # before schedulers go on

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        row = dict(update=runner.optim_wrapper.should_update(), loss=outputs['loss'].item(),
                   lr=[group['lr'] for group in runner.optim_wrapper.param_groups],
                   files=[Path(sample.img_path).name for sample in data_batch['data_samples']],
                   pixels=[float(image.double().sum()) for image in data_batch['inputs']])
        with open(Path(runner.work_dir) / f'record_{dist.get_rank()}.jsonl', 'a') as file:
            print(json.dumps(row), file=file)
        if runner.iter + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
