"""Errors caused by the user's data, which tools report in one sentence."""


class DataError(ValueError):
    """A file of the dataset is unusable. The message is one sentence that names the file.

    Tools print only this sentence and exit, even if a data loader worker raised it.
    """


class UnreadableImageError(DataError):
    """An image file is missing, corrupt or not an image."""


def first_line(error: BaseException) -> str:
    """First line of an error's message without the full stop, or its class name if empty."""
    text = str(error).strip() or type(error).__name__
    # Pillow ends some messages with the repr of the file object
    return text.split('\n')[0].split(' <_io')[0].rstrip('.')
