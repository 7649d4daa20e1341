"""Hold back what OpenMMLab's packages print when they are imported although nothing is wrong."""
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import import_module
from unittest.mock import patch

import mmengine.logging
from mmengine.logging import MMLogger

HARMLESS = (
    'Fail to import ``MultiScaleDeformableAttention``',     # mmcv-lite; NEPA needs no operators
    'Default ``avg_non_ignore`` is False',                  # as in mmseg's recipes
    'The given NumPy array is not writable',                # mmpretrain reads MNIST files
    'The draw is False, it means that the hook for visualization')


def ignore_harmless_warnings() -> None:
    """Ignore warnings of mmcv, mmpretrain and mmseg that users cannot act on."""
    for message in HARMLESS:
        warnings.filterwarnings('ignore', message)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """In this context, mmengine's ``print_log`` prints nothing at level DEBUG.

    mmpretrain and mmseg log a missing optional package at this level when they are imported.
    Without a logger, ``print_log`` prints at any level. Errors and other messages are shown.
    """
    print_log = mmengine.logging.print_log

    @wraps(print_log)
    def at_level(msg: object, logger: MMLogger | str | None = None,
                 level: int = logging.INFO) -> None:
        if logger is not None or level > logging.DEBUG:
            print_log(msg, logger, level)

    with patch.object(mmengine.logging, 'print_log', at_level):
        yield


def import_mmseg() -> None:
    """Import mmseg's datasets, which print when they are imported, quietly and if installed."""
    with quiet_imports(), suppress(ImportError):    # reported where it is used
        import_module('mmseg.datasets')
