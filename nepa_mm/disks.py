"""One run in a folder, and a full disk that costs logs but not the run."""
import fcntl
import os
from functools import wraps

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
