"""From a config to a Runner: the code that tools share.

config.py, settings.py and cfg_options.py read and complete a config.
run_check.py and the *_checks.py files reject configs and data that cannot work.
input_spec.py describes preprocessing in plain values. runner.py builds the Runner.
load.py builds the network of a checkpoint for scripts.
"""
from .channel_checks import check_channels, color_type
from .config import check_checkpoint, is_segmentation, load_config, read_config, resolve_resume
from .data_checks import check_data
from .runner import build_runner, fill_dataloaders, reuse_freed_memory, start_runner
from .user_errors import user_errors

__all__ = ['build_runner', 'check_channels', 'check_checkpoint', 'check_data', 'color_type',
           'fill_dataloaders', 'is_segmentation', 'load_config', 'read_config', 'resolve_resume',
           'reuse_freed_memory', 'start_runner', 'user_errors']
