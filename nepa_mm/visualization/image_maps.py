"""Attention, features and predictions of a network for one image."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class View:
    """Result of :func:`inspect_image` for one image. Maps are (gh, gw), fp32.

    Attributes:
        query (int): The query patch, in raster order from 0.
        target (int, optional): The patch that the output at the query predicts. None if it would
            lie behind the last patch, or if the network does not predict.
        attention (ndarray): Attention weights of the query on the patches, which sum to
            1 - ``prefix_attention``. NaN where a causal query cannot attend.
        prefix_attention (float): Attention weight of the query on the class token.
        pca (ndarray): Colours (gh, gw, 3) in [0, 1].
        pca_variance (float): Fraction of the variance in these three components.
        similarity (ndarray, optional): Cosine of the output at the query with each patch
            embedding. None without a ``target``.
        next_cosine (ndarray, optional): Cosine of each patch with its prediction. NaN for patches
            that are not predicted. None if the network does not predict.
        lift (ndarray, optional): ``next_cosine`` minus the cosine of the same prediction with the
            last patch that it had read. NaN also where it had read only the class token. None if
            the network does not predict.
    """

    query: int
    target: int | None
    attention: np.ndarray
    prefix_attention: float
    pca: np.ndarray
    pca_variance: float
    similarity: np.ndarray | None = None
    next_cosine: np.ndarray | None = None
    lift: np.ndarray | None = None


def attention_weights(attn: nn.Module, x: Tensor, sin: Tensor, cos: Tensor,
                      rows: slice = slice(None)) -> Tensor:
    """Compute the softmax weights of an :class:`~nepa_mm.models.layers.Attention`.

    Args:
        attn (Attention): The module.
        x, sin, cos (Tensor): Its inputs, (B, T, D) and twice (T, K).
        rows (slice): Queries to compute. Defaults to all.

    Returns:
        Tensor: (B, H, R, T) for R queries.
    """
    q, k, _ = attn.project(x, sin, cos)
    logits = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
    if attn.causal:
        t = torch.arange(x.shape[1], device=x.device)
        logits = logits.masked_fill(t > t[rows, None], -torch.inf)
    return logits.softmax(dim=-1)


def query_attention(calls: Sequence[tuple], token: int, heads: Sequence[int],
                    rollout: bool) -> Tensor:
    """Attention of one token over all tokens (T,): mean over layers, or rollout.

    Args:
        calls (Sequence[tuple]): (Attention, x, sin, cos) of each layer, in order.
        token (int): The query.
        heads (Sequence[int]): Heads to average.
        rollout (bool): Whether to multiply (weights + identity) / 2 of all layers, see Abnar and
            Zuidema 2020 (arXiv 2005.00928).
    """
    if not rollout:
        rows = [attention_weights(*call, slice(token, token + 1))[0, heads] for call in calls]
        return torch.stack(rows).mean(dim=(0, 1))[0]
    row = F.one_hot(torch.tensor(token), calls[0][1].shape[1]).to(calls[0][1])
    for call in reversed(calls):
        row = (row + row @ attention_weights(*call)[0, heads].mean(dim=0)) / 2
    return row


def pca_colours(features: Tensor) -> tuple[Tensor, float]:
    """Map the first three principal components of features (N, D) to colours (N, 3) in [0, 1].

    Each component is scaled from its 1st..99th percentile. Its largest loading is positive.

    Returns:
        tuple[Tensor, float]: Colours, and the fraction of the variance that they show.
    """
    features = features.double().cpu()
    features = features - features.mean(dim=0)
    variances, directions = torch.linalg.eigh(features.T @ features)
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    colours = features @ (directions * largest.sign())
    low, high = colours.quantile(torch.tensor([0.01, 0.99], dtype=torch.double), dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours, (variances[-3:].sum() / variances.sum().clamp(min=1e-12)).item()


@torch.no_grad()
def inspect_image(backbone: nn.Module, img: Tensor, query: int, layers: Sequence[int],
                  heads: Sequence[int], block: int, rollout: bool = False,
                  shift: int | None = None) -> View:
    """Run the network on one image and compute its maps.

    Args:
        backbone (NEPAViT): The network, in evaluation mode.
        img (Tensor): (1, C, height, width), normalised; sides are multiples of the patch size.
        query (int): Query patch, in raster order from 0.
        layers (Sequence[int]): Blocks whose attention is averaged, from 0, ascending.
        heads (Sequence[int]): Heads to average, from 0.
        block (int): Block whose output is shown by its principal components.
        rollout (bool): See :func:`query_attention`. Defaults to False.
        shift (int, optional): Number of patches that the outputs predict ahead, as in
            :class:`NEPAHead`. 0 is treated as 1, as :class:`NEPAMonitorHook` does. None for a
            network that does not predict. Defaults to None.

    Returns:
        View: The maps.
    """
    z, grid = backbone.embed(img)                                                # 1 N D
    calls = []
    handles = [backbone.layers[i].attn.register_forward_pre_hook(
        lambda attn, args: calls.append((attn, *args))) for i in layers]
    outs = backbone.encode(z, grid, (block, -1))                                 # 1 1+N D
    for handle in handles:
        handle.remove()
    prefix, num_patches = backbone.num_extra_tokens, z.shape[1]

    def as_map(values):
        return values.float().cpu().unflatten(0, grid).numpy()

    attention = query_attention(calls, prefix + query, heads, rollout)
    colours, variance = pca_colours(outs[0][0, prefix:])
    seen = attention[prefix:].clone()
    if backbone.causal:
        seen[query + 1:] = torch.nan
    view = View(query, None, as_map(seen), attention[:prefix].sum().item(), as_map(colours),
                variance)
    if shift is None:
        return view
    shift = max(shift, 1)
    z, h = (F.normalize(x[0].float(), dim=-1, eps=1e-12) for x in (z, outs[-1]))
    # The output at patch t predicts patch t + shift; the class token predicts patch shift - 1; the
    # last `shift` outputs predict nothing.
    cls, h = h[0], h[prefix:]
    next_cosine, lift = z.new_full((2, num_patches), torch.nan)
    lift[shift:] = next_cosine[shift:] = (h[:-shift] * z[shift:]).sum(dim=-1)
    next_cosine[shift - 1] = cls @ z[shift - 1]
    lift[shift:] -= (h[:-shift] * z[:-shift]).sum(dim=-1)
    view.next_cosine, view.lift = as_map(next_cosine), as_map(lift)
    if query + shift < num_patches:
        view.target, view.similarity = query + shift, as_map(z @ h[query])
    return view
