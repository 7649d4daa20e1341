"""Hooks for mmengine's Runner; importing this package registers them."""
from .checkpoint import WholeCheckpointHook
from .ema import ModelEMAHook
from .guard import NonFiniteGuardHook
from .monitor import NEPAMonitorHook
from .probe import OnlineProbeHook
from .resume import ExactResumeHook
from .scalars import DeferredRuntimeInfoHook
from .throughput import ThroughputHook
from .unreadable import UnreadableImageHook

__all__ = ['DeferredRuntimeInfoHook', 'ExactResumeHook', 'ModelEMAHook',
           'NEPAMonitorHook', 'NonFiniteGuardHook', 'OnlineProbeHook', 'ThroughputHook',
           'UnreadableImageHook', 'WholeCheckpointHook']
