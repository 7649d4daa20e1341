"""Frozen features, scored by tools and during pretraining, and a stricter IoUMetric.

Importing this package registers the hook. iou_metric.py needs mmseg; only segmentation imports it.
"""
from .online_probe import OnlineProbeHook

__all__ = ['OnlineProbeHook']
