"""A page to explore in a browser what a network does with images: one file, without a server.

explore.html is the page; this module fills in its data. A byte stores the square root of an
attention weight, relative to that of the largest weight in its row, in ``LEVELS`` steps. A weight
therefore deviates by less than 1 / ``LEVELS`` of the largest one. Deflate and base64 follow.
"""
import base64
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nepa_mm.utils.files import atomic_write
from nepa_mm.visualization.image_maps import attention_weights, forward_pass, predict_patches

TEMPLATE = Path(__file__).with_name('explore.html')
LEVELS = 50             # keeps 256 patches of ViT-B below 5 MB
MAX_WEIGHTS = 60e6      # on one page; about 60 MB


def count_weights(grids: Sequence[tuple[int, int]], num_prefix: int, num_layers: int,
                  num_heads: int, causal: bool) -> int:
    """Number of attention weights on a page; see :func:`check_size`."""
    tokens = [num_prefix + rows * columns for rows, columns in grids]
    per_head = sum(t * (t + 1) // 2 if causal else t * t for t in tokens)
    return per_head * num_layers * (num_heads + 1)      # and the rollout


def check_size(num_weights: int) -> None:
    """Refuse a page that a browser could not hold.

    Raises:
        ValueError: There are more than ``MAX_WEIGHTS`` weights.
    """
    if num_weights > MAX_WEIGHTS:
        raise ValueError(
            f'The page would hold {num_weights / 1e6:.0f} million attention weights, more than '
            f'{MAX_WEIGHTS / 1e6:.0f} million; give fewer images or a smaller --size, or choose '
            '--layers and --heads.')


def quantise(weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Store rows of attention weights (..., T) in one byte each.

    Returns:
        tuple[ndarray, ndarray]: The largest weight of each row as -4096 log2 (...), uint16; the
        square roots of weights in 1 / ``LEVELS`` of that of the largest (..., T), uint8.
    """
    largest = weights.amax(dim=-1, keepdim=True)
    codes = (LEVELS * (weights / largest).sqrt()).round().byte()
    logs = (-4096 * largest[..., 0].clamp(max=1).log2()).round()
    return logs.cpu().numpy().astype('<u2'), codes.cpu().numpy()


def pack_attention(calls: Sequence[tuple], heads: Sequence[int]) -> list[bytes]:
    """Attention of all tokens over all tokens by layer and head, with the rollout as last head.

    The rollout of a layer is that of :func:`query_attention` over all layers up to it.

    Returns:
        list[bytes]: Largest weights, (L, H + 1, T); codes, (L, H + 1, T, T) or of a causal network
        only those on and below the diagonal.
    """
    largest, codes, rollout = [], [], torch.eye(calls[0][1].shape[1], device=calls[0][1].device)
    below = np.tril(np.ones(rollout.shape, dtype=bool)) | (not calls[0][0].causal)
    for call in calls:
        weights = attention_weights(*call)[0, list(heads)].float()              # H T T
        rollout = (rollout + weights.mean(dim=0) @ rollout) / 2
        maximum, code = quantise(torch.cat((weights, rollout[None])))
        largest.append(maximum.tobytes())
        codes.append(code[:, below].tobytes())
    return [*largest, *codes]


@torch.no_grad()
def describe_image(backbone: nn.Module, img: Tensor, name: str, pixels: np.ndarray,
                   layers: Sequence[int], heads: Sequence[int],
                   shift: int | None = None) -> dict[str, Any]:
    """Run the network on one image and collect what the page shows of it.

    Args:
        backbone, img, layers: See :func:`forward_pass`.
        name (str): Name of the image.
        pixels (ndarray): Pixels that the network saw, (height, width, 3), uint8, RGB.
        heads (Sequence[int]): Heads to show, from 0.
        shift (int, optional): See :func:`predict_patches`. None for a network that does not
            predict. Defaults to None.

    Returns:
        dict: JSON-compatible. ``data`` is compressed: the parts of :func:`pack_attention`, before
        them the similarity (1 + N, N) in 1 / 32767, int16, if the network predicts.
    """
    z, grid, calls, outs = forward_pass(backbone, img, layers, (-1,))
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, 'PNG', optimize=True)
    entry = dict(name=name, grid=grid, size=pixels.shape[1::-1],
                 picture=base64.b64encode(picture.getvalue()).decode())
    parts = pack_attention(calls, heads)
    if shift is not None:
        shown = predict_patches(backbone, z, outs[-1], shift)
        similarity = (shown.similarity.clamp(-1, 1) * 32767).round()
        parts.insert(0, similarity.cpu().numpy().astype('<i2').tobytes())
        entry.update(rank=shown.rank.tolist(), next_cosine=as_numbers(shown.next_cosine),
                     lift=as_numbers(shown.lift))
    entry['data'] = base64.b64encode(zlib.compress(b''.join(parts), 9)).decode()
    return entry


def as_numbers(values: Tensor) -> list[float | None]:
    """Round values (N,) to five decimals; None for NaN."""
    return [None if value != value else round(value, 5) for value in values.tolist()]


def write_page(path: Path, entries: Sequence[dict[str, Any]], backbone: nn.Module,
               layers: Sequence[int], heads: Sequence[int], source: str, note: str | None = None,
               shift: int | None = None, query: Sequence[int] | None = None,
               overwrite: bool = False) -> None:
    """Write the page.

    Args:
        path (Path): The output file.
        entries (Sequence[dict]): Images, from :func:`describe_image` with the same arguments.
        backbone, layers, heads, shift: See :func:`describe_image`.
        source (str): Checkpoint and weights, for the title.
        note (str, optional): Why the page shows no predictions. Defaults to None.
        query (Sequence[int], optional): Row and column of the patch to begin with. Defaults to the
            one in the middle.
        overwrite (bool): Whether to replace an existing file. Defaults to False.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False.
    """
    data = dict(
        source=source, note=note, shift=None if shift is None else max(shift, 1), query=query,
        layers=list(layers), heads=list(heads), causal=backbone.causal,
        prefix=backbone.num_extra_tokens, levels=LEVELS, images=list(entries))
    # no tag and no comment of HTML can begin within the data
    text = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')
    with atomic_write(path, overwrite) as temporary:
        temporary.write_text(TEMPLATE.read_text(encoding='utf-8').replace('{{DATA}}', text),
                             encoding='utf-8')
