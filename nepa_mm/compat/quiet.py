"""Hold back what OpenMMLab's packages print when they are imported although nothing is wrong."""
import logging
import warnings
from functools import wraps

import mmengine.logging
from mmengine.logging import MMLogger


def quiet_imports() -> None:
    """Drop messages of which a user can change nothing; call it before mmpretrain is imported.

    mmcv-lite warns that it has no compiled operators, and NEPA needs none. mmpretrain and mmseg log
    a missing client at level DEBUG without a logger, which mmengine's ``print_log`` prints at any
    level. From now on, it prints from level INFO.
    """
    for message in ('Fail to import ``MultiScaleDeformableAttention``',
                    'Default ``avg_non_ignore`` is False',      # as in mmseg's recipes
                    'The draw is False, it means that the hook for visualization'):
        warnings.filterwarnings('ignore', message)
    print_log = mmengine.logging.print_log

    @wraps(print_log)
    def at_level(msg: object, logger: MMLogger | str | None = None,
                 level: int = logging.INFO) -> None:
        if logger is not None or level > logging.DEBUG:
            print_log(msg, logger, level)

    mmengine.logging.print_log = at_level
