"""Steps of the pipelines of data sets that are built already."""
from mmcv.transforms import LoadImageFromFile

from .classes import leaves
from .reading import LoadWholeImage


def read_whole(dataset):
    """Let LoadWholeImage read the images of a data set in place of a plain LoadImageFromFile.

    The pixels are the same, and errors name the file. The config stays as it is: inferencers look
    for OpenMMLab's own name there.

    Args:
        dataset (Dataset): Changed in place; no worker has it yet.

    Returns:
        bool: Whether there was one.
    """
    places = [(steps, index) for leaf in leaves(dataset)
              for steps, index in slots(getattr(leaf, 'pipeline', []))
              if type(steps[index]) is LoadImageFromFile
              and vars(steps[index]) == vars(LoadImageFromFile())]
    for steps, index in places:
        steps[index] = LoadWholeImage()
    return bool(places)


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
