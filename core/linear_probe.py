"""A linear classifier on frozen features, fitted to the end: the quick probe, not the published protocol."""

import torch
import torch.nn.functional as F
from torch import Tensor

L2 = 1e-3  # weight of half the squared norm, on standardised features
ITERATIONS = 100


def linear_classify(features: Tensor, labels: Tensor, queries: Tensor, *, num_classes: int) -> Tensor:
    """Class scores of queries by softmax regression on features standardised by their own mean and deviation.

    Args:
        features: [N, D] of the labelled set; labels: [N] int64; queries: [Q, D].
    Returns: [Q, num_classes] float32 logits. Fitted by L-BFGS on all N at once from zero weights: nothing is drawn, no
        rate is chosen. The published linear probe (SGD over augmented images) gives other figures.
    """
    mean, scale = features.float().mean(dim=0), features.float().std(dim=0, correction=0) + 1e-6
    x, q = ((t.float() - mean) / scale for t in (features, queries))
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + L2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return F.linear(q, weight, bias).detach()
