"""Logging that costs the same at the first iteration and at the millionth."""
from mmengine.hooks import RuntimeInfoHook
from mmengine.registry import HOOKS

from ..history import DeferredHistory, log_scalar


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """mmengine's RuntimeInfoHook, which logs losses, without a wait in every iteration.

    Every history of the message hub becomes a :class:`~nepa_mm.history.DeferredHistory`:
    losses and, with :class:`~nepa_mm.optim.BF16OptimWrapper`, the gradient norm are read
    from the device when they are printed or saved, and a history keeps only its latest
    values. What is printed is the same.

    Use it in place of mmengine's: ``default_hooks=dict(runtime_info=dict(type=...))``.

    Args:
        max_length (int): How many values a history keeps. Defaults to 10000.

    Raises:
        ValueError: ``max_length`` is not positive, or a window of the log processor is
            longer.
    """

    def __init__(self, max_length=10000):
        if max_length < 1:
            raise ValueError(f'max_length must be positive, got {max_length}.')
        self.max_length = max_length

    def before_train(self, runner):
        """Check what the log will ask for, and take over the histories of a resumed run."""
        super().before_train(runner)
        processor, epoch = runner.log_processor, len(runner.train_dataloader)
        for window in [processor.window_size] + [
                cfg.get('window_size') or 'global' for cfg in processor.custom_cfg]:
            length = dict({'epoch': epoch, 'global': runner.max_iters}).get(window, window)
            if length > self.max_length:
                raise ValueError(
                    f'log_processor has a window of {length} iterations ({window!r}), but '
                    f'{type(self).__name__} keeps {self.max_length}; raise its max_length.')
        self._defer(runner.message_hub)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Keep the losses, unread."""
        for key, value in (outputs or {}).items():
            log_scalar(runner.message_hub, f'train/{key}', value)
        self._defer(runner.message_hub)

    def _defer(self, message_hub):
        for key, history in message_hub.log_scalars.items():
            if not isinstance(history, DeferredHistory):
                message_hub.log_scalars[key] = DeferredHistory(history, self.max_length)
