"""Patches that the original OpenMMLab distributions need on a recent torch.

``stack.register()`` applies them on the classic stack only.
"""
import sys
from importlib import import_module, metadata, util
from importlib.machinery import ModuleSpec
from types import ModuleType


def adapt() -> None:
    """Replace missing compiled operators and hide mmpretrain's multimodal models."""
    if util.find_spec('mmcv._ext') is None:
        sys.modules['mmcv._ext'] = MissingOperators('mmcv._ext')
    hide_multimodal()


class MissingOperators(ModuleType):
    """Stand-in for mmcv's compiled operators, so that mmseg modules using them can be imported.

    Args:
        name (str): Name of the module.

    Raises:
        ImportError: An operator is called.
    """

    def __init__(self, name: str):
        super().__init__(name)
        # without a loader, mmengine does not count it as a compiled extension
        self.__spec__ = ModuleSpec(name, loader=None)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*args, **kwargs):
            raise ImportError(
                f'{name} is a compiled operator, which mmcv-lite does not have; '
                'run: pip uninstall -y mmcv-lite && pip install "mmcv>=2.1,<2.2"')
        return operator


def hide_multimodal() -> None:
    """Import mmpretrain without its multimodal models if transformers is newer than 4.50.

    mmpretrain imports them when transformers and pycocotools are installed. They need names that
    transformers removed after 4.50.
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
