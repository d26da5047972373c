"""Weighted k-NN over features: the probe of pretraining and the protocol of classification."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_classify(
    features: Tensor, labels: Tensor, queries: Tensor, *, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class scores of queries by their nearest neighbours, each neighbour weighted by exp(similarity / temperature).

    Args:
        features: [N, D] of the labelled set; labels: [N] int64; queries: [Q, D]. Normalised here to unit length.
        k: neighbours, at most N.
    Returns: [Q, num_classes] float32 scores; ties between classes go to the lowest index by a stable sort.
    Source: DINO / iBOT protocol; spec classify section 4.
    """
    features, queries = F.normalize(features.float(), dim=1), F.normalize(queries.float(), dim=1)
    scores = []
    for chunk in queries.split(1024):
        similarity, nearest = (chunk @ features.T).topk(min(k, len(features)), dim=1)  # [q, k]
        weights = (similarity / temperature).exp()
        scores.append(weights.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(scores)


def topk_accuracy_pct(scores: Tensor, labels: Tensor, k: int) -> float:
    """Percent of rows whose label is among the k highest scores, ties broken by the lowest class index."""
    ranked = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return (ranked == labels[:, None]).any(dim=1).double().mean().item() * 100
