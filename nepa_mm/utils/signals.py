"""SIGTERM asks a run to save and exit. Its processes record the request; workers ignore it."""
import atexit
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker, util

from torch.utils.data import DataLoader

Handler = Callable | int | None     # what signal.signal accepts and returns

STATUS = 128 + signal.SIGTERM       # exit status after SIGTERM, as shells report it


class Request:
    """State of a request to stop."""

    received = False    # SIGTERM reached this process
    agreed = False      # SIGTERM reached some process, and all of them learned it by this update


request = Request()


def _record(signum, frame):
    request.received = True


def record_sigterm() -> Handler:
    """Record SIGTERM from now on instead of exiting. Returns the previous handler."""
    request.received = request.agreed = False
    return _set(_record)


def exit_on_sigterm() -> Handler:
    """Exit with ``STATUS`` as soon as SIGTERM arrives. Returns the previous handler."""
    def end(signum, frame):
        record_sigterm()        # a second SIGTERM must not interrupt the exit
        raise SystemExit(STATUS)
    return _set(end)


def restore(handler: Handler) -> None:
    """Restore a handler; None changes nothing."""
    if handler is not None:
        _set(handler)


def _set(handler):
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:      # not in the main thread
        return None


def shield_workers(loader: DataLoader) -> None:
    """Block SIGTERM in the workers of a DataLoader from their start.

    ``timeout`` and Slurm signal the whole process group. Workers that exit would leave the last
    update without its batch. Shielded workers stop when their parent stops them or is gone. As it
    exits it kills them, before anything waits for them.
    """
    start = loader._get_iterator

    def start_shielded():
        if multiprocessing.get_start_method() != 'fork':
            resource_tracker.ensure_running()       # starting it later would unblock SIGTERM
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})   # workers inherit it
        try:
            return start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    loader._get_iterator = start_shielded
    atexit.register(_kill_workers)
    # the same for processes of a pool, before multiprocessing sends SIGTERM and waits
    util.Finalize(None, _kill_workers, exitpriority=100)


def _kill_workers():
    """Kill the daemons of this process, and wait until they are gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would raise
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    for daemon in daemons:
        daemon.kill()
    for daemon in daemons:
        daemon.join()
