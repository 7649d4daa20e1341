"""NEPA (Next-Embedding Prediction) for OpenMMLab. Start reading at nepa.py."""
from . import stack

__version__ = '0.1.0'

stack.require(*stack.CORE, 'mmengine', 'mmcv', 'mmpretrain')
stack.check_binaries()
stack.register()

from . import backbone, datasets, hooks, nepa, optim  # noqa: E402, F401  (they register what is theirs)
