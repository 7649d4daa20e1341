"""Other implementations of NEPA and their training step, for benchmarks/benchmark.py."""
import copy
import time
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.attention import SDPBackend

from nepa_mm.checkpoints.huggingface_config import published_config
from nepa_mm.engine.ema import MultiTensorEMA
from nepa_mm.models.layers import RotaryEmbedding
from nepa_mm.models.nepa import next_embedding_loss
from nepa_mm.models.timm_eva import to_timm
from nepa_mm.models.vit import NEPAViT


def nepa_config(bases, **backbone):
    """Return the config of our pretraining model with changes to the backbone."""
    cfg = Config.fromfile(bases / 'models' / 'nepa_vit-b.py').model
    cfg.backbone.update(backbone)
    return cfg


def build_nepa(bases, **backbone):
    """Build our pretraining model on the current device.

    Args:
        bases (Path): Folder ``configs/_base_``.
        **backbone: Changes to the backbone's config.

    Returns:
        NEPA: In training mode.
    """
    init_default_scope('mmpretrain')
    return MODELS.build(nepa_config(bases, **backbone)).to(get_device()).train()


def rotate_half(x, sin, cos):
    """Rotate like ``layers.rotate``, slice by slice as in the released code."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class EagerBlock(nn.Module):
    """A block with separate projections and the class token split off before the rotation."""

    def __init__(self, dim, num_heads, hidden):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-12), nn.LayerNorm(dim, 1e-12)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 1e-5)) for _ in range(2))

    def forward(self, x, sin, cos):                                     # B T D -> B T D
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))     # B H T K
        q, k = (F.layer_norm(t, t.shape[-1:], eps=1e-12) for t in (q, k))
        q, k = (torch.cat((t[:, :, :1], rotate_half(t[:, :, 1:], sin, cos)), dim=2).to(v.dtype)
                for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.scale1 * self.out(y.transpose(1, 2).flatten(2))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class EagerNEPA(nn.Module):
    """NEPA as the released code computes it, without packing and with all tokens.

    The arguments are those of an entry of ``NEPAViT.arch_zoo``.
    """

    def __init__(self, embed_dims, num_layers, num_heads, feedforward_channels):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, embed_dims, 14, 14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.rope = RotaryEmbedding(embed_dims // num_heads)
        self.blocks = nn.ModuleList(
            EagerBlock(embed_dims, num_heads, feedforward_channels) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embed_dims, 1e-12)

    def forward(self, images):
        """Compute the loss of images (B, 3, height, width)."""
        z = self.patch_embed(images)                                    # B D gh gw
        sin, cos = self.rope(z.shape[2:], 0, images.device)
        z = z.flatten(2).transpose(1, 2)                                # B N D
        x = torch.cat((self.cls_token.expand(len(z), -1, -1), z), dim=1)
        for block in self.blocks:
            x = block(x, sin, cos)
        return next_embedding_loss(self.norm(x)[:, :-1], z.detach())


def timm_nepa(arch, state_dict):
    """Return timm's Eva with our weights, and its loss function."""
    eva = to_timm(dict(backbone=dict(arch=arch)), state_dict).to(get_device()).train()
    embeddings = []
    eva.patch_embed.register_forward_hook(lambda module, args, out: embeddings.append(out))

    def loss(images):
        h = eva.forward_features(images)
        return next_embedding_loss(h[:, :-1], embeddings.pop().flatten(1, -2).detach())
    return eva, loss


def published_nepa(model):
    """Build `vit_nepa` with our config, from Hugging Face or from the authors' checkout.

    Args:
        model (dict): Config of our model.

    Returns:
        nn.Module | None: A model whose outputs have a ``loss``. None if neither can be imported.
    """
    for name in ('transformers.models.vit_nepa', 'models.vit_nepa'):
        try:
            package = import_module(name)
        except ImportError:
            continue
        config = package.ViTNepaConfig.from_dict(published_config(model))
        return package.ViTNepaForPreTraining(config).to(get_device()).train()
    return None


