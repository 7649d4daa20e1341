"""The schedule of NEPA: warmup and cosine, per optimizer update."""
import logging
import math

from mmengine.logging import print_log
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import (
    PARAM_SCHEDULERS,
)


@PARAM_SCHEDULERS.register_module()
class LayerDecayCosineLR(LRSchedulerMixin, _ParamScheduler):
    """Linear warmup from 0, then a cosine to 0, per optimizer update; layer decay may vary.

    The first update has lr 0, update W the peak, W being the length of the warmup; the
    cosine would be 0 one update after the last (as in Hugging Face's schedule, which the
    released code uses). With ``accumulative_counts`` the value changes with the update,
    not with the micro-step. Iterations are counted, so a config that counts epochs needs
    ``convert_to_iter_based=True``, one that gives only a ratio ``by_epoch=False``.

    Args:
        optimizer (OptimWrapper): From :class:`LayerDecayOptimWrapperConstructor` if one
            of the two options about layers is used, else any.
        warmup (int): Length of the warmup in the unit of ``end``: epochs with
            ``convert_to_iter_based=True``, otherwise iterations. Defaults to 0.
        warmup_ratio (float, optional): The same as a share of the whole run, instead
            of ``warmup``; W is rounded up. Defaults to None.
        per_layer_warmup (bool): Whether a group at ``depth_from_top`` s warms up in only
            ``max(1, W - round(W * rate ** s))`` updates: the top layers at once, the
            bottom ones in nearly W (released fine-tuning, ``llrd_cosine_warmup``).
            Defaults to False.
        final_decay_rate (float, optional): Layer decay at the end of the run, towards
            which the constructor's rate rises linearly (paper, appendix: 0.35 or 0.60
            to 1.0). Defaults to None: constant.
        begin, end (int): First and last step, ``end`` excluded. Default to 0 and the
            length of the run.
        last_step (int): Index of the last step when resuming without a state dict.
            Defaults to -1.
        by_epoch (bool): Must be False once built; see above. Defaults to True.
        verbose (bool): Whether to print every value. Defaults to False.

    Raises:
        ValueError: Steps would be epochs, the warmup is given twice or does not fit the
            run, both options about layers are set, or the groups know no layers.
    """

    def __init__(self, optimizer, warmup=0, warmup_ratio=None, per_layer_warmup=False,
                 final_decay_rate=None, begin=0, end=INF, last_step=-1, by_epoch=True,
                 verbose=False):
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
            raise ValueError('per_layer_warmup needs a constant layer decay: leave out '
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
        """Go on with a saved schedule; warn if the config now has one of another length."""
        if state_dict['total_updates'] != self.total_updates:
            print_log(f'The checkpoint\'s schedule of {state_dict["total_updates"]} updates goes '
                      f'on; the {self.total_updates} of this config are ignored.',
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
