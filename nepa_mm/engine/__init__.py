"""How a network is trained; importing this package registers all of it."""
from . import hooks  # noqa: F401
from .ema import MultiTensorEMA
from .fsdp_runner import FSDPRunner
from .layer_decay import LayerDecayOptimWrapperConstructor
from .optim_wrapper import BF16OptimWrapper
from .schedulers import LayerDecayCosineLR

__all__ = ['BF16OptimWrapper', 'FSDPRunner', 'LayerDecayCosineLR',
           'LayerDecayOptimWrapperConstructor', 'MultiTensorEMA']
