"""Hooks for mmengine's Runner; importing this package registers them."""
from .ema import ModelEMAHook

__all__ = ['ModelEMAHook']
