"""Hooks for mmengine's Runner; importing this package registers them."""
from .ema import ModelEMAHook
from .labels import LabelCheckHook

__all__ = ['LabelCheckHook', 'ModelEMAHook']
