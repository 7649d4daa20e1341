"""What a network does with an image: where a patch looks, what it predicts."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass
class View:
    """What :func:`inspect_image` found out about one image; maps are (gh, gw), in fp32 on the CPU.

    Attributes:
        query (int): The query patch, in raster order from 0.
        target (int, optional): The patch that the output at the query predicts; None
            behind the last one, or in a network that does not predict.
        attention (ndarray): Weights of the query on the patches; NaN where a causal
            query cannot look. They sum to 1 - ``prefix_attention``.
        prefix_attention (float): Its weight on the class token.
        pca (ndarray): Colours (gh, gw, 3) in [0, 1].
        pca_variance (float): Share of the variance that these three components have.
        similarity (ndarray, optional): Cosine of the output at the query with every patch
            embedding. None, as all that follow, without a ``target``.
        next_cosine (ndarray, optional): Cosine of every patch with its prediction, at the
            patch that is predicted. NaN where none is.
        lift (ndarray, optional): The same minus the cosine of that prediction with the
            last patch that it had read. NaN also where that is the class token.
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


def attention_weights(attn, x, sin, cos, rows=slice(None)):
    """The weights with which an :class:`~nepa_mm.models.layers.Attention` sums its values.

    Args:
        attn (Attention): The module.
        x, sin, cos (Tensor): Its inputs, (B, T, D) and (T, K).
        rows (slice): Which R queries are wanted. Defaults to all.

    Returns:
        Tensor: (B, H, R, T).
    """
    q, k, _ = attn.project(x, sin, cos)
    logits = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
    if attn.causal:
        t = torch.arange(x.shape[1], device=x.device)
        logits = logits.masked_fill(t > t[rows, None], -torch.inf)
    return logits.softmax(dim=-1)


def query_attention(calls, token, heads, rollout):
    """Attention of one token over all tokens (T,): the mean over layers, or the rollout.

    Args:
        calls (list): (Attention, x, sin, cos) of each layer, the first one first.
        token (int): The query.
        heads (list[int]): Heads to average.
        rollout (bool): Whether to follow attention through the layers: the product of
            (weights + identity) / 2, see Abnar and Zuidema 2020 (arXiv 2005.00928).
    """
    if not rollout:
        rows = [attention_weights(*call, slice(token, token + 1))[0, heads] for call in calls]
        return torch.stack(rows).mean(dim=(0, 1))[0]
    row = F.one_hot(torch.tensor(token), calls[0][1].shape[1]).to(calls[0][1])
    for call in reversed(calls):
        row = (row + row @ attention_weights(*call)[0, heads].mean(dim=0)) / 2
    return row


def pca_colours(features):
    """The first three principal components of features (N, D) as colours (N, 3) in [0, 1].

    Each component runs from its 1st to its 99th percentile; its largest loading is positive.

    Returns:
        tuple[Tensor, float]: Colours, and the share of the variance that they show.
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
def inspect_image(backbone, img, query, layers, heads, block, rollout=False, shift=None):
    """Run the network on one image and look inside.

    Args:
        backbone (NEPAViT): The network, in evaluation mode.
        img (Tensor): (1, C, height, width), normalised, whole patches.
        query (int): Query patch, in raster order from 0.
        layers (list[int]): Blocks whose attention is averaged, from 0, rising.
        heads (list[int]): Heads that are averaged, from 0.
        block (int): Block whose output is shown by its principal components.
        rollout (bool): See :func:`query_attention`. Defaults to False.
        shift (int, optional): How many patches ahead the outputs predict, as in
            :class:`NEPAHead`, where 0 is compared with the next patch as
            :class:`NEPAMonitorHook` does; None in a network that does not predict.
            Defaults to None.

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
    # without the class token; its output predicts patch `shift - 1`, that of patch t predicts
    # t + shift, and those of the last `shift` patches predict nothing
    cls, h = h[0], h[prefix:]
    next_cosine, lift = z.new_full((2, num_patches), torch.nan)
    lift[shift:] = next_cosine[shift:] = (h[:-shift] * z[shift:]).sum(dim=-1)
    next_cosine[shift - 1] = cls @ z[shift - 1]
    lift[shift:] -= (h[:-shift] * z[:-shift]).sum(dim=-1)
    view.next_cosine, view.lift = as_map(next_cosine), as_map(lift)
    if query + shift < num_patches:
        view.target, view.similarity = query + shift, as_map(z @ h[query])
    return view