def build_candidates(bases, arch, compile_blocks):
    """Build all implementations.

    Args:
        bases (Path): Folder ``configs/_base_``.
        arch (str): A key of ``NEPAViT.arch_zoo``.
        compile_blocks (bool): Whether to add our model with compiled blocks.

    Returns:
        dict[str, tuple[nn.Module, Callable]]: Model and loss function by name, our model first.
    """
    dims = NEPAViT.arch_zoo[arch]
    models = {}
    for name, compiled in {'nepa_mm': False, 'nepa_mm, compiled': True}.items():
        if not compiled or compile_blocks:
            model = build_nepa(bases, arch=arch, compile_blocks=compiled)
            models[name] = model, lambda images, model=model: model.loss(images)['loss']
    eager = EagerNEPA(**dims).to(get_device())
    models['eager, unpacked'] = eager, eager
    models['timm Eva'] = timm_nepa(arch, models['nepa_mm'][0].state_dict())
    if published := published_nepa(nepa_config(bases, arch=arch)):
        models['vit_nepa'] = published, lambda images: published(pixel_values=images).loss
    if find_spec('stable_pretraining'):
        from stable_pretraining.methods.nepa import NEPA
        peer = NEPA(embed_dim=dims['embed_dims'], depth=dims['num_layers'],
                    num_heads=dims['num_heads'], use_swiglu=False).to(get_device()).train()
        models['stable-pretraining'] = peer, lambda images: peer(images).loss
    return models


def our_update(bases, model):
    """Return an update with clipping, AdamW and EMA as in our pretraining configs."""
    cfg = Config.fromfile(bases / 'schedules' / 'pretrain_bs4096_1600e.py').optim_wrapper
    wrapper = build_optim_wrapper(model, ConfigDict(cfg, accumulative_counts=1))
    average = MultiTensorEMA(model)

    def update():
        wrapper.step()
        wrapper.zero_grad()
        average.update_parameters(model)
    return update


def plain_update(model):
    """Return the same update with torch's defaults and EMA tensor by tensor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update():
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        for mean, value in zip(average.parameters(), model.parameters()):
            mean.lerp_(value, 1e-4)
    return update


def attention_kernel(model, dtype):
    """Return the kernel that torch selects for our attention, such as 'flash_attention'.

    Args:
        model (NEPA): The model.
        dtype (torch.dtype): Type of queries, keys and values.
    """
    heads = model.backbone.layers[0].attn.num_heads
    q = torch.empty(1, heads, 256, model.backbone.embed_dims // heads, dtype=dtype,
                    device=get_device(), requires_grad=True)
    choice = torch._fused_sdp_choice(q, q, q, is_causal=model.backbone.causal)
    return SDPBackend(choice).name.lower()


def synchronize():
    """Wait for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark():
    """Return the present moment: a CUDA event if there is a GPU, else seconds."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def build_step(loss, update, images, bf16):
    """Return a training step that returns the seconds for the gradients and for the update.

    On a GPU the measured step follows another one without waiting for it, as in a training run, and
    the seconds are the GPU's.
    """
    autocast = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16)

    def run():
        marks = [mark()]
        with autocast:
            value = loss(images)
        value.backward()
        marks.append(mark())
        update()
        return *marks, mark()

    def step():
        if torch.cuda.is_available():
            run()
        start, middle, end = run()
        synchronize()
        if torch.cuda.is_available():
            return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3
        return middle - start, end - middle
    return step


def saved_bytes(model, images, bf16):
    """Count the bytes that autograd saves in a forward pass, without parameters.

    Args:
        model (NEPA): In training mode.
        images (Tensor): (batch, channels, height, width).
        bf16 (bool): Whether to use mixed precision; its copies of the weights are counted.

    Returns:
        int: Bytes.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage      # keeps it alive: addresses are reused
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16)):
        model.loss(images)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)
