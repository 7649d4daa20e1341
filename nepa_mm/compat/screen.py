"""Keep the screen readable: long messages and known chatter of a Runner go to the log file only."""
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from mmengine.logging import MMLogger
from mmengine.runner import Runner

# Messages of OpenMMLab's packages about their own workings, which users cannot act on.
CHATTER = re.compile('|'.join((
    r'Exp name: ', r'"FileClient" will be deprecated', r'"HardDiskBackend" is the alias',
    r'Distributed training is not used, all SyncBatchNorm',
    r'Failed to search registry with scope "mm\w+" in the "(function|inferencer|strategy)" ')))


class ScreenFilter(logging.Filter):
    """Reject known chatter, and messages of several lines up to level INFO."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        text = record.getMessage()
        long = record.levelno <= logging.INFO and '\n' in text.strip()
        return not long and not CHATTER.match(text)


def filter_screen(logger: MMLogger) -> MMLogger:
    """Add a :class:`ScreenFilter` to the handlers of a logger that are not files; return it."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler) and not any(
                isinstance(known, ScreenFilter) for known in handler.filters):
            handler.addFilter(ScreenFilter())
    return logger


@contextmanager
def filtered_runner_logs() -> Iterator[None]:
    """Filter the screen of every Runner that is built in this context.

    A Runner logs the environment and the whole config from its constructor.
    """
    build_logger = Runner.build_logger

    def build(self, *args, **kwargs):
        return filter_screen(build_logger(self, *args, **kwargs))

    with patch.object(Runner, 'build_logger', build):
        yield
