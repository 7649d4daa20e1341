"""Errors of the user's input: one sentence, exit status 2, and nothing left behind."""
import logging
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.logging import MMLogger

from nepa_mm.utils.errors import DataError
from nepa_mm.utils.signals import STATUS, end_at_once, restore

TRACEBACK = 'NEPA_MM_TRACEBACK'
HINT = f' ({TRACEBACK}=1 shows where)'


class Start(Hook):
    """A run up to the end of its first step: is it done, and what was written until then?"""

    priority = 'VERY_HIGH'
    begun = False

    def __init__(self):
        self.config, self.copy, self.new_folders = None, None, []

    def before_writing(self, cfg):
        """Note what is there, before a Runner is built from ``cfg``.

        Raises:
            ValueError: Something else, such as a pipe, is in the place of the config's copy.
        """
        work_dir = Path(cfg.work_dir).absolute()
        copy = work_dir / Path(cfg.filename or '').name
        if os.path.lexists(copy) and not copy.is_file():
            raise ValueError(f'{copy} is no file, but the config will be written there.')
        self.config = copy
        self.copy = self.config.read_bytes() if self.config.is_file() else None
        self.old = set(work_dir.iterdir()) if work_dir.is_dir() else set()
        self.new_folders = [folder for folder in (work_dir, *work_dir.parents)
                            if not folder.exists()]

    def undo(self):
        """Remove what a refused run has written: log, copy of the config, new folders."""
        if self.config is None:
            return
        work_dir = self.config.parent
        logger = MMLogger.get_current_instance()
        for handler in list(logger.handlers):
            folder = Path(getattr(handler, 'baseFilename', '/')).parent
            if folder.parent == work_dir and folder not in self.old:
                logger.removeHandler(handler)
                with suppress(OSError):     # a full disk
                    handler.close()
                shutil.rmtree(folder, ignore_errors=True)
        if self.copy is not None:
            self.config.write_bytes(self.copy)
        else:
            with suppress(OSError):     # not there yet
                self.config.unlink()
        if work_dir / '.lock' not in self.old:
            with suppress(OSError):
                (work_dir / '.lock').unlink()
        for folder in (*set(work_dir.glob('*/')) - self.old, *self.new_folders):
            with suppress(OSError):     # it holds something, or another process was faster
                folder.rmdir()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """The run goes: data, network and loss fit together."""
        self.begun = True

    after_val_iter = after_test_iter = after_train_iter


@contextmanager
def user_errors():
    """End the program with one sentence and status 2 where the user's input is at fault.

    That is a :class:`DataError` or a missing file at any time, also in a worker, and everything
    until a first step is done; what is no ``ValueError`` and no ``OSError`` comes with a hint. All
    else keeps its traceback, and with ``NEPA_MM_TRACEBACK=1`` in the environment these do, too.
    SIGTERM ends the program with status 143, leaving nothing behind before a first step.

    Yields:
        Start: To be registered as a hook of the Runner.
    """
    logging.raiseExceptions = False     # a full disk: the log goes on when there is space again
    # several processes wait for one another where no Python handler is called
    alone = int(os.environ.get('WORLD_SIZE', 1)) == 1
    start, handler = Start(), end_at_once() if alone else signal.getsignal(signal.SIGTERM)
    try:
        yield start
    except SystemExit as stop:
        if stop.code == STATUS:
            if not start.begun:
                start.undo()
            handler = None      # a second SIGTERM must not cut the exit
        raise
    except Exception as error:
        usual = isinstance(error, (ValueError, OSError))
        known = not start.begun or isinstance(error, (DataError, FileNotFoundError))
        if not start.begun:
            start.undo()
        if not known or os.environ.get(TRACEBACK):
            raise
        if int(os.environ.get('RANK', 0)):
            time.sleep(10)      # the launcher ends this process if the first one says the same
        print(f'error: {reason(error)}{"" if usual else HINT}', file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        restore(handler)    # a run that raised leaves the listener of its checkpoint hook behind


@contextmanager
def part(name):
    """Say which part of a config an error belongs to, whatever its class."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        hint = '' if isinstance(error, (ValueError, OSError)) else HINT
        raise ValueError(f'{name}: {reason(error)}{hint}') from error


def reason(error):
    """The first line of an error, or the sentence of one that a worker sent."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if isinstance(error, KeyError) and ' ' not in text:
        text = f'there is no {text}'
    if 'in DataLoader worker' in text:
        text = text.split('\n')[-1].partition(': ')[2]
    return text.split('\n')[0].split(' Please check whether the value')[0] or type(error).__name__
