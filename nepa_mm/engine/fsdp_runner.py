"""FSDP: GPUs share weights, gradients, optimizer state and EMA weights of one network.

Every process keeps a shard of each tensor (a DTensor). Blocks are gathered one by one when they
are computed, then freed. Their gradients are reduced and sharded at once. The result is that of
DistributedDataParallel.

This is torch's ``fully_shard`` inside mmengine's usual Runner: loop, hooks, checkpoints and exact
resume work as in any run. Checkpoints hold full tensors under their plain names, so a run resumes
sharded or not.

Not used: ``torch.distributed.checkpoint.state_dict`` keys optimizer state by name, which an
unsharded optimizer cannot load. mmengine's FSDPStrategy cannot resume on torch >= 2.1, rejects the
CPU, and does not support an EMA hook.
"""
import copy
from typing import Any

import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn

from nepa_mm.models.layers import Block


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a shard in every process; return other tensors unchanged."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; other tensors unchanged."""
    return tensor.to_local() if is_shard(tensor) else tensor


def is_shard(value: Any) -> bool:
    """Whether a value is a DTensor, without importing what old versions of torch lack."""
    return hasattr(value, 'full_tensor')


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of a network are shards."""
    return any(map(is_shard, model.parameters()))


def full_on_main(value: Any) -> Any:
    """Gather the shards in nested dicts to the CPU of the main process.

    Other processes write no file. They get NaN tensors of the same shape, expanded from one
    element.
    """
    if isinstance(value, dict):
        return {key: full_on_main(child) for key, child in value.items()}
    if not is_shard(value):
        return value
    full = value.full_tensor()      # all processes take part
    if dist.is_main_process():
        return full.cpu()
    return torch.full((), float('nan'), dtype=full.dtype).expand(full.shape)


def shard_like(value: Any, param: Tensor) -> Any:
    """Shard a full tensor like the parameter of its shape; return other values unchanged."""
    if not is_shard(param) or is_shard(value) or value.shape != param.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.detach().to(param.device), param.device_mesh, param.placements)


def shard(model: nn.Module) -> None:
    """Shard a network across all processes, in place.

    Afterwards ``state_dict()`` returns full tensors in the main process, ``load_state_dict()``
    accepts full tensors, and ``copy.deepcopy`` copies the shards, for EMA weights. The copy
    cannot run a forward pass.

    Args:
        model (nn.Module): A network with NEPA's blocks, equal in every process, on any device.

    Raises:
        ValueError: torch is older than 2.6, or the network has no blocks.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise ValueError(f'FSDPRunner needs torch >= 2.6, this is {torch.__version__}.') from error
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError('FSDPRunner shards the blocks of a NEPAViT, but '
                         f'{type(model).__name__} has none.')
    model.register_state_dict_post_hook(_give_full)
    model.register_load_state_dict_pre_hook(_take_full)
    # fully_shard's modules cannot be copied, so keep a skeleton on the meta device
    skeleton = copy.deepcopy(model, {id(p): nn.Parameter(p.to('meta'), p.requires_grad)
                                 for p in model.parameters()})
    for module in (*blocks, model):     # the model itself shards the rest
        fully_shard(module, reshard_after_forward=True)
    model.__deepcopy__ = lambda memo: _copy(model, skeleton)


def _give_full(module, state_dict, prefix, local_metadata):
    state_dict.update(full_on_main(dict(state_dict)))


def _take_full(module, state_dict, prefix, *args):
    for name, param in module.named_parameters(prefix=prefix.rstrip('.')):
        if name in state_dict:
            state_dict[name] = shard_like(state_dict[name], param)


def _copy(model, skeleton):
    tensors = [(skeleton.parameters(), model.parameters()),
               (skeleton.buffers(), model.buffers())]
    return copy.deepcopy(skeleton, {
        id(old): (nn.Parameter(new.detach().clone(), new.requires_grad)
                  if isinstance(old, nn.Parameter) else new.clone())
        for olds, news in tensors for old, new in zip(olds, news)})


