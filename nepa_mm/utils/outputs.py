"""Outputs of the tools: nothing takes the place of a file that a tool did not make.

Pictures, which people look at, get the next free name, and the tool says which. What programs read
(``--out``) has to be new. A tool that fills a folder knows its own by a note in it.
"""
import os
from pathlib import Path

from mmengine import dist
from mmengine.logging import print_log

NAME = 110      # bytes of a part of a name; file systems allow 255 in all


def shortened(name):
    """The beginning of a name, in characters that can be written and printed."""
    return name.encode(errors='ignore')[:NAME].decode(errors='ignore') or 'image'


def free_path(path, taken=(), *folders):
    """``path``, or the same with the first number from 2 on that is free.

    Args:
        path (str | Path): The file.
        taken (Container[str]): Names that are given away already. Defaults to none.
        *folders (str | Path): Further folders in which the name has to be free.

    Returns:
        Path: Nothing is there, not even a link that leads nowhere.
    """
    path, n = Path(path), 1
    free = path
    while free.name in taken or any(
            os.path.lexists(os.path.join(folder, free.name)) for folder in (path.parent, *folders)):
        n += 1
        free = path.with_name(f'{path.stem}_{n}{path.suffix}')
    return free


def page_names(images, *folders):
    """A file for what is made of each image: none of them twice, none of them there before.

    Args:
        images (Iterable[str]): Paths of the images.
        *folders (str | Path): Where there will be a file of that name.

    Yields:
        Path: ``x.png`` in the first folder; where that is taken with the image's folder, or else a
        number.
    """
    taken = set()
    for image in map(Path, images):
        path = Path(folders[0]) / f'{shortened(image.stem)}.png'
        if free_path(path, taken, *folders[1:]) != path and image.parent.name:
            path = path.with_name(f'{shortened(image.parent.name)}_{path.name}')
        path = free_path(path, taken, *folders[1:])
        taken.add(path.name)
        yield path


def pages_of(dataset, out_dir):
    """The pages of a data set's files, by path; every process gets those of the first.

    The log says how many are not named after the file alone.
    """
    infos = [dataset.get_data_info(i) for i in range(len(dataset))] if hasattr(
        dataset, 'get_data_info') else []
    paths = list(dict.fromkeys(info['img_path'] for info in infos if info.get('img_path')))
    pages = [dict(zip(paths, page_names(paths, out_dir)))]
    dist.broadcast_object_list(pages)
    other = [path for path in paths if pages[0][path].stem != Path(path).stem]
    if other:
        print_log(f'{len(other)} of {len(paths)} names in {out_dir} were taken: '
                  f'{other[0]} becomes {pages[0][other[0]].name}, for example.', 'current')
    return pages[0]


def check_new(path, flag):
    """Refuse a file that is there, and a folder that holds something.

    Raises:
        FileExistsError: The sentence begins with ``flag``.
    """
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise FileExistsError(f'{flag} {path} exists already; remove it or name another.')


def own_folder(folder, note):
    """Make a folder for the files of one tool, or go on in the one that it made before.

    Args:
        folder (Path): New, empty, or with ``note`` in it.
        note (str): Name of a file, empty unless the tool fills it.

    Raises:
        FileExistsError: It holds something else.
    """
    if not (folder / note).is_file():
        check_new(folder, 'The folder')
        folder.mkdir(parents=True, exist_ok=True)
        (folder / note).touch()
