"""FSDP: several GPUs share the weights, gradients, optimizer state and average of one network.

Every process keeps a slice of each tensor (a DTensor). The blocks are gathered one after the other
when they are computed, and freed again; their gradients are averaged and sliced at once. What is
computed is what DistributedDataParallel computes.

mmengine's own FSDPStrategy cannot resume (it calls torch as 2.0 wanted it), refuses the CPU, and
its checkpoints do not go with an EMA hook. So this is torch's ``fully_shard`` below mmengine's
usual Runner: loop, hooks, checkpoints and exact resume are those of every other run. A checkpoint
holds whole tensors under their plain names, from which a run resumes sharded or not.
"""
import copy

import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from nepa_mm.models.layers import Block


def full_tensor(tensor):
    """The whole tensor in every process, of a slice or of what is whole already."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def local_shard(tensor):
    """What this process holds of a tensor: the slice, or all of what is whole."""
    return tensor.to_local() if is_shard(tensor) else tensor


def is_shard(value):
    """Whether something is a slice of a tensor; asks no torch that may not have DTensors."""
    return hasattr(value, 'full_tensor')


def is_sharded(model):
    """Whether the parameters of a network are slices."""
    return any(map(is_shard, model.parameters()))


def full_on_main(value):
    """Slices in nested dicts to whole tensors on the CPU, in the main process alone.

    The others, which write no file, get tensors of that shape full of NaN and without memory.
    """
    if isinstance(value, dict):
        return {key: full_on_main(child) for key, child in value.items()}
    if not is_shard(value):
        return value
    full = value.full_tensor()      # all processes take part
    if dist.is_main_process():
        return full.cpu()
    return torch.full((), float('nan'), dtype=full.dtype).expand(full.shape)


def shard_like(value, param):
    """The slice of a whole tensor that goes with the slice ``param``; other values as they are."""
    if not is_shard(param) or is_shard(value) or value.shape != param.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.detach().to(param.device), param.device_mesh, param.placements)


def shard(model):
    """Share a network among all processes, in place.

    ``state_dict()`` gives whole tensors to the main process, ``load_state_dict()`` takes them, and
    ``copy.deepcopy`` makes a network of equal slices that is not meant to be run, an average.

    Args:
        model (nn.Module): On any device, the same in every process, with NEPA's blocks.

    Raises:
        ValueError: torch is older than 2.6, or there are no blocks.
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
    # what fully_shard has touched cannot be copied, but its plan can: modules without memory
    plan = copy.deepcopy(model, {id(p): nn.Parameter(p.to('meta'), p.requires_grad)
                                 for p in model.parameters()})
    for module in (*blocks, model):     # the last one takes what is in no block
        fully_shard(module, reshard_after_forward=True)
    model.__deepcopy__ = lambda memo: _copy(model, plan)


def _give_full(module, state_dict, prefix, local_metadata):
    state_dict.update(full_on_main(dict(state_dict)))


def _take_full(module, state_dict, prefix, *args):
    for name, param in module.named_parameters(prefix=prefix.rstrip('.')):
        if name in state_dict:
            state_dict[name] = shard_like(state_dict[name], param)


def _copy(model, plan):
    tensors = [(plan.parameters(), model.parameters()), (plan.buffers(), model.buffers())]
    return copy.deepcopy(plan, {
        id(old): (nn.Parameter(new.detach().clone(), new.requires_grad)
                  if isinstance(old, nn.Parameter) else new.clone())
        for olds, news in tensors for old, new in zip(olds, news)})


def _take_full_state(optimizer, state_dict):
    """What ``Optimizer.load_state_dict`` calls first: slices of the state for sliced weights."""
    params = [param for group in optimizer.param_groups for param in group['params']]
    numbers = [number for group in state_dict['param_groups'] for number in group['params']]
    state = {number: {name: shard_like(value, param) for name, value in
                      state_dict['state'][number].items()}
             for number, param in zip(numbers, params) if number in state_dict['state']}
    return dict(state_dict, state=state)


class NowhereBackend(LocalBackend):
    """Where the processes that only help to gather a checkpoint put it."""

    def put(self, obj, filepath):
        """Write nothing."""


register_backend('nowhere', NowhereBackend)


@RUNNERS.register_module()
class FSDPRunner(Runner):
    """mmengine's Runner, whose processes share one network instead of having a copy each.

    ``runner_type='FSDPRunner'`` in a config, or after ``--cfg-options``, is all there is to set.
    One process alone trains as ever. Gradients are averaged in every micro-step, so that they
    stay slices while they accumulate. Forward and backward run under the autocast of the
    optimizer wrapper, on gathered fp32 weights.

    The network is built whole, so its weights alone must fit on every GPU for a moment. Without
    ``model.backbone.with_cp=True`` autograd keeps the bf16 weights of every block from its forward
    to its backward pass, 2 bytes a parameter.

    Raises:
        ValueError: See :func:`shard`; or there is a ``model_wrapper_cfg`` or ``sync_bn``.
    """

    def wrap_model(self, model_wrapper_cfg, model):
        """Give every process its slices of the main process's network."""
        if not self.distributed:
            self.logger.info('FSDPRunner has one process and nothing to share.')
            return super().wrap_model(model_wrapper_cfg, model)
        if model_wrapper_cfg or self.cfg.get('sync_bn'):
            raise ValueError('FSDPRunner shares the model by itself: leave out model_wrapper_cfg '
                             f'and sync_bn, which are {model_wrapper_cfg} and '
                             f'{self.cfg.get("sync_bn")}.')
        if self._train_loop is not None and hasattr(model, 'init_weights'):
            model.init_weights()        # now, for it reads and writes whole tensors
        model = model.to(get_device())      # BaseModel's method tells the data preprocessor, too
        for tensor in model.state_dict().values():
            dist.broadcast(tensor)
        total = sum(p.numel() for p in model.parameters())
        shard(model)
        held = sum(local_shard(p).numel() for p in model.parameters())
        self.logger.info(f'{dist.get_world_size()} processes share {total:,} parameters, of which '
                         f'this one holds {held:,}.')
        # For the whole process: bf16 copies of the weights would outlive their block until the end
        # of the forward pass.
        torch.set_autocast_cache_enabled(False)
        return model

    def _init_model_weights(self):      # wrap_model has done it
        if not self.distributed:
            super()._init_model_weights()

    def build_optim_wrapper(self, optim_wrapper):
        """Build it, with an optimizer that saves and loads its state as a whole."""
        built = super().build_optim_wrapper(optim_wrapper)
        if built is not optim_wrapper:      # mmengine calls this again with what is built
            built.optimizer.register_state_dict_post_hook(
                lambda optimizer, state_dict: full_on_main(state_dict))
            built.optimizer.register_load_state_dict_pre_hook(_take_full_state)
        return built

    def save_checkpoint(self, *args, **kwargs):
        """Write a checkpoint in the main process, for which all of them gather their slices."""
        everywhere = Runner.save_checkpoint.__wrapped__     # without mmengine's @master_only
        if self.distributed and not dist.is_main_process():
            kwargs['backend_args'] = dict(backend='nowhere')
        everywhere(self, *args, **kwargs)

    def resume(self, filename, resume_optimizer=True, resume_param_scheduler=True,
               map_location='cpu'):
        """Resume from a file, which stays off the GPU: every process reads all of it."""
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
