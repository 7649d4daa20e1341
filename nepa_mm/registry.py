"""The scope ``nepa_mm``, which mmengine assigns to configs inherited by ``nepa_mm::``.

NEPA's classes are in mmengine's root registries, where every scope finds them. The other classes
of a config come from mmpretrain or mmseg, as its ``default_scope`` states. The registries of this
scope therefore resolve every name as if the scope did not exist. The one exception is
LoadImageFromFile, the name that OpenMMLab's inferencers search a pipeline for: it resolves to
LoadImageWithPillow. mmengine imports this module when it meets the scope.
"""
from mmengine import registry
from mmengine.registry import DefaultScope, Registry

from nepa_mm.datasets.transforms.loading import LoadImageWithPillow


class TransparentRegistry(Registry):
    """Registry that looks names up in the innermost other scope in use, or else in mmpretrain."""

    def get(self, key: str) -> type | None:
        """Return the class or function of a name, or None."""
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
