"""NEPA (Next-Embedding Prediction) for OpenMMLab. Start reading at models/nepa.py."""
from .compat import stack

__version__ = '0.1.0'

stack.require(*stack.CORE, 'mmengine', 'mmcv', 'mmpretrain')
stack.check_binaries()
stack.register()

from .compat.quiet import ignore_harmless_warnings, quiet_imports

ignore_harmless_warnings()
with quiet_imports():
    # importing these registers their classes
    from . import apis, engine, evaluation, registry  # noqa: F401
    from .apis.load import load
    from .evaluation.frozen_features import features
    from .models import NEPA, NEPAViT, next_embedding_loss

    stack.register_models()

__all__ = ['NEPA', 'NEPAViT', 'features', 'load', 'next_embedding_loss']
