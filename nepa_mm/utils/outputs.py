"""Output files of the tools. No tool overwrites a file that it did not write.

Images get the next free name, which the tool prints. Files for programs (``--out``) must not exist
yet. A tool that fills a folder marks it with an empty note file and reuses only marked folders.
"""
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from mmengine import dist
from mmengine.logging import print_log
from torch.utils.data import Dataset

MAX_NAME_BYTES = 110    # of one part of a file name; file systems allow 255 in total


def truncate_name(name: str) -> str:
    """Cut a name to ``MAX_NAME_BYTES`` and drop characters that cannot be encoded."""
    return name.encode(errors='ignore')[:MAX_NAME_BYTES].decode(errors='ignore') or 'image'


def free_path(path: str | Path, taken: Container[str] = (), *folders: str | Path) -> Path:
    """Return ``path``, or if it exists ``stem_N.suffix`` with the first free N >= 2.

    Args:
        path (str | Path): The file.
        taken (Container[str]): Further names to avoid. Defaults to none.
        *folders (str | Path): Further folders in which the name must be free.

    Returns:
        Path: A path without a file or a link, not even a dangling one.
    """
    path, n = Path(path), 1
    free = path
    while free.name in taken or any(
            os.path.lexists(os.path.join(folder, free.name)) for folder in (path.parent, *folders)):
        n += 1
        free = path.with_name(f'{path.stem}_{n}{path.suffix}')
    return free


def page_names(images: Iterable[str | Path], *folders: str | Path) -> Iterator[Path]:
    """Choose an output file for each image. No name is used twice or exists already.

    Args:
        images (Iterable[str | Path]): Paths of the images.
        *folders (str | Path): Folders that get a file of that name.

    Yields:
        Path: ``x.png`` in the first folder. If taken, the name is prefixed with the image's
        folder and, if that is taken too, numbered.
    """
    taken = set()
    for image in map(Path, images):
        path = Path(folders[0]) / f'{truncate_name(image.stem)}.png'
        if free_path(path, taken, *folders[1:]) != path and image.parent.name:
            path = path.with_name(f'{truncate_name(image.parent.name)}_{path.name}')
        path = free_path(path, taken, *folders[1:])
        taken.add(path.name)
        yield path


def dataset_pages(dataset: Dataset, out_dir: str | Path) -> dict[str, Path]:
    """Map each image path of a dataset to an output file, equal in all processes.

    Logs how many outputs are not named after their image alone.
    """
    infos = [dataset.get_data_info(i) for i in range(len(dataset))] if hasattr(
        dataset, 'get_data_info') else []
    paths = list(dict.fromkeys(info['img_path'] for info in infos if info.get('img_path')))
    pages = [dict(zip(paths, page_names(paths, out_dir)))]
    dist.broadcast_object_list(pages)
    renamed = [path for path in paths if pages[0][path].stem != Path(path).stem]
    if renamed:
        print_log(f'{len(renamed)} of {len(paths)} names in {out_dir} were taken: '
                  f'{renamed[0]} becomes {pages[0][renamed[0]].name}, for example.', 'current')
    return pages[0]


def require_new_path(path: str | Path, flag: str) -> None:
    """Reject an existing file or a folder that is not empty.

    Raises:
        FileExistsError: The path exists. The message begins with ``flag``.
    """
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise FileExistsError(f'{flag} {path} exists already; remove it or name another.')


def claim_folder(folder: Path, note: str) -> None:
    """Create a folder for the files of one tool, or reuse one that the tool created.

    Args:
        folder (Path): A folder that is new, empty or contains ``note``.
        note (str): Name of the marker file. It stays empty unless the tool fills it.

    Raises:
        FileExistsError: The folder has other content.
    """
    if not (folder / note).is_file():
        require_new_path(folder, 'The folder')
        folder.mkdir(parents=True, exist_ok=True)
        (folder / note).touch()
