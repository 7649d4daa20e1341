"""What the original OpenMMLab distributions need on a recent torch.

Applied by ``stack.register()`` on the classic stack only; the current stack is left as it is.
"""
import sys
from importlib import import_module, metadata, util
from importlib.machinery import ModuleSpec
from types import ModuleType


def adapt():
    if util.find_spec('mmcv._ext') is None:
        sys.modules['mmcv._ext'] = MissingOperators('mmcv._ext')
    hide_multimodal()


class MissingOperators(ModuleType):
    """In place of mmcv's compiled operators: several mmseg modules need them to be imported.

    Without a loader it is no compiled extension to mmengine either.
    """

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*args, **kwargs):
            raise ImportError(
                f'{name} is a compiled operator, which mmcv-lite does not have; '
                'type: pip uninstall -y mmcv-lite && pip install "mmcv>=2.1,<2.2"')
        return operator


def hide_multimodal():
    """Import mmpretrain without its multimodal models, if they do not fit transformers.

    mmpretrain imports them when transformers and pycocotools are installed; they need names that
    transformers has dropped after 4.50.
    """
    try:
        transformers = metadata.version('transformers')
    except metadata.PackageNotFoundError:
        return
    if tuple(map(int, transformers.split('.')[:2])) <= (4, 50):
        return
    import importlib_metadata
    distribution = importlib_metadata.distribution

    def without_transformers(name):
        if name == 'transformers':
            raise importlib_metadata.PackageNotFoundError(name)
        return distribution(name)

    importlib_metadata.distribution = without_transformers
    try:
        import_module('mmpretrain')
    finally:
        importlib_metadata.distribution = distribution