def _take_full_state(optimizer, state_dict):
    """Pre-hook of ``Optimizer.load_state_dict``: shard the state like the weights."""
    params = [param for group in optimizer.param_groups for param in group['params']]
    numbers = [number for group in state_dict['param_groups'] for number in group['params']]
    state = {number: {name: shard_like(value, param) for name, value in
                      state_dict['state'][number].items()}
             for number, param in zip(numbers, params) if number in state_dict['state']}
    return dict(state_dict, state=state)


class DiscardBackend(LocalBackend):
    """Discards the checkpoint of processes that only help to gather it."""

    def put(self, obj, filepath):
        """Write nothing."""


register_backend('nowhere', DiscardBackend)


@RUNNERS.register_module()
class FSDPRunner(Runner):
    """mmengine's Runner with a sharded network.

    Set ``runner_type='FSDPRunner'`` in a config or after ``--cfg-options``. A single process
    trains without sharding. Gradients are reduced in every micro-step, so accumulated gradients
    stay sharded. Forward and backward pass run under the autocast of the optimizer wrapper, on
    gathered fp32 weights.

    Memory: the network is built unsharded, so its weights must fit on every GPU for a moment.
    Without ``model.backbone.with_cp=True`` autograd keeps the bf16 weights of every block from
    its forward to its backward pass, 2 bytes a parameter.

    Raises:
        ValueError: See :func:`shard`; or ``model_wrapper_cfg`` or ``sync_bn`` is set.
    """

    def wrap_model(self, model_wrapper_cfg, model):
        """Shard the main process's network."""
        if not self.distributed:
            self.logger.info('FSDPRunner runs one process and does not shard.')
            return super().wrap_model(model_wrapper_cfg, model)
        if model_wrapper_cfg or self.cfg.get('sync_bn'):
            raise ValueError('FSDPRunner wraps the model itself: remove model_wrapper_cfg '
                             f'and sync_bn, which are {model_wrapper_cfg} and '
                             f'{self.cfg.get("sync_bn")}.')
        if self._train_loop is not None and hasattr(model, 'init_weights'):
            model.init_weights()        # now, because it needs full tensors
        model = model.to(get_device())      # informs the data preprocessor, too
        for tensor in model.state_dict().values():
            dist.broadcast(tensor)
        total = sum(p.numel() for p in model.parameters())
        shard(model)
        held = sum(local_shard(p).numel() for p in model.parameters())
        self.logger.info(f'{dist.get_world_size()} processes share {total:,} parameters; '
                         f'this one holds {held:,}.')
        # The cache would keep bf16 copies of all weights until the end of the forward pass.
        torch.set_autocast_cache_enabled(False)
        return model

    def _init_model_weights(self):      # wrap_model did it
        if not self.distributed:
            super()._init_model_weights()

    def build_optim_wrapper(self, optim_wrapper):
        """Build it; its optimizer saves and loads full tensors."""
        built = super().build_optim_wrapper(optim_wrapper)
        if built is not optim_wrapper:      # mmengine calls this again with the built wrapper
            built.optimizer.register_state_dict_post_hook(
                lambda optimizer, state_dict: full_on_main(state_dict))
            built.optimizer.register_load_state_dict_pre_hook(_take_full_state)
        return built

    def save_checkpoint(self, *args, **kwargs):
        """Gather the shards in all processes, and write the checkpoint in the main process."""
        everywhere = Runner.save_checkpoint.__wrapped__     # without mmengine's @master_only
        if self.distributed and not dist.is_main_process():
            kwargs['backend_args'] = dict(backend='nowhere')
        everywhere(self, *args, **kwargs)

    def resume(self, filename, resume_optimizer=True, resume_param_scheduler=True,
               map_location='cpu'):
        """Resume from a file. Every process reads all of it, so it stays on the CPU."""
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
