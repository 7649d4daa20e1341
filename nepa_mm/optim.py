"""How NEPA is optimised: bf16 without a loss scaler, layer-wise decay, its schedule, EMA."""
import logging
import math
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import (
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
)
from mmengine.runner.amp import autocast
from mmengine.utils import digit_version

from .fsdp import local, whole
from .history import log_scalar

HEADS = ('head', 'decode_head', 'auxiliary_head')
ABOVE_BACKBONE = (*HEADS, 'neck', 'mask_token')


@OPTIM_WRAPPERS.register_module()
class BF16OptimWrapper(OptimWrapper):
    """Forward pass under bf16 autocast; weights, gradients and optimizer state stay fp32.

    bf16 has the exponent range of fp32, so the loss needs no scaling.

    Args:
        bf16_on_cpu (bool): Whether to autocast without an accelerator too. False
            trains in fp32 there and says so in the log. Defaults to False.
        **kwargs: ``optimizer``, ``accumulative_counts`` and ``clip_grad`` of
            :class:`mmengine.optim.OptimWrapper`.
    """

    def __init__(self, bf16_on_cpu=False, **kwargs):
        super().__init__(**kwargs)
        self.bf16 = bf16_on_cpu or get_device() != 'cpu'
        if not self.bf16:
            print_log('BF16OptimWrapper found no accelerator and trains in fp32; set '
                      'bf16_on_cpu=True to autocast on the CPU.', logger='current')

    @contextmanager
    def optim_context(self, model):
        """Autocast, and leave gradients unsynchronised before the last micro-step."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16, enabled=self.bf16):
            yield

    @property
    def keeps_norm(self):
        """Whether clipping leaves the norm before it in ``grad_norm``, on its device."""
        return bool(self.clip_grad_kwargs) and self.grad_name == 'grad_norm'

    def _clip_grad(self):
        """Clip as the parent class does, but leave the norm on its device until it is printed."""
        params = [p for group in self.optimizer.param_groups for p in group['params']
                  if p.requires_grad and p.grad is not None]
        norm = whole(self.clip_func(params, **self.clip_grad_kwargs)) if params else None
        self.grad_norm = norm   # for NonFiniteGuardHook
        if norm is not None:
            log_scalar(self.message_hub, f'train/{self.grad_name}', norm)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups of NEPA: layer-wise learning rates, no weight decay of 1-D parameters.

    A parameter ``s`` blocks below the last one learns at ``lr * rate ** s``: s is 0
    for the last block and everything above it, the number of blocks for class token
    and patch embedding. This is the released code's count; the constructors of
    mmpretrain and mmseg give the last block s = 1. Biases, norms and LayerScale (all
    of at most one dimension) are not decayed, class token and patch kernel are.

    Parameters of equal settings share a group (fused AdamW wants few), from the bottom
    of the network to the top, so the log's ``lr`` is the lowest group's and its
    ``base_lr`` the last block's. A group carries ``layer_scale`` (s) and
    ``layer_decay_rate`` for :class:`LayerDecayCosineLR`; since its ``lr`` is final,
    any scheduler of mmengine works as well. Frozen parameters are left out. The optimizer's
    ``fused`` is ignored where torch cannot do it, on the CPU before 2.4.

    Args:
        optim_wrapper_cfg (dict): Optimizer wrapper; its ``optimizer`` must state ``lr``
            and ``weight_decay``.
        paramwise_cfg (dict, optional): May contain

            - ``layer_decay_rate`` (float): In (0, 1]. Defaults to 1, no layer decay.
            - ``head_lr`` (float, optional): Learning rate, absolute, of the heads and
              of the backbone's final norm, but not of ``fc_norm``. Defaults to None:
              the optimizer's ``lr``.

    Raises:
        ValueError: A setting is unknown, missing or out of range; the backbone has no
            ``get_layer_depth``; a parameter is neither the backbone's nor a head's.
    """

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        settings = dict(layer_decay_rate=1., head_lr=None)
        unknown = sorted(set(paramwise_cfg or {}) - set(settings))
        if unknown:
            raise ValueError(f'paramwise_cfg of {type(self).__name__} knows {list(settings)}, '
                             f'got {unknown}.')
        settings.update(paramwise_cfg or {})
        super().__init__(optim_wrapper_cfg, settings)
        # a ConfigDict would make its like of every group, which torch reads for every parameter
        self.optimizer_cfg = dict(self.optimizer_cfg)
        if get_device() == 'cpu' and digit_version(torch.__version__) < digit_version('2.4'):
            self.optimizer_cfg.pop('fused', None)
        kind = self.optimizer_cfg.get('type')
        if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:
            raise ValueError(f'There is no optimizer {kind!r}.')
        if self.base_lr is None or self.base_wd is None:
            raise ValueError('optimizer must state lr and weight_decay, '
                             f'got only {sorted(self.optimizer_cfg)}.')
        if not 0 < settings['layer_decay_rate'] <= 1:
            raise ValueError('layer_decay_rate must be in (0, 1], '
                             f'got {settings["layer_decay_rate"]}.')
        if settings['head_lr'] is not None and settings['head_lr'] < 0:
            raise ValueError(f'head_lr must not be negative, got {settings["head_lr"]}.')

    def add_params(self, params, module):
        """Append the groups of a whole model to the list ``params``."""
        rate, head_lr = self.paramwise_cfg['layer_decay_rate'], self.paramwise_cfg['head_lr']
        groups = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            # without layer decay the layers share their groups
            scale = self.layer_scale(module, name) * (rate < 1)
            is_head = name.startswith('backbone.norm.') or name.split('.')[0] in HEADS
            if is_head and head_lr is not None:
                lr, label = head_lr, 'head'
            else:
                lr, label = self.base_lr * rate ** scale, f'layer_scale_{scale}'
            decayed = param.ndim > 1
            group = groups.setdefault((lr, scale, decayed), dict(
                params=[], name=f'{label}{"" if decayed else "_no_decay"}', lr=lr,
                weight_decay=self.base_wd if decayed else 0.,
                layer_scale=scale, layer_decay_rate=rate))
            group['params'].append(param)
        params.extend(sorted(groups.values(), key=lambda group: -group['layer_scale']))
        print_log('\n'.join(['Parameter groups:'] + [
            f'{g["name"]:25s} lr {g["lr"]:.3e}  weight decay {g["weight_decay"]:<5.3g} '
            f'{sum(p.numel() for p in g["params"]):>11,} parameters in {len(g["params"])} tensors'
            for g in params]), logger='current')

    def layer_scale(self, model, name):
        """How many blocks the parameter ``name`` of ``model`` is below the last one."""
        if name.split('.')[0] not in ('backbone', *ABOVE_BACKBONE):
            raise ValueError(f'{name} cannot be placed: parameters must be below backbone or one '
                             f'of {ABOVE_BACKBONE}.')
        if not hasattr(model.backbone, 'get_layer_depth'):
            raise ValueError(f'{type(model.backbone).__name__} has no get_layer_depth, by which '
                             f'{type(self).__name__} places parameters.')
        depth, num_depths = model.backbone.get_layer_depth(name, 'backbone.')
        return max(num_depths - 2 - depth, 0)


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
        per_layer_warmup (bool): Whether a group at ``layer_scale`` s warms up in only
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
                and not any('layer_scale' in group for group in optimizer.param_groups)):
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
        return [initial_lr * self._factor(group.get('layer_scale', 0),
                                          group.get('layer_decay_rate', 1.))
                for initial_lr, group in zip(self.base_values, self.optimizer.param_groups)]

    def _factor(self, scale, rate):
        update, warmup = self.last_step // self.accumulative_counts, self.warmup_updates
        if self.per_layer_warmup and warmup:
            warmup = max(1, warmup - round(warmup * rate ** scale))
        if update < warmup:
            factor = update / warmup
        else:
            progress = (update - warmup) / (self.total_updates - warmup)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        if self.final_decay_rate is not None:
            # initial_lr already holds rate ** scale
            progress = update / self.total_updates
            factor *= (1 + (self.final_decay_rate / rate - 1) * progress) ** scale
        return factor


