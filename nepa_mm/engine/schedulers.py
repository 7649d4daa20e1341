"""NEPA's schedule: warmup and cosine per optimizer update, with layer decay."""
import logging
import math

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class LayerDecayCosineLR(LRSchedulerMixin, _ParamScheduler):
    """Linear warmup from 0, then a cosine to 0, per optimizer update; optional layer decay.

    With a warmup of W updates, the first update has lr 0 and update W the peak. The cosine
    reaches 0 one update after the last, as in Hugging Face's schedule (released code). With
    ``accumulative_counts`` the value changes per update, not per micro-step. The scheduler
    counts iterations: a config in epochs needs ``convert_to_iter_based=True``, a config with
    only a ratio ``by_epoch=False``.

    Args:
        optimizer (OptimWrapper): Must come from :class:`LayerDecayOptimWrapperConstructor`
            for ``per_layer_warmup`` and ``final_decay_rate``.
        warmup (int): Length of the warmup in the unit of ``end``: epochs with
            ``convert_to_iter_based=True``, otherwise iterations. Defaults to 0.
        warmup_ratio (float, optional): Length of the warmup as a fraction of the run,
            rounded up; replaces ``warmup``. Defaults to None.
        per_layer_warmup (bool): Whether a group at ``depth_from_top`` s warms up in
            ``max(1, W - round(W * rate ** s))`` updates: the top layers at once, the
            bottom layers in nearly W (released fine-tuning, ``llrd_cosine_warmup``).
            Defaults to False.
        final_decay_rate (float, optional): Layer decay at the end of the run. The
            constructor's rate rises linearly to it (paper, appendix: 0.35 or 0.60 to 1.0).
            Defaults to None: constant.
        begin, end (int): First and last step, ``end`` excluded. Default to 0 and the
            length of the run.
        last_step (int): Index of the last step when resuming without a state dict.
            Defaults to -1.
        by_epoch (bool): Must be False once built; see above. Defaults to True.
        verbose (bool): Whether to print every value. Defaults to False.

    Raises:
        ValueError: The unit is epochs, the warmup is given twice or does not fit the run,
            both layer options are set, or the groups have no ``depth_from_top``.
    """

    def __init__(self, optimizer: OptimWrapper, warmup: int = 0,
                 warmup_ratio: float | None = None, per_layer_warmup: bool = False,
                 final_decay_rate: float | None = None, begin: int = 0, end: int = INF,
                 last_step: int = -1, by_epoch: bool = True, verbose: bool = False):
        if by_epoch:
            raise ValueError('LayerDecayCosineLR counts iterations: set '
                             'convert_to_iter_based=True, or by_epoch=False.')
        if end >= INF:
            raise ValueError('LayerDecayCosineLR needs the length of the run as end, got none.')
        if warmup and warmup_ratio is not None:
            raise ValueError('Give warmup or warmup_ratio, not both: '
                             f'got {warmup} and {warmup_ratio}.')
        if warmup_ratio is not None and not 0 <= warmup_ratio < 1:
            raise ValueError(f'warmup_ratio must be in [0, 1), got {warmup_ratio}.')
        if not 0 <= warmup < end - begin:
            raise ValueError(f'A warmup of {warmup} iterations does not fit a run of '
                             f'{end - begin}.')
        if final_decay_rate is not None and not 0 < final_decay_rate <= 1:
            raise ValueError(f'final_decay_rate must be in (0, 1], got {final_decay_rate}.')
        if per_layer_warmup and final_decay_rate is not None:
            raise ValueError('per_layer_warmup needs a constant layer decay: remove '
                             'final_decay_rate or per_layer_warmup.')
        if ((per_layer_warmup or final_decay_rate is not None)
                and not any('depth_from_top' in group for group in optimizer.param_groups)):
            raise ValueError('per_layer_warmup and final_decay_rate need optim_wrapper.constructor='
                             "'LayerDecayOptimWrapperConstructor'.")
        # a step of this scheduler is a micro-step where the optimizer wrapper accumulates
        counts = getattr(optimizer, '_accumulative_counts', 1)
        self.accumulative_counts = counts
        self.total_updates = math.ceil((end - begin) / counts)
        self.warmup_updates = math.ceil(warmup / counts if warmup_ratio is None
                                        else self.total_updates * warmup_ratio)
        self.per_layer_warmup = per_layer_warmup
        self.final_decay_rate = final_decay_rate
        self.layers = [(group.get('depth_from_top', 0), group.get('layer_decay_rate', 1.))
                       for group in optimizer.param_groups]
        super().__init__(optimizer, begin, end, last_step, by_epoch, verbose)

    def load_state_dict(self, state_dict):
        """Continue a saved schedule; warn if the config has another length."""
        if state_dict['total_updates'] != self.total_updates:
            print_log(f'The checkpoint\'s schedule of {state_dict["total_updates"]} updates '
                      f'continues; the {self.total_updates} updates of this config are ignored.',
                      logger='current', level=logging.WARNING)
        super().load_state_dict(state_dict)

    @classmethod
    def build_iter_from_epoch(cls, *args, epoch_length, warmup=0, begin=0, end=INF, by_epoch=True,
                              **kwargs):
        """Build the scheduler from a config that counts epochs of ``epoch_length`` iterations."""
        return cls(*args, warmup=round(warmup * epoch_length), begin=begin * epoch_length,
                   end=end * epoch_length, by_epoch=False, **kwargs)

    def _get_value(self):
        return [initial_lr * self._factor(*layer)
                for initial_lr, layer in zip(self.base_values, self.layers)]

    def _factor(self, depth, rate):
        update, warmup = self.last_step // self.accumulative_counts, self.warmup_updates
        if self.per_layer_warmup and warmup:
            warmup = max(1, warmup - round(warmup * rate ** depth))
        if update < warmup:
            factor = update / warmup
        else:
            progress = (update - warmup) / (self.total_updates - warmup)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        if self.final_decay_rate is not None:
            # initial_lr already holds rate ** depth
            progress = update / self.total_updates
            factor *= (1 + (self.final_decay_rate / rate - 1) * progress) ** depth
        return factor
