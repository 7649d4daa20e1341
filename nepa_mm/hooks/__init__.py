"""Hooks for mmengine's Runner; importing this package registers them."""
from .ema import ModelEMAHook
from .labels import LabelCheckHook
from .monitor import NEPAMonitorHook
from .probe import OnlineProbeHook
from .scalars import DeferredRuntimeInfoHook
from .throughput import ThroughputHook

__all__ = ['DeferredRuntimeInfoHook', 'LabelCheckHook', 'ModelEMAHook', 'NEPAMonitorHook',
           'OnlineProbeHook', 'ThroughputHook']
