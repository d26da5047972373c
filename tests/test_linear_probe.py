"""The linear classifier of the probe: what it separates, what it ignores, and that it was fitted to the end."""

import torch
import torch.nn.functional as F

from core.knn import topk_accuracy_pct
from core.linear_probe import L2, linear_classify


def blobs(seed: int, number: int, classes: int = 4, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    centres = 3 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (number,), generator=generator)
    return centres[labels] + torch.randn(number, dim, generator=generator), labels


def test_separable_classes_are_separated() -> None:
    (x, y), (q, truth) = blobs(1, 400), blobs(2, 200)
    assert topk_accuracy_pct(linear_classify(x, y, q, num_classes=4), truth, 1) > 97
    shuffled = y[torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    assert topk_accuracy_pct(linear_classify(x, shuffled, q, num_classes=4), truth, 1) < 60


def test_scale_and_shift_of_features_change_nothing() -> None:
    (x, y), (q, _) = blobs(1, 100), blobs(2, 20)
    scale, shift = torch.logspace(-2, 2, 8), torch.linspace(-5, 5, 8)
    scores = linear_classify(x * scale + shift, y, q * scale + shift, num_classes=4)
    torch.testing.assert_close(scores, linear_classify(x, y, q, num_classes=4), atol=0.05, rtol=0.02)


def test_the_gradient_is_gone_and_a_constant_feature_does_no_harm() -> None:
    x, y = blobs(1, 200)
    x = torch.cat([x, torch.full((200, 1), 7.0)], dim=1)
    logits = linear_classify(x, y, x, num_classes=4)
    assert torch.isfinite(logits).all()
    z = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-6)
    # The weights follow from the logits; at the minimum the gradient of the whole objective is zero.
    solution = torch.linalg.lstsq(torch.cat([z[:, :-1], torch.ones(200, 1)], dim=1).double(), logits.double()).solution
    weight = solution[:-1].T.float()
    gradient = (logits.softmax(1) - F.one_hot(y, 4)).T @ z[:, :-1] / 200 + L2 * weight
    assert gradient.abs().max() < 2e-4


def test_it_works_where_gradients_are_off_and_leaves_none() -> None:
    x, y = blobs(1, 50)
    with torch.no_grad():
        scores = linear_classify(x.half(), y, x.half(), num_classes=4)
    assert scores.dtype == torch.float32 and not scores.requires_grad
