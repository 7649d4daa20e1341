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


@dataclass
class Predictions:
    """Result of :func:`compare_predictions` for one image of N patches, fp32.

    Attributes:
        similarity (Tensor): Cosine of each output with each patch embedding, (1 + N, N). Row 0 is
            the class token's, row 1 + t that of patch t.
        next_cosine (Tensor): Cosine of each patch with its prediction, (N,). NaN for patches that
            are not predicted.
        lift (Tensor): ``next_cosine`` minus the cosine of the same prediction with the last patch
            that it had read, (N,). NaN also where it had read only the class token.
        rank (Tensor): Rank of each patch among all patches in the row of its prediction, from 1,
            (N,). 0 for patches that are not predicted.
    """

    similarity: Tensor
    next_cosine: Tensor
    lift: Tensor
    rank: Tensor


def compare_predictions(h: Tensor, z: Tensor, shift: int) -> Predictions:
    """Compare what a network predicts with the embeddings of all patches.

    The class token predicts patch ``shift`` - 1, the output at patch t predicts patch t +
    ``shift``, and the last ``shift`` outputs predict nothing.

    Args:
        h (Tensor): Normalised outputs of class token and patches, (1 + N, D).
        z (Tensor): Normalised patch embeddings, (N, D).
        shift (int): Number of patches that the outputs predict ahead, at least 1.

    Returns:
        Predictions: The comparison.
    """
    similarity = h @ z.T
    next_cosine, lift = z.new_full((2, len(z)), torch.nan)
    lift[shift - 1:] = next_cosine[shift - 1:] = similarity.diagonal(shift - 1)
    lift[shift - 1] = torch.nan
    lift[shift:] -= similarity.diagonal(-1)[:-shift]
    rank = torch.zeros(len(z), dtype=torch.long, device=z.device)
    rows = similarity[:len(z) - shift + 1]
    rank[shift - 1:] = 1 + (rows > next_cosine[shift - 1:, None]).sum(dim=1)
    return Predictions(similarity, next_cosine, lift, rank)


def forward_pass(backbone: nn.Module, img: Tensor, layers: Sequence[int],
                 blocks: Sequence[int]) -> tuple[Tensor, tuple[int, int], list[tuple],
                                                 list[Tensor]]:
    """Run the network on one image and catch the inputs of its attention.

    Args:
        backbone (NEPAViT): The network, in evaluation mode.
        img (Tensor): (1, C, height, width), normalised; sides are multiples of the patch size.
        layers (Sequence[int]): Blocks whose attention is needed, from 0, ascending.
        blocks (Sequence[int]): Blocks whose outputs are returned.

    Returns:
        tuple: Patch embeddings (N, D); the grid (gh, gw); (Attention, x, sin, cos) of each layer;
        tokens (T, D) after each block.
    """
    z, grid = backbone.embed(img)                                                # 1 N D
    calls = []
    handles = [backbone.layers[i].attn.register_forward_pre_hook(
        lambda attn, args: calls.append((attn, *args))) for i in layers]
    outs = backbone.encode(z, grid, blocks)                                      # 1 T D
    for handle in handles:
        handle.remove()
    return z[0], grid, calls, [x[0] for x in outs]


def predict_patches(backbone: nn.Module, z: Tensor, out: Tensor, shift: int) -> Predictions:
    """:func:`compare_predictions` of the last block's tokens (T, D) and embeddings (N, D).

    ``shift`` is that of :class:`NEPAHead`; 0 is treated as 1, as :class:`NEPAMonitorHook` does.
    """
    h = backbone.without_registers(out[None])[0]
    h, z = (F.normalize(x.float(), dim=-1, eps=1e-12) for x in (h, z))
    return compare_predictions(h, z, max(shift, 1))


@torch.no_grad()
def inspect_image(backbone: nn.Module, img: Tensor, query: int, layers: Sequence[int],
                  heads: Sequence[int], block: int, rollout: bool = False,
                  shift: int | None = None) -> View:
    """Run the network on one image and compute its maps.

    Args:
        backbone, img, layers: See :func:`forward_pass`; the attention of ``layers`` is averaged.
        query (int): Query patch, in raster order from 0.
        heads (Sequence[int]): Heads to average, from 0.
        block (int): Block whose output is shown by its principal components.
        rollout (bool): See :func:`query_attention`. Defaults to False.
        shift (int, optional): See :func:`predict_patches`. None for a network that does not
            predict. Defaults to None.

    Returns:
        View: The maps.
    """
    z, grid, calls, outs = forward_pass(backbone, img, layers, (block, -1))
    prefix = backbone.num_extra_tokens

    def as_map(values):
        return values.float().cpu().unflatten(0, grid).numpy()

    attention = query_attention(calls, prefix + query, heads, rollout)
    colours, variance = pca_colours(outs[0][prefix:])
    seen = attention[prefix:].clone()
    if backbone.causal:
        seen[query + 1:] = torch.nan
    view = View(query, None, as_map(seen), attention[:prefix].sum().item(), as_map(colours),
                variance)
    if shift is None:
        return view
    predictions = predict_patches(backbone, z, outs[-1], shift)
    view.next_cosine, view.lift = as_map(predictions.next_cosine), as_map(predictions.lift)
    if query + max(shift, 1) < len(z):
        view.target = query + max(shift, 1)
        view.similarity = as_map(predictions.similarity[1 + query])
    return view
