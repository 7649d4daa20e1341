"""Frozen features, scored by k-nearest neighbours and by a linear probe."""
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nepa_mm.checkpoints.loading import unwrapped
from nepa_mm.models.vit import NEPAViT

FEATURES = ('avg_featmap', 'last_token', 'cls_token')
# short name -> out_type of NEPAViT
POOLS = dict(mean='avg_featmap', cls='cls_token', last='last_token', none='raw', map='featmap')
IMAGE = (str, os.PathLike, Image.Image)


def features(model: nn.Module, images: Tensor | Iterable, block: int = -1, pool: str = 'mean',
             batch_size: int = 32) -> Tensor:
    """Frozen features of images, in evaluation mode and without gradients.

    =======  ===============  ============================================================
    pool     as ``out_type``  result
    =======  ===============  ============================================================
    'mean'   'avg_featmap'    (B, D), mean over the patches
    'cls'    'cls_token'      (B, D); behind a causal mask it has read no patch
    'last'   'last_token'     (B, D), the last patch; behind a causal mask it has read all
    'none'   'raw'            (B, 1 + N, D), class token, registers if any, patches
    'map'    'featmap'        (B, D, gh, gw), rows and columns of patches
    =======  ===============  ============================================================

    A classifier's ``fc_norm`` belongs to its head and is not applied. The model, its mode and the
    random states stay as they are.

    Args:
        model (nn.Module): A model with a NEPAViT as ``backbone``, e.g. of ``nepa_mm.load``, or a
            NEPAViT.
        images (Tensor | Iterable): Normalised images (B, C, height, width), computed in one batch;
            or PIL images and paths, which ``model.transform`` turns into tensors.
        block (int): Block whose output is read, from 0, negative from the end. The last one
            includes the final norm. Defaults to -1.
        pool (str): A name of either column. Defaults to 'mean'.
        batch_size (int): PIL images and paths computed at once. Defaults to 32.

    Returns:
        Tensor: fp32, on the model's device.

    Raises:
        DataError: An image cannot be read, or does not fit the network.
        ValueError: An argument is unknown or out of range; there is no image; images differ in
            size with ``pool`` 'none' or 'map'.
    """
    backbone = getattr(unwrapped(model), 'backbone', unwrapped(model))
    if not isinstance(backbone, NEPAViT):
        raise ValueError(f'Features are read from a NEPAViT, got {type(backbone).__name__}.')
    if pool not in POOLS and pool not in POOLS.values():
        raise ValueError(f'pool must be one of {tuple(POOLS)}, or an out_type of NEPAViT, '
                         f'got {pool!r}.')
    count = backbone.num_layers
    if type(block) is not int or not -count <= block < count:
        raise ValueError(f'block must be in [{-count}, {count - 1}] for {count} blocks, got '
                         f'{block}.')
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f'batch_size must be a positive number, got {batch_size}.')
    found = []
    with evaluating(model), torch.no_grad():
        for batch in _batches(unwrapped(model), images, batch_size):
            found.append(_read(model, batch, block, POOLS.get(pool, pool)))
    if not found:
        raise ValueError('There is no image to read features of.')
    if len({part.shape[1:] for part in found}) > 1:
        raise ValueError(f'pool={pool!r} gives one tensor, so all images must have the same size; '
                         f'here are {tuple(found[0].shape[1:])} and others.')
    return torch.cat(found)


