"""SIGTERM asks a run to save and end: its processes note it, their workers ignore it."""
import atexit
import multiprocessing
import signal
from multiprocessing import resource_tracker

STATUS = 128 + signal.SIGTERM       # of a process that SIGTERM ended, as shells count


class Request:
    """Whether SIGTERM came."""

    received = False    # to this process
    agreed = False      # to one of the processes, as all of them have learned by the same update


request = Request()


def _note(signum, frame):
    request.received = True


def listen():
    """Note SIGTERM from now on, instead of ending; return the handler before."""
    request.received = request.agreed = False
    return _set(_note)


def end_at_once():
    """End with the status of SIGTERM as soon as it comes; return the handler before."""
    def end(signum, frame):
        listen()        # a second one must not cut the exit
        raise SystemExit(STATUS)
    return _set(end)


def restore(handler):
    """Put back a handler; None leaves the one that is there."""
    if handler is not None:
        _set(handler)


def _set(handler):
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:      # only the main thread may listen
        return None


def shield_workers(loader):
    """Block SIGTERM in the workers of a DataLoader from their first moment on.

    It is sent to whole groups of processes (``timeout``, Slurm), and workers that obey leave the
    last update without its batch. They end when their parent ends them, or is gone.
    """
    start = loader._get_iterator

    def start_shielded():
        if multiprocessing.get_start_method() != 'fork':
            resource_tracker.ensure_running()       # its start would end the block
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})   # they inherit it
        try:
            return start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    loader._get_iterator = start_shielded
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)


def _end_workers():
    """Kill what multiprocessing would ask to end by SIGTERM, and then wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
