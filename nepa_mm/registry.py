"""The scope ``nepa_mm``, which mmengine gives to everything inherited from ``nepa_mm::``.

NEPA's own classes are in mmengine's root registries, where every scope finds them. The rest of
a config is mmpretrain's or mmseg's, as its ``default_scope`` says. So the registries of this
scope look up every name where it would be found without the scope, but for LoadImageFromFile:
that is LoadImageWithPillow, under the name that OpenMMLab's inferencers look for in a pipeline.
mmengine imports this module when it meets the scope.
"""
from mmengine import registry
from mmengine.registry import DefaultScope, Registry

from nepa_mm.datasets.transforms.loading import LoadImageWithPillow


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
        root.children['nepa_mm'].register_module('LoadImageFromFile', module=LoadImageWithPillow)
