"""Files that are complete or absent, locked folders, and full disks."""
import fcntl
import os
import re
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

WRITERS = ('add_config', 'add_graph', 'add_image', 'add_scalar', 'add_scalars', 'close')


def lock_folder(folder):
    """Lock a folder for as long as this process lives, however it ends.

    The kernel holds the lock, on all machines that share the folder if its file system can do so,
    so nothing has to be cleaned up. It is for other processes, not for this one.

    Args:
        folder (str): It gets a file ``.lock``.

    Returns:
        int | None: The open file; -1 where there are no locks; None if another process has it.
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
    except OSError:
        pass
    return file


def survive_full_disk(visualizer, logger):
    """Let the backends of a visualizer warn, once for as long as it lasts, where they cannot write.

    Args:
        visualizer (Visualizer): Changed in place.
        logger (Logger): Where to warn.
    """
    for backend in visualizer._vis_backends.values():
        failed = []     # shared by the writers of a backend

        def tolerant(write, backend=backend, failed=failed):
            @wraps(write)
            def call(*args, **kwargs):
                try:
                    result = write(*args, **kwargs)
                except OSError as error:
                    if not failed:
                        logger.warning(f'{type(backend).__name__} cannot write, the run goes on '
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
def atomic_write(path, overwrite=False):
    """Write a file so that it is either complete or not there.

    What was left of it by a process that was killed meanwhile is removed.

    Args:
        path (str): The file.
        overwrite (bool): Whether it may take the place of an older one, which stays until
            the new one is whole. Defaults to False.

    Yields:
        Path: A temporary file beside it, which takes its place at the end.

    Raises:
        FileExistsError: Something is there already.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path} exists already; remove it or name another.')
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    lock = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):     # no locks here
            fcntl.flock(lock, fcntl.LOCK_EX)
        mode = temporary.stat().st_mode     # of any new file; safetensors makes its own private
        yield temporary
        temporary.chmod(mode)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)      # the new name, too, outlives a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        os.close(lock)
        temporary.unlink(missing_ok=True)


def remove_leftovers(path):
    """Remove temporary files of :func:`atomic_write` that no living process of any machine holds.

    Args:
        path (Path): What was to be written; its name may be a pattern.
    """
    for file in path.parent.glob(f'.{path.stem}.*{path.suffix}'):
        if re.fullmatch(r'\..*\.\d+', file.name.removesuffix(path.suffix)) and file.is_file():
            with suppress(OSError), open(file, 'rb') as opened:     # locked, or no locks here
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
