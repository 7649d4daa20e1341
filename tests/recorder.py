"""A hook for runs in processes of their own: what every update saw, and a SIGTERM on the way.

Configs import it as ``tests.recorder``.
"""
import json
import math
import os
import signal
import time
from pathlib import Path

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RecorderHook(Hook):
    """Write a line per iteration to ``record_RANK.jsonl`` in the work directory.

    Args:
        stop_at (int, optional): SIGTERM for every process after this iteration.
        seconds (float): How long an iteration waits. Defaults to 0.
        broken (int, optional): Index of the iteration whose features are infinite.
    """

    priority = 'HIGHEST'    # before schedulers go on

    def __init__(self, stop_at=None, seconds=0, broken=None):
        self.stop_at, self.seconds, self.broken = stop_at, seconds, broken

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        time.sleep(self.seconds)
        if runner.iter == self.broken:
            self.handle = runner.model.backbone.norm.register_forward_hook(
                lambda module, args, out: out * math.inf)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        row = dict(update=runner.optim_wrapper.should_update(), loss=outputs['loss'].item(),
                   lr=[group['lr'] for group in runner.optim_wrapper.param_groups],
                   files=[Path(sample.img_path).name for sample in data_batch['data_samples']],
                   pixels=[float(image.double().sum()) for image in data_batch['inputs']])
        with open(Path(runner.work_dir) / f'record_{dist.get_rank()}.jsonl', 'a') as file:
            print(json.dumps(row), file=file)
        if runner.iter == self.broken:
            self.handle.remove()
        if runner.iter + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
