"""Parameter groups with layer-wise learning rates."""
import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from mmengine.utils import digit_version
from torch import nn

HEADS = ('head', 'decode_head', 'auxiliary_head')
ABOVE_BACKBONE = (*HEADS, 'neck', 'mask_token')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups of NEPA: layer-wise learning rates, no weight decay of 1-D parameters.

    A parameter ``s`` blocks below the last one has the learning rate ``lr * rate ** s``. s is
    0 for the last block and everything above it, and the number of blocks for class token and
    patch embedding. The released code counts this way; the constructors of mmpretrain and
    mmseg give the last block s = 1. Biases, norms and LayerScale (at most one dimension) get
    no weight decay; class token and patch kernel do.

    Parameters with equal settings share a group, because fused AdamW is faster with few.
    Groups are ordered from the bottom of the network to the top: the ``lr`` in the log is the
    lowest group's, ``base_lr`` the last block's. Groups carry ``depth_from_top`` (s) and
    ``layer_decay_rate`` for :class:`LayerDecayCosineLR`, which adds warmup per layer and a
    decay that changes during the run. Their ``lr`` is final, so mmengine's
    schedulers work as well. Frozen parameters get no group. ``fused`` is ignored on the CPU
    before torch 2.4, which does not support it.

    Args:
        optim_wrapper_cfg (dict): Optimizer wrapper; its ``optimizer`` must state ``lr``
            and ``weight_decay``.
        paramwise_cfg (dict, optional): May contain

            - ``layer_decay_rate`` (float): In (0, 1]. Defaults to 1, no layer decay.
            - ``head_lr`` (float, optional): Absolute learning rate of the heads and of
              the backbone's final norm, but not of ``fc_norm``. Defaults to None: the
              optimizer's ``lr``.

    Raises:
        ValueError: A setting is unknown, missing or out of range; the backbone has no
            ``get_layer_depth``; a parameter belongs neither to the backbone nor to a head.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        settings = dict(layer_decay_rate=1., head_lr=None)
        unknown = sorted(set(paramwise_cfg or {}) - set(settings))
        if unknown:
            raise ValueError(f'paramwise_cfg of {type(self).__name__} knows {list(settings)}, '
                             f'got {unknown}.')
        settings.update(paramwise_cfg or {})
        super().__init__(optim_wrapper_cfg, settings)
        # torch reads each group once per parameter, and a ConfigDict is slow to read
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

    def add_params(self, params: list[dict], module: nn.Module) -> None:
        """Append the groups of a model to ``params``."""
        rate, head_lr = self.paramwise_cfg['layer_decay_rate'], self.paramwise_cfg['head_lr']
        groups = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            # without layer decay the layers share their groups
            depth = self.depth_from_top(module, name) * (rate < 1)
            is_head = name.startswith('backbone.norm.') or name.split('.')[0] in HEADS
            if is_head and head_lr is not None:
                lr, label = head_lr, 'head'
            else:
                lr, label = self.base_lr * rate ** depth, f'depth_from_top_{depth}'
            decayed = param.ndim > 1
            group = groups.setdefault((lr, depth, decayed), dict(
                params=[], name=f'{label}{"" if decayed else "_no_decay"}', lr=lr,
                weight_decay=self.base_wd if decayed else 0.,
                depth_from_top=depth, layer_decay_rate=rate))
            group['params'].append(param)
        params.extend(sorted(groups.values(), key=lambda group: -group['depth_from_top']))
        print_log('\n'.join(['Parameter groups:'] + [
            f'{g["name"]:25s} lr {g["lr"]:.3e}  weight decay {g["weight_decay"]:<5.3g} '
            f'{sum(p.numel() for p in g["params"]):>11,} parameters in {len(g["params"])} tensors'
            for g in params]), logger='current')

    def depth_from_top(self, model: nn.Module, name: str) -> int:
        """How many blocks the parameter ``name`` of ``model`` is below the last block."""
        if name.split('.')[0] not in ('backbone', *ABOVE_BACKBONE):
            raise ValueError(f'{name} has no layer: parameters must belong to backbone or to one '
                             f'of {ABOVE_BACKBONE}.')
        if not hasattr(model.backbone, 'get_layer_depth'):
            raise ValueError(f'{type(self).__name__} needs a backbone with get_layer_depth, '
                             f'and {type(model.backbone).__name__} has none.')
        depth, num_depths = model.backbone.get_layer_depth(name, 'backbone.')
        return max(num_depths - 2 - depth, 0)
