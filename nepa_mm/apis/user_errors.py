"""Report errors in the user's input: one sentence, exit status 2, no files left behind."""
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger

from nepa_mm.compat.screen import filter_screen
from nepa_mm.utils.errors import DataError
from nepa_mm.utils.signals import STATUS, exit_on_sigterm, restore

TRACEBACK = 'NEPA_MM_TRACEBACK'
HINT = f' ({TRACEBACK}=1 shows where)'


class RunStart(Hook):
    """Track whether the first step is done, and remove the output of a run that fails before it."""

    priority = 'VERY_HIGH'
    first_step_done = False

    def __init__(self) -> None:
        self.config_copy, self.old_config, self.new_folders = None, None, []

    def record_files(self, cfg: Config) -> None:
        """Record the existing files before a Runner is built from ``cfg``.

        Raises:
            ValueError: The path of the config's copy is taken by something other than a file, e.g.
                a pipe.
        """
        work_dir = Path(cfg.work_dir).absolute()
        copy = work_dir / Path(cfg.filename or '').name
        if os.path.lexists(copy) and not copy.is_file():
            raise ValueError(f'{copy} is not a file, but the config will be written there.')
        self.config_copy = copy
        self.old_config = copy.read_bytes() if copy.is_file() else None
        self.old = set(work_dir.iterdir()) if work_dir.is_dir() else set()
        self.new_folders = [folder for folder in (work_dir, *work_dir.parents)
                            if not folder.exists()]

    def remove_output(self) -> None:
        """Remove what a rejected run has written: log, copy of the config, new folders."""
        if self.config_copy is None:
            return
        work_dir = self.config_copy.parent
        logger = MMLogger.get_current_instance()
        for handler in list(logger.handlers):
            folder = Path(getattr(handler, 'baseFilename', '/')).parent
            if folder.parent == work_dir and folder not in self.old:
                logger.removeHandler(handler)
                with suppress(OSError):     # a full disk
                    handler.close()
                shutil.rmtree(folder, ignore_errors=True)
        if self.old_config is not None:
            self.config_copy.write_bytes(self.old_config)
        else:
            with suppress(OSError):     # not written yet
                self.config_copy.unlink()
        if work_dir / '.lock' not in self.old:
            with suppress(OSError):
                (work_dir / '.lock').unlink()
        for folder in (*set(work_dir.glob('*/')) - self.old, *self.new_folders):
            with suppress(OSError):     # not empty, or removed by another process
                folder.rmdir()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Note that data, network and loss fit together."""
        self.first_step_done = True

    after_val_iter = after_test_iter = after_train_iter


@contextmanager
def user_errors() -> Iterator[RunStart]:
    """Exit with one sentence and status 2 on an error in the user's input.

    User errors are :class:`DataError` and missing files at any time, also in a worker, and every
    exception before the first step is done. Exceptions other than ``ValueError`` and ``OSError``
    are printed with a hint. Other errors keep their traceback; ``NEPA_MM_TRACEBACK=1`` in the
    environment keeps it for all. SIGTERM exits with status 143. A run that ends before its first
    step leaves no files behind.

    Yields:
        RunStart: To be registered as a hook of the Runner.
    """
    filter_screen(MMLogger.get_current_instance())
    logging.raiseExceptions = False     # logging resumes once a full disk has space again
    # a collective call blocks Python's signal handlers
    alone = int(os.environ.get('WORLD_SIZE', 1)) == 1
    start, handler = RunStart(), exit_on_sigterm() if alone else signal.getsignal(signal.SIGTERM)
    try:
        yield start
    except SystemExit as stop:
        if stop.code == STATUS:
            if not start.first_step_done:
                start.remove_output()
            handler = None      # a second SIGTERM must not interrupt the exit
        raise
    except Exception as error:
        users = not start.first_step_done or isinstance(error, (DataError, FileNotFoundError))
        if not start.first_step_done:
            start.remove_output()
        if not users or os.environ.get(TRACEBACK):
            raise
        if int(os.environ.get('RANK', 0)):
            time.sleep(10)      # rank 0 likely prints the same; then the launcher ends this process
        print(f'error: {reason(error)}', file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        restore(handler)    # a failed run leaves the signal handler of its checkpoint hook


@contextmanager
def naming_config_part(name: str) -> Iterator[None]:
    """Prefix the message of any error with the part of the config that it belongs to."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise ValueError(f'{name}: {reason(error)}') from error


def reason(error: Exception) -> str:
    """Return the first line of an error, also of one sent by a worker.

    A hint to the traceback is added unless it is a ``ValueError`` or an ``OSError``.
    """
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if isinstance(error, KeyError) and ' ' not in text:
        text = f'there is no {text}'
    if 'in DataLoader worker' in text:
        text = text.split('\n')[-1].partition(': ')[2]
    text = text.split('\n')[0].split(' Please check whether the value')[0] or type(error).__name__
    return text if isinstance(error, (ValueError, OSError)) else text + HINT
