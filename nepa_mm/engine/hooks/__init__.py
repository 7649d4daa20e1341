"""Hooks for mmengine's Runner; importing this package registers them."""
from .atomic_checkpoint import AtomicCheckpointHook
from .deferred_runtime_info import DeferredRuntimeInfoHook
from .exact_resume import ExactResumeHook
from .model_ema import ModelEMAHook
from .nepa_monitor import NEPAMonitorHook
from .non_finite_guard import NonFiniteGuardHook
from .stop_workers import StopWorkersHook
from .throughput import ThroughputHook
from .unreadable_images import UnreadableImageHook

__all__ = ['AtomicCheckpointHook', 'DeferredRuntimeInfoHook', 'ExactResumeHook', 'ModelEMAHook',
           'NEPAMonitorHook', 'NonFiniteGuardHook', 'StopWorkersHook', 'ThroughputHook',
           'UnreadableImageHook']