@MODELS.register_module()
class MultiTensorEMA(ExponentialMovingAverage):
    """mmengine's moving average, bit for bit, in one multi-tensor operation per update.

    The first update copies, every later one adds ``momentum`` times the difference:
    momentum 1e-4 is a decay of 0.9999, the released code's in both stages.

    Args:
        model (nn.Module): The model to average.
        momentum (float): Weight of the new value, in (0, 1). Defaults to 1e-4.
        interval (int): Updates of the model between two of the average. Defaults to 1.
        device (torch.device, optional): Where the average lives. Defaults to None: with
            the model.
        update_buffers (bool): Whether floating-point buffers are averaged too, instead
            of copied. Defaults to False.
    """

    def __init__(self, model, momentum=1e-4, interval=1, device=None, update_buffers=False):
        super().__init__(model, momentum, interval, device, update_buffers)
        # read in every update: on a GPU that would stop the host until the queue is empty
        self.steps = self.steps.cpu()
        self.places = None      # where everything is: to walk through the models takes longer

    def __getstate__(self):
        """For copies and pickles, which must not follow a copy of the model."""
        return dict(vars(self), places=None)

    @torch.no_grad()
    def update_parameters(self, model):
        """Take the current weights of ``model`` into the average."""
        if self.places is None or self.places[0] is not model:
            self.places = (model, [_place(model, name) for name in self.avg_parameters],
                           [(_place(self.module, name), _place(model, name))
                            for name, _ in self.module.named_buffers()])
        _, sources, buffers = self.places
        pairs = [(average, tensors[key])
                 for average, (tensors, key) in zip(self.avg_parameters.values(), sources)]
        steps = int(self.steps)
        if steps == 0:
            self._foreach(torch._foreach_copy_, pairs)
        elif steps % self.interval == 0:
            self._foreach(torch._foreach_lerp_,
                          [pair for pair in pairs if pair[0].is_floating_point()], self.momentum)
        if not self.update_buffers:
            self._foreach(torch._foreach_copy_, [
                (averages[key], values[key]) for (averages, key), (values, _) in buffers])
        self.steps += 1

    @staticmethod
    def _foreach(operation, pairs, *args):
        if pairs:
            operation([local(average) for average, _ in pairs],
                      [local(value).to(average.device) for average, value in pairs], *args)


def _place(model, name):
    """The dict of a module of ``model`` that holds a parameter or buffer, and its key there."""
    owner, _, key = name.rpartition('.')
    module = model.get_submodule(owner)
    return (module._parameters if key in module._parameters else module._buffers), key
