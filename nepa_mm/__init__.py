"""NEPA (Next-Embedding Prediction) for OpenMMLab. Start reading at nepa.py."""
from . import stack

__version__ = '0.1.0'

stack.require(*stack.CORE, 'mmengine', 'mmcv', 'mmpretrain')
stack.check_binaries()
stack.register()

# each of these registers what is its own
from . import (  # noqa: E402, F401
    augment,
    backbone,
    datasets,
    fsdp,
    heads,
    hooks,
    nepa,
    optim,
    registry,
    run_check,
    shards,
)

stack.register_models()
