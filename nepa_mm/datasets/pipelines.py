"""The steps by which the data sets of a run read and change samples, wherever they are nested."""
from mmcv.transforms import LoadImageFromFile

from nepa_mm.checkpoints.loading import unwrapped
from nepa_mm.datasets.classes import leaves
from nepa_mm.datasets.transforms.loading import LoadImageWithPillow


def slots(step):
    """(list, index) of every transform within Compose, TestTimeAug and the like, in order."""
    steps = _steps(step)
    if not isinstance(steps, list):     # a Compose within a step
        steps = _steps(steps) or []
    for index, child in enumerate(steps):
        if _steps(child):
            yield from slots(child)
        else:
            yield steps, index


def _steps(step):
    if isinstance(step, list):
        return step
    return getattr(step, 'transforms', None) or getattr(step, 'subroutines', None)


def use_one_reader(dataset, model):
    """Let a data set read files as the tools do, with as many channels as the network takes.

    mmcv's LoadImageFromFile without options becomes LoadImageWithPillow. The config stays as it is:
    OpenMMLab's inferencers look for their own names there.

    Args:
        dataset (Dataset): Changed in place; no worker has it yet.
        model (nn.Module): The network.
    """
    patch_embed = getattr(getattr(unwrapped(model), 'backbone', None), 'patch_embed', None)
    projection = getattr(patch_embed, 'projection', None)
    for leaf in leaves(dataset):
        for steps, index in slots(getattr(leaf, 'pipeline', [])):
            old = steps[index]
            if type(old) is LoadImageFromFile and vars(old) == vars(LoadImageFromFile()):
                steps[index] = LoadImageWithPillow()
            if getattr(steps[index], 'color_type', None) == 'unchanged':
                steps[index].channels = getattr(projection, 'in_channels', None)
