"""Logged scalars that stay on the device until they are read, in bounded memory."""
import numpy as np
import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.registry import HOOKS


class DeferredHistory(HistoryBuffer):
    """mmengine's HistoryBuffer at constant cost per update, without host syncs.

    mmengine copies the complete history at every update and reads every value from the GPU at
    once, a host sync each. Here an update appends the value; the first statistic that is asked
    for reads all new values in one copy. Copies and pickles, and therefore checkpoints, are
    mmengine's own class.

    Args:
        history (HistoryBuffer): Values logged so far.
        max_length (int): How many values to keep; at least the largest window of a
            statistic.
    """

    def __init__(self, history: HistoryBuffer, max_length: int):
        self.new = []
        super().__init__(*(values[-max_length:] for values in history.data),
                         max_length=max_length)

    def update(self, log_val, count=1):
        """Add a value, a number or a tensor with one element."""
        self.new.append((log_val.detach() if torch.is_tensor(log_val) else log_val, count))
        if len(self.new) >= self.max_length:
            self._read()

    def current(self):
        """The latest value. mmengine's timer reads one per iteration: numbers need no sync."""
        if self.new and not torch.is_tensor(self.new[-1][0]):
            return self.new[-1][0]
        return super().current()

    def _read(self):
        if not self.new:
            return
        values, counts = zip(*self.new)
        self.new = []
        if any(map(torch.is_tensor, values)):
            values = torch.stack([torch.as_tensor(value).reshape(()) for value in values]).tolist()
        self._values = np.append(self._values, values)[-self.max_length:]
        self._counts = np.append(self._counts, counts)[-self.max_length:]

    # the parent class computes its statistics from these two arrays

    @property
    def _log_history(self):
        self._read()
        return self._values

    @_log_history.setter
    def _log_history(self, values):
        self._values = values

    @property
    def _count_history(self):
        self._read()
        return self._counts

    @_count_history.setter
    def _count_history(self, counts):
        self._counts = counts

    def __reduce__(self):
        return HistoryBuffer, self.data


def log_scalar(message_hub: MessageHub, key: str, value: float | torch.Tensor) -> None:
    """``message_hub.update_scalar`` without a sync, if the history is a DeferredHistory."""
    history = message_hub.log_scalars.get(key)
    if isinstance(history, DeferredHistory):
        history.update(value)
    else:
        message_hub.update_scalar(key, value)


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """RuntimeInfoHook that logs losses without a host sync per iteration.

    Every history of the message hub becomes a :class:`DeferredHistory`. Losses, and the
    gradient norm of :class:`~nepa_mm.engine.BF16OptimWrapper`, are read from the device when
    they are printed or saved. Histories are bounded. The log is the same.

    Replaces mmengine's hook: ``default_hooks=dict(runtime_info=dict(type=...))``.

    Args:
        max_length (int): How many values a history keeps. Defaults to 10000.

    Raises:
        ValueError: ``max_length`` is not positive or shorter than a window of the log
            processor.
    """

    def __init__(self, max_length: int = 10000):
        if max_length < 1:
            raise ValueError(f'max_length must be positive, got {max_length}.')
        self.max_length = max_length

    def before_train(self, runner):
        """Check the windows of the log, and convert the histories of a resumed run."""
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
        """Append the losses without reading them."""
        for key, value in (outputs or {}).items():
            log_scalar(runner.message_hub, f'train/{key}', value)
        self._defer(runner.message_hub)

    def _defer(self, message_hub):
        for key, history in message_hub.log_scalars.items():
            if not isinstance(history, DeferredHistory):
                message_hub.log_scalars[key] = DeferredHistory(history, self.max_length)