def _batches(model, images, batch_size):
    """Yield tensors (B, C, height, width); images in a row that have the same size together."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError('A tensor of images is normalised floating point of shape '
                             f'(B, C, height, width), got {images.dtype} of shape '
                             f'{tuple(images.shape)}.')
        if len(images):
            yield images
        return
    if isinstance(images, IMAGE):
        images = [images]
    if not isinstance(images, Iterable):
        raise ValueError('Images are a tensor, or a list of PIL images and paths, got '
                         f'{type(images).__name__}.')
    transform = getattr(model, 'transform', None)
    if transform is None:
        raise ValueError('This model has no transform: load it by nepa_mm.load, or give a tensor '
                         'of normalised images.')
    for _, group in groupby(map(transform, images), key=lambda image: image.shape):
        batch = []
        for image in group:
            batch.append(image)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)


def _read(model, images, block, out_type):
    """Output of a block for normalised images (B, C, height, width), fp32."""
    model = unwrapped(model)
    backbone = getattr(model, 'backbone', model)
    images = images.to(backbone.patch_embed.projection.weight)
    if hasattr(model, 'fit_patches'):       # a segmentor for images of any size
        images = model.fit_patches(images)
    z, grid = backbone.embed(images)
    tokens, = backbone.encode(z, grid, [block])
    return backbone.pool(tokens.float(), grid, out_type)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def extract_features(model: BaseModel, dataloader: DataLoader, feature: str = 'avg_featmap',
                     block: int = -1) -> tuple[Tensor, Tensor]:
    """Features and labels of a data set, in evaluation mode.

    Args:
        model (BaseModel): A model with a NEPAViT as ``backbone`` and a
            ``data_preprocessor``.
        dataloader (DataLoader): Batches with ``inputs`` and labelled ``data_samples``.
        feature (str): 'avg_featmap' (mean over the patches), 'last_token' or
            'cls_token'. Defaults to 'avg_featmap'.
        block (int): Block whose output is read; the last one includes the final norm.
            Defaults to -1.

    Returns:
        tuple[Tensor, Tensor]: Features (N, D), fp32, and labels (N,), on the model's
        device.

    Raises:
        ValueError: ``feature`` or ``block`` does not exist, or there are no labels.
    """
    if feature not in FEATURES:
        raise ValueError(f'feature must be one of {FEATURES}, got {feature!r}.')
    found, labels = [], []
    with evaluating(model), torch.no_grad():
        for batch in dataloader:
            batch = model.data_preprocessor(batch, training=False)
            if not batch['data_samples'] or 'gt_label' not in batch['data_samples'][0]:
                raise ValueError('k-NN compares labels, but this data set has none.')
            found.append(_read(model, batch['inputs'], block, feature))
            labels += [sample.gt_label for sample in batch['data_samples']]
    return torch.cat(found), torch.cat(labels).to(found[0].device)


@torch.no_grad()
def knn_scores(bank: Tensor, bank_labels: Tensor, queries: Tensor, num_classes: int, k: int = 20,
               temperature: float = 0.07, chunk: int = 1024) -> Tensor:
    """Class scores by weighted k-NN: neighbours vote with exp(cosine / temperature), as in DINO.

    Args:
        bank (Tensor): Features of the labelled images (M, D).
        bank_labels (Tensor): Their labels (M,).
        queries (Tensor): Features to classify (N, D).
        num_classes (int): Number of classes.
        k (int): Neighbours that vote; at most M. Defaults to 20.
        temperature (float): Defaults to 0.07.
        chunk (int): Queries compared at once; memory is chunk x M. Defaults to 1024.

    Returns:
        Tensor: (N, num_classes).

    Raises:
        ValueError: ``k`` or ``temperature`` is not positive.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f'k and temperature must be positive, got {k} and {temperature}.')
    bank, queries, scores = F.normalize(bank, dim=1), F.normalize(queries, dim=1), []
    for part in queries.split(chunk):
        cosine, neighbours = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = (cosine / temperature).exp()
        scores.append(votes.new_zeros(len(part), num_classes)
                      .scatter_add_(1, bank_labels[neighbours], votes))
    return torch.cat(scores)


def knn_accuracy(model: BaseModel, bank_loader: DataLoader, query_loader: DataLoader,
                 feature: str = 'avg_featmap', block: int = -1, k: int = 20,
                 temperature: float = 0.07, topk: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Top-k accuracy in percent of k-NN on frozen features; see the functions above.

    Returns:
        dict[str, float]: 'top1' and so on, up to the number of classes.
    """
    bank, labels = extract_features(model, bank_loader, feature, block)
    queries, targets = extract_features(model, query_loader, feature, block)
    num_classes = int(max(labels.max(), targets.max())) + 1
    scores = knn_scores(bank, labels, queries, num_classes, k, temperature)
    ranked = scores.topk(min(max(topk), num_classes), dim=1).indices == targets[:, None]
    return {f'top{n}': 100 * ranked[:, :n].any(dim=1).float().mean().item()
            for n in topk if n <= num_classes}


def linear_scores(bank: Tensor, bank_labels: Tensor, queries: Tensor,
                  num_classes: int) -> Tensor:
    """Class scores by a linear probe: multinomial logistic regression on frozen features.

    Features are standardised with the bank's mean and standard deviation. The objective is
    scikit-learn's with C = 1: the sum of cross-entropies plus half the squared weights.
    Full-batch L-BFGS starts at zero, so there is no learning rate and no random draw.

    Args:
        bank (Tensor): Features of the labelled images (M, D).
        bank_labels (Tensor): Their labels (M,).
        queries (Tensor): Features to classify (N, D).
        num_classes (int): Number of classes.

    Returns:
        Tensor: (N, num_classes).
    """
    std, mean = torch.std_mean(bank, dim=0, correction=0)
    bank, queries = ((x - mean) / std.clamp(min=1e-6) for x in (bank, queries))
    weight = bank.new_zeros(num_classes, bank.shape[1], requires_grad=True)
    bias = bank.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(bank, weight, bias), bank_labels)
        loss = loss + 0.5 * weight.square().sum() / len(bank)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return F.linear(queries, weight, bias).detach()
