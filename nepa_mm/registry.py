"""The scope ``nepa_mm``, which mmengine gives to everything inherited from ``nepa_mm::``.

NEPA's own classes are in mmengine's root registries, where every scope finds them. The rest of
a config is mmpretrain's or mmseg's, as its ``default_scope`` says. So the registries of this
scope look up every name where it would be found without the scope, but for LoadImageFromFile:
that is LoadWholeImage, under the name that OpenMMLab's inferencers look for in a pipeline.
mmengine imports this module when it meets the scope.
"""
from mmengine import registry
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import FUNCTIONS, DefaultScope, Registry

from .reading import DataError, LoadWholeImage


class TransparentRegistry(Registry):
    """Look names up in the innermost other scope in use, or in mmpretrain when there is none."""

    def get(self, key):
        if key in self._module_dict:
            return self._module_dict[key]
        scopes = [scope.scope_name for scope in DefaultScope._instance_dict.values()]
        outer = [scope for scope in scopes if scope != self.scope] or ['mmpretrain']
        with self.parent.switch_scope_and_registry(outer[-1]) as found:
            return found.get(key)


for root in [value for value in vars(registry).values() if isinstance(value, Registry)]:
    TransparentRegistry(root.name, parent=root, scope='nepa_mm')
    if root is registry.TRANSFORMS:
        root.children['nepa_mm'].register_module('LoadImageFromFile', module=LoadWholeImage)


# mmengine passes the scope of an inherited `collate_fn` on to the function, which knows none.

@FUNCTIONS.register_module('default_collate', force=True)
def stack_of_any_scope(samples, _scope_=None):
    """mmengine's ``default_collate``.

    Raises:
        DataError: The images differ in shape.
    """
    try:
        return default_collate(samples)
    except RuntimeError as error:
        shapes = {}
        for sample in samples if isinstance(samples[0], dict) else []:
            name = getattr(sample.get('data_samples'), 'img_path', 'an image without a file')
            shapes.setdefault(tuple(getattr(sample.get('inputs'), 'shape', ())), name)
        if len(shapes) < 2:
            raise
        (shape, name), (other, other_name) = list(shapes.items())[:2]
        raise DataError(f'A batch needs images of one shape, but the pipeline makes {shape} of '
                        f'{name} and {other} of {other_name} (channels, height, width).') from error


@FUNCTIONS.register_module('pseudo_collate', force=True)
def list_of_any_scope(samples, _scope_=None):
    """mmengine's ``pseudo_collate``."""
    return pseudo_collate(samples)
