"""Weighted k-NN: hand-computed scores, ties, chunks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from core.knn import knn_classify, topk_accuracy_pct
from tests.golden_files import require
from tools.verify.classification import FEATURES, LABELS, QUERY, knn


def weight(similarity: float, temperature: float = 0.07) -> float:
    return math.exp(similarity / temperature)


def test_scores_by_hand() -> None:
    require(knn())


def test_temperature_and_defaults() -> None:
    scores = knn_classify(FEATURES, LABELS, QUERY, num_classes=4, k=2, temperature=0.5)
    torch.testing.assert_close(scores, torch.tensor([[weight(1, 0.5), weight(0.6, 0.5), 0, 0]]), rtol=1e-5, atol=0)
    features = torch.eye(32)[:25]  # 24 neighbours at similarity 0: the default takes 20 in all
    labels = torch.tensor([0] + [1] * 24)
    scores = knn_classify(features, labels, features[:1], num_classes=2)
    torch.testing.assert_close(scores, torch.tensor([[weight(1), 19.0]]), rtol=1e-5, atol=0)


def test_a_near_neighbour_outweighs_a_majority() -> None:
    angle = math.acos(0.9)
    features = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]])
    labels = torch.tensor([1, 0, 0])
    scores = knn_classify(features, labels, QUERY, num_classes=2, k=3)
    assert scores.argmax() == 1  # e^(1/0.07) > 2 e^(0.9/0.07)
    assert knn_classify(features, labels, QUERY, num_classes=2, k=3, temperature=1.0).argmax() == 0


def test_ties_go_to_the_lowest_class() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scores = knn_classify(features, torch.tensor([3, 1, 0]), QUERY, num_classes=4, k=2)
    assert scores[0, 1] == scores[0, 3] > 0
    assert topk_accuracy_pct(scores, torch.tensor([1]), 1) == 100.0
    assert topk_accuracy_pct(scores, torch.tensor([3]), 1) == 0.0
    assert topk_accuracy_pct(scores, torch.tensor([3]), 2) == 100.0
    assert topk_accuracy_pct(scores, torch.tensor([0]), 3) == 100.0  # class 0 before class 2, both 0
    assert topk_accuracy_pct(scores, torch.tensor([2]), 3) == 0.0


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    centres = 2 * torch.randn(5, 16, generator=torch.Generator().manual_seed(9))
    return centres[labels] + torch.randn(count, 16, generator=generator), labels


def test_chunks_do_not_matter() -> None:
    features, labels = blobs(200, 0)
    queries, truth = blobs(3000, 1)
    scores = knn_classify(features, labels, queries, num_classes=5)
    assert scores.shape == (3000, 5)
    rows = [*range(1018, 1030), *range(2044, 2052), 0, 2999]  # both sides of each seam
    alone = torch.cat([knn_classify(features, labels, queries[i : i + 1], num_classes=5) for i in rows])
    torch.testing.assert_close(scores[rows], alone, rtol=1e-4, atol=1e-6)
    assert topk_accuracy_pct(scores, truth, 1) > 90  # of 5 well separated classes


def test_scores_equal_the_plain_computation() -> None:
    features, labels = blobs(60, 2)
    queries, _ = blobs(10, 3)
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(features.double(), dim=1).T
    expected = torch.zeros(10, 5, dtype=torch.float64)
    for i, row in enumerate(similarity):
        for j in sorted(range(60), key=lambda j: -row[j].item())[:7]:
            expected[i, labels[j]] += math.exp(row[j].item() / 0.1)
    scores = knn_classify(features, labels, queries, num_classes=5, k=7, temperature=0.1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


def test_half_precision_features_are_scored_in_float32() -> None:
    features, labels = blobs(50, 4)
    scores = knn_classify(features.bfloat16(), labels, features.bfloat16(), num_classes=5)
    expected = knn_classify(features.bfloat16().float(), labels, features.bfloat16().float(), num_classes=5)
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
