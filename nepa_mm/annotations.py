"""Annotation files of mmpretrain's CustomDataset, looked at before it reads them."""
import os

from mmengine.fileio import list_from_file

SHOWN = 1000    # images of a file whose existence is checked, for a network's disk is slow


def check_annotations(path, folder, labelled, whose):
    """Refuse lines that are no ``IMAGE LABEL``, and images that are not there.

    Args:
        path (str): The file, on a local disk.
        folder (str): What its images are relative to.
        labelled (bool): Whether lines end with a label.
        whose (str): What messages call the data set.

    Raises:
        ValueError: A line is no image and an integer, or there is none.
        FileNotFoundError: An image does not exist; a thousand of them, spread evenly, are tried.
    """
    lines = list_from_file(path)
    if not lines:
        raise ValueError(f'{whose}: {path} is empty; its lines are an image'
                         f'{" and its label" * labelled} each.')
    images = lines
    if labelled:
        images = []
        for number, line in enumerate(lines, 1):
            image, _, label = line.strip().rpartition(' ')
            if not image or not label.lstrip('-').isdigit():
                raise ValueError(f'{whose}: line {number} of {path} is {line!r}; expected is an '
                                 'image, a blank and the number of its class.')
            images.append(image)
    for image in images[::len(images) // SHOWN + 1]:
        image = os.path.join(folder, image)
        if '://' not in image and not os.path.isfile(image):
            raise FileNotFoundError(f'{whose}: there is no image {image}, which {path} names.')
