"""Helpers that all wings may import: errors, files, host copies, outputs, random state, signals."""


def register_all_modules(init_default_scope: bool = True) -> None:
    """Do nothing: importing nepa_mm registers everything.

    mmengine calls this function of a package's ``utils`` when it first meets its scope.
    """
