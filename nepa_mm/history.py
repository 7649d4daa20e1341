"""Logged scalars that stay on their device until somebody looks, in bounded memory."""
import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class DeferredHistory(HistoryBuffer):
    """mmengine's history of one logged scalar, at a cost that does not grow with the run.

    mmengine copies the whole history at every update, and reads every value from the GPU as
    it comes, for which the host waits until the GPU has nothing more to do. Here an update
    only keeps the value, and whoever asks for a statistic has all new values read at once. A
    copy, hence what a checkpoint holds, is mmengine's own class.

    Args:
        history (HistoryBuffer): What was logged so far.
        max_length (int): How many values are kept, at least as many as the largest window
            of a statistic.
    """

    def __init__(self, history, max_length):
        self.new = []
        super().__init__(*(values[-max_length:] for values in history.data),
                         max_length=max_length)

    def update(self, log_val, count=1):
        """Add a value, a number or a tensor with one element."""
        self.new.append((log_val.detach() if torch.is_tensor(log_val) else log_val, count))
        if len(self.new) >= self.max_length:
            self._read()

    def current(self):
        """The latest value; mmengine's timer asks for one in every iteration."""
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

    # the two arrays from which the parent class computes

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


def log_scalar(message_hub, key, value):
    """``message_hub.update_scalar`` that reads no tensor where the history is a deferred one."""
    history = message_hub.log_scalars.get(key)
    if isinstance(history, DeferredHistory):
        history.update(value)
    else:
        message_hub.update_scalar(key, value)
