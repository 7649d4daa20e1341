"""mmengine's collate functions, made available in the scope ``nepa_mm``.

mmengine passes ``_scope_`` of an inherited config on to the function.
"""
from collections.abc import Sequence
from typing import Any

from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import FUNCTIONS

from nepa_mm.utils.errors import DataError


@FUNCTIONS.register_module('default_collate', force=True)
def scoped_default_collate(samples: Sequence, _scope_: str | None = None) -> Any:
    """Stack samples by mmengine's ``default_collate``.

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
def scoped_pseudo_collate(samples: Sequence, _scope_: str | None = None) -> Any:
    """List samples by mmengine's ``pseudo_collate``."""
    return pseudo_collate(samples)
