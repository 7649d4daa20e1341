"""Atomic writes, folder locks and logging to a full disk."""
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from logging import Logger
from pathlib import Path

from mmengine.visualization import Visualizer

WRITERS = ('add_config', 'add_graph', 'add_image', 'add_scalar', 'add_scalars', 'close')


def lock_folder(folder: str | Path) -> int | None:
    """Lock a folder against other processes for the lifetime of this one.

    The kernel holds the lock and releases it however the process ends. It covers all machines that
    share the folder if the file system supports it. This process can lock the folder again.

    Args:
        folder (str | Path): Created if missing; gets a file ``.lock``.

    Returns:
        int | None: The open file, -1 if the folder is not writable, None if another process
        holds the lock.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        file = os.open(os.path.join(folder, '.lock'),
                       os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:
        return -1
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # workers do not inherit it
    except (BlockingIOError, PermissionError):
        os.close(file)
        return None
    except OSError:     # no locks on this file system
        pass
    return file


def survive_full_disk(visualizer: Visualizer, logger: Logger) -> None:
    """Make the backends of a visualizer warn instead of raise when they cannot write.

    Each backend warns once, and again only after it could write in between.

    Args:
        visualizer (Visualizer): Changed in place.
        logger (Logger): Receives the warnings.
    """
    for backend in visualizer._vis_backends.values():
        failed = []     # shared by all writers of a backend

        def tolerant(write, backend=backend, failed=failed):
            @wraps(write)
            def call(*args, **kwargs):
                try:
                    result = write(*args, **kwargs)
                except OSError as error:
                    if not failed:
                        logger.warning(f'{type(backend).__name__} cannot write, the run continues '
                                       f'without its logs: {error}')
                    failed[:] = [error]
                    return None
                if failed:
                    failed.clear()
                    logger.info(f'{type(backend).__name__} can write again.')
                return result
            return call

        for name in WRITERS:
            setattr(backend, name, tolerant(getattr(backend, name)))


@contextmanager
def atomic_write(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a file so that it is either complete or absent.

    Removes temporary files of the same target that killed processes left behind.

    Args:
        path (str | Path): The file. Its folder is created if missing.
        overwrite (bool): Whether to replace an existing file. The old file stays until the new
            one is complete. Defaults to False.

    Yields:
        Path: A temporary file in the same folder, renamed to ``path`` on success.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path} exists already; remove it or name another.')
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    lock = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):     # no locks on this file system
            fcntl.flock(lock, fcntl.LOCK_EX)
        mode = temporary.stat().st_mode     # default mode; safetensors makes its files private
        yield temporary
        temporary.chmod(mode)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)      # make the rename survive a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        os.close(lock)
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of :func:`atomic_write` that no live process on any machine locks.

    Args:
        path (Path): The target of the write; its name may be a glob pattern.
    """
    for file in path.parent.glob(f'.{path.stem}.*{path.suffix}'):
        if re.fullmatch(r'\..*\.\d+', file.name.removesuffix(path.suffix)) and file.is_file():
            with suppress(OSError), open(file, 'rb') as opened:     # locked, or no locks here
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
