"""Frozen features, scored by k-nearest neighbours and by a linear probe."""
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor
from torch.utils.data import DataLoader

FEATURES = ('avg_featmap', 'last_token', 'cls_token')


@torch.no_grad()
def extract_features(model: BaseModel, dataloader: DataLoader, feature: str = 'avg_featmap',
                     block: int = -1) -> tuple[Tensor, Tensor]:
    """Features of a data set, in evaluation mode.

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
    backbone, was_training = model.backbone, model.training
    model.eval()
    features, labels = [], []
    for batch in dataloader:
        batch = model.data_preprocessor(batch, training=False)
        if not batch['data_samples'] or 'gt_label' not in batch['data_samples'][0]:
            raise ValueError('k-NN compares labels, but this data set has none.')
        tokens = backbone.encode(*backbone.embed(batch['inputs']), [block])[0].float()
        if feature == 'avg_featmap':
            features.append(tokens[:, backbone.num_extra_tokens:].mean(dim=1))
        else:
            features.append(tokens[:, 0 if feature == 'cls_token' else -1])
        labels += [sample.gt_label for sample in batch['data_samples']]
    model.train(was_training)
    return torch.cat(features), torch.cat(labels).to(features[0].device)


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
