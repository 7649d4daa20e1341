"""From a config to a Runner: what the tools share.

config.py reads and completes a config; data_checks.py, segmentation_checks.py, schedule_checks.py,
resume_checks.py and run_check.py look for what cannot be right; runner.py builds the Runner.
"""
from .config import check_checkpoint, load_config, resolve_resume
from .data_checks import check_data
from .runner import build_runner, fill_dataloaders, keep_freed_memory, start_runner
from .user_errors import user_errors

__all__ = ['build_runner', 'check_checkpoint', 'check_data', 'fill_dataloaders',
           'keep_freed_memory', 'load_config', 'user_errors', 'resolve_resume', 'start_runner']
