"""Access to the transforms of a dataset, at any nesting."""
from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadImageFromFile
from torch import nn
from torch.utils.data import Dataset

from nepa_mm.checkpoints.loading import unwrapped
from nepa_mm.datasets.classes import base_datasets
from nepa_mm.datasets.transforms.loading import LoadImageWithPillow


def iter_transforms(step: Any) -> Iterator[tuple[list, int]]:
    """Yield (list, index) of every transform within Compose, TestTimeAug and the like, in order."""
    steps = _steps(step)
    if not isinstance(steps, list):     # a Compose within a step
        steps = _steps(steps) or []
    for index, child in enumerate(steps):
        if _steps(child):
            yield from iter_transforms(child)
        else:
            yield steps, index


def _steps(step):
    if isinstance(step, list):
        return step
    return getattr(step, 'transforms', None) or getattr(step, 'subroutines', None)


def use_one_reader(dataset: Dataset, model: nn.Module) -> None:
    """Make a dataset read files as the tools do, with the network's number of channels.

    Replaces mmcv's LoadImageFromFile without options by LoadImageWithPillow. The config is not
    changed, because OpenMMLab's inferencers look for their own names in it.

    Args:
        dataset (Dataset): Changed in place, before workers have a copy.
        model (nn.Module): The network, possibly wrapped.
    """
    patch_embed = getattr(getattr(unwrapped(model), 'backbone', None), 'patch_embed', None)
    projection = getattr(patch_embed, 'projection', None)
    for base in base_datasets(dataset):
        for steps, index in iter_transforms(getattr(base, 'pipeline', [])):
            old = steps[index]
            if type(old) is LoadImageFromFile and vars(old) == vars(LoadImageFromFile()):
                steps[index] = LoadImageWithPillow()
            if getattr(steps[index], 'color_type', None) == 'unchanged':
                steps[index].channels = getattr(projection, 'in_channels', None)
