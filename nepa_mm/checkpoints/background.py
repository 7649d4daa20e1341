"""Checkpoints that are copied at once and written in a thread, while training goes on."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from threading import Thread
from threading import enumerate as all_threads

from mmengine import dist
from mmengine.runner import runner as mmengine_runner


class WriterThread(Thread):
    """A started thread that calls functions in order; the interpreter waits for it at its end.

    Args:
        functions (Sequence[Callable]): Called without arguments, up to the first that fails.
        report (Callable): Called in the thread with the exception of that one.

    Attributes:
        error (Exception | None): That exception. Valid after ``join()``.
    """

    def __init__(self, functions: Sequence[Callable[[], None]],
                 report: Callable[[Exception], None]):
        super().__init__()
        self.functions, self.report, self.error = list(functions), report, None
        self.start()

    def run(self):
        """Call the functions and release them, for they hold copies of the weights."""
        try:
            while self.functions:
                self.functions.pop(0)()
        except Exception as error:
            self.error = error
            self.report(error)


def join_writers() -> None:
    """Wait for every writer of this process."""
    for thread in all_threads():
        if isinstance(thread, WriterThread):
            thread.join()


@contextmanager
def deferred_saves() -> Iterator[list[Callable[[], None]]]:
    """Copy the checkpoints that a Runner saves within, instead of writing them.

    Yields:
        list[Callable]: One function per checkpoint, which writes it later, in any thread. Stays
        empty in other processes than the main one.
    """
    functions, save_checkpoint = [], mmengine_runner.save_checkpoint

    def defer(checkpoint, *args, **kwargs):
        if dist.is_main_process():
            functions.append(partial(save_checkpoint, deepcopy(checkpoint), *args, **kwargs))

    mmengine_runner.save_checkpoint = defer
    try:
        yield functions
    finally:
        mmengine_runner.save_checkpoint = save_checkpoint
