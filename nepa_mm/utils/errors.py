"""Errors of the user's data, which tools report in one sentence."""



class DataError(ValueError):
    """A file of the data set is at fault; the message, one sentence, names it.

    Tools end with that sentence alone whenever it is raised, also in a worker of a data loader.
    """


class UnreadableImageError(DataError):
    """An image file that is missing, corrupt or no image."""
